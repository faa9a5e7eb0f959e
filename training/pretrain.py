"""Contrastive pretraining on image-caption pairs in Chinese and English: the loop on one page.

    python -m training.pretrain nano --output-dir runs/a --data.files runs/scenes/train-*.parquet
    torchrun --nproc_per_node 2 -m training.pretrain nano ...      (or: accelerate launch -m training.pretrain nano ...)

Writes OUTPUT_DIR/log.jsonl (one object per logged step), OUTPUT_DIR/config.json, OUTPUT_DIR/checkpoints (to go on from,
with --checkpoint.every N and --resume auto) and OUTPUT_DIR/model (for from_pretrained).

Shapes: B pairs of one micro-batch, k micro-batches of one step on each process.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor

from eval.retrieval import evaluate_retrieval
from eval.scenes import evaluate_scenes
from modeling_m2encoder import M2EncoderConfig, M2EncoderProcessor

from .bank import MicroBatchOutput, banked_backward
from .build import (
    Trainee,
    build_processor,
    build_trainee,
    claim_output_dir,
    gpus_per_node,
    make_accelerator,
    open_pairs,
    open_stream,
    print_plan,
)
from .checkpoint import check_settings, export, find_checkpoint, forget_later, load_checkpoint, save_checkpoint
from .configs import PRESETS, ObjectiveConfig, PretrainConfig, flat_settings
from .flops import training_flops
from .optim import warmup_cosine
from .publish import publish
from .run_log import RunLog
from .schedule import Phase, phase_at
from .sharding import Distributed

# CLIP (arXiv 2103.00020, section 2.5): the temperature is kept from sharpening beyond 1/100.
MAX_LOGIT_SCALE = math.log(100)
# What the model is called with; a batch holds more.
MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "text_mask", "patch_mask", "kept_patches")


def pretrain(config: PretrainConfig) -> Path:
    """Runs one pretraining, or what is left of it, and returns the exported folder.

    Raises:
        ValueError: for impossible settings, missing columns or files, or a checkpoint that does not fit.
    """
    # ---- Parts
    accelerator = make_accelerator(config)
    phases, banks = config.check(accelerator.num_processes, gpus_per_node())
    print_plan(config, accelerator)
    source = open_pairs(config)
    output_dir, settings = Path(config.output_dir), flat_settings(config) | {"bank_size": banks[0].bank_size}
    checkpoint = find_checkpoint(config.resume, output_dir / "checkpoints")
    start = checkpoint.step if checkpoint else 0
    if checkpoint:
        check_settings(checkpoint, settings)
    lock = claim_output_dir(config, accelerator, checkpoint)
    set_seed(config.seed)
    processor = build_processor(config, source.captions, accelerator, checkpoint)
    phase, group = phase_at(phases, max(start, 1)), banks[0].make_group()
    trainee = build_trainee(config, processor, accelerator, phase.sharing)
    set_seed(config.seed, device_specific=True)  # drop-path of its own on every rank
    position, skipped = load_checkpoint(checkpoint, trainee) if checkpoint else (None, {})
    forget_later(output_dir / "checkpoints", start)
    stream = open_stream(config, source, processor, accelerator, phase, position)
    log = RunLog(accelerator, output_dir, config.steps, config.batch_size, start, skipped)

    # ---- Loop
    for step in range(start + 1, config.steps + 1):
        if step not in phase:
            phase = phase_at(phases, step)
            trainee = trainee.with_sharing(phase.sharing, config, processor, accelerator)
            stream = open_stream(config, source, processor, accelerator, phase, stream.state_dict())
        # A loader draws a seed whenever it starts, after a resume once more: not from the numbers of the model.
        with log.waiting_for_data(), torch.random.fork_rng(devices=[]):
            batch = next(stream)
        last = step == config.steps
        evaluating = config.evaluation.every > 0 and (step % config.evaluation.every == 0 or last)
        logging = evaluating or last or step % config.log_every == 0 or step == 1
        lr = learning_rate(config, phase, step)
        metrics = train_step(
            trainee, batch, config, accelerator, bank_steps=phase.bank_steps, group=group, lr=lr, norms=logging
        )
        log.count(batch["skipped"], step_flops(trainee.distributed.module.config, batch))
        if logging:
            with log.paused():
                scores = evaluate(config, trainee.distributed, processor) if evaluating else {}
            log.write(step, {**metrics, "lr": lr, **scores})
        if config.checkpoint.every and (step % config.checkpoint.every == 0 or last):
            with log.paused():
                log.sync()
                save_checkpoint(
                    output_dir / "checkpoints",
                    step,
                    trainee,
                    settings=settings,
                    position=stream.state_dict(),
                    skipped=log.skipped,
                    keep=config.checkpoint.keep,
                )
    log.close()

    # ---- Result
    folder = output_dir / "model"
    whole = trainee.distributed.full_copy()
    if accelerator.is_main_process:
        export(whole, processor, folder)
    # Before the process group goes: DDP's reducer as its last owner waits for gloo's threads without letting go of the
    # interpreter, which they may wait for (seen with torch 2.13, as a run that never ended).
    del trainee
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if lock:
        lock.close()
    if config.push_to_hub and accelerator.is_main_process:
        publish(folder, config.push_to_hub, private=config.push_private)
    return folder


def train_step(
    trainee: Trainee,
    batch: Mapping[str, Any],
    config: PretrainConfig,
    accelerator: Accelerator,
    *,
    bank_steps: int,
    group: dist.ProcessGroup | None = None,
    lr: float,
    norms: bool = True,
) -> dict[str, Tensor]:
    """One optimizer step over the global batch: the bank's gradients, clipped, and the temperature clamped.

    This rank's part of the batch runs in k = `bank_steps` micro-batches, one after the other.

    Returns:
        This process's losses (the global batch's are their means over the processes), `logit_scale`, `grad_norm`, and
        with `norms` the 2-norms of all trainable parameters and of the step they have taken; left on the device, so
        that nothing waits for them here.
    """
    distributed, optimizer = trainee.distributed, trainee.optimizer
    logit_scale = distributed.module.logit_scale
    micro_batches = split_batch(batch, bank_steps, accelerator)
    losses = banked_backward(
        partial(model_step, distributed.model, config.objective, compute_dtype(accelerator)),
        micro_batches,
        logit_scale,
        retain=config.itc.retain,
        group=group,
        tile=config.itc.tile,
        no_sync=distributed.no_sync,
    )
    metrics = {**losses, "grad_norm": distributed.clip_grad_norm_(config.optimizer.max_grad_norm)}
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    # Copies are cheap here: the activations' memory is free again.
    before = [parameter.detach().clone() for parameter in distributed.parameters] if norms else []
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        (logit_scale.to_local() if isinstance(logit_scale, DTensor) else logit_scale).clamp_(max=MAX_LOGIT_SCALE)
        if norms:
            metrics["param_norm"] = total_norm(distributed.parameters)
            steps = zip(before, distributed.parameters, strict=True)
            metrics["update_norm"] = total_norm([old.sub_(parameter) for old, parameter in steps])
        metrics["logit_scale"] = whole_tensor(logit_scale).clone()
    return metrics


def split_batch(batch: Mapping[str, Any], bank_steps: int, accelerator: Accelerator) -> list[dict[str, Tensor]]:
    """This rank's batch as k micro-batches of consecutive pairs, on the device.

    Each holds `cmlm_share` [1] as well, if texts are masked: its masked tokens, compared with the mean of all
    micro-batches of all ranks. Weighted so, L_CMLM is the mean over all masked tokens, wherever they are; the paper
    does not say whether it takes this or the mean of the micro-batches' means.
    """
    inputs = {name: batch[name].to(accelerator.device, non_blocking=True) for name in MODEL_INPUTS if name in batch}
    if "text_mask" in inputs:
        hidden = torch.stack([part.sum() for part in inputs["text_mask"].chunk(bank_steps)]).float()
        mean = accelerator.reduce(hidden.mean(), "mean")
        inputs["cmlm_share"] = hidden / mean.clamp(min=1)
    parts = {name: value.chunk(bank_steps) for name, value in inputs.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def model_step(
    model: torch.nn.Module,
    objective: ObjectiveConfig,
    dtype: torch.dtype,
    micro_batch: Mapping[str, Tensor],
    with_auxiliary: bool,
) -> MicroBatchOutput:
    """The features of one micro-batch, and in the pass with gradients its masked losses: `training.bank.ModelStep`."""
    inputs = dict(micro_batch)
    share = inputs.pop("cmlm_share", None)
    if not with_auxiliary:
        inputs.pop("text_mask", None), inputs.pop("patch_mask", None)
    output = model(**inputs, interpolate_pos_encoding=True)
    losses = {}
    if "patch_mask" in inputs:  # every image hides the same number of patches
        losses["loss_cmim"] = output.loss_cmim
    if "text_mask" in inputs:
        losses["loss_cmlm"] = output.loss_cmlm * share.squeeze()
    weights = {"loss_cmim": objective.cmim_weight, "loss_cmlm": objective.cmlm_weight}
    return MicroBatchOutput(
        # Gathered in the dtype that they were computed in; the loss is fp32 again.
        output.image_embeds.to(dtype),
        output.text_embeds.to(dtype),
        sum(weights[name] * loss for name, loss in losses.items()) if losses else None,
        {name: loss.detach() for name, loss in losses.items()},
    )


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """Of activations and features."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def learning_rate(config: PretrainConfig, phase: Phase, step: int) -> float:
    """Of update number `step`, counted from 1."""
    settings = config.optimizer
    factor = warmup_cosine(step, settings.warmup_steps, config.steps, settings.min_lr_ratio)
    return settings.lr * factor * phase.lr_factor(step)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, 0-d; of the whole ones where they are sharded."""
    return whole_tensor(torch.nn.utils.get_total_norm(tensors))


def whole_tensor(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def step_flops(config: M2EncoderConfig, batch: Mapping[str, Any]) -> float:
    """Of this rank's part of a step."""
    masked = batch["text_mask"].sum().item() if "text_mask" in batch else None
    height, width = batch["pixel_values"].shape[-2:]
    patches = (height // config.patch_size) * (width // config.patch_size)
    return training_flops(
        config, *batch["input_ids"].shape, patches=patches, masked_tokens=masked, masked_images="patch_mask" in batch
    )


def evaluate(config: PretrainConfig, distributed: Distributed, processor: M2EncoderProcessor) -> dict[str, float]:
    """Scores on held-out data. Every process embeds its share and gets all scores, as a sharded model needs anyway."""
    scores: dict[str, float] = {}
    model, settings = distributed.module, config.evaluation
    group = dist.group.WORLD if dist.is_initialized() else None
    if settings.scenes:
        scores |= evaluate_scenes(
            model, processor, settings.scenes, split="validation", limit=settings.limit, group=group
        )
    if settings.retrieval:
        scores |= evaluate_retrieval(
            model,
            processor,
            settings.retrieval,
            image_column=config.data.image_column,
            captions=config.data.caption_columns,
            limit=settings.limit,
            group=group,
        )
    return scores


def parse(arguments: list[str]) -> PretrainConfig:
    """`PRESET [--field value ...]`; `PRESET --help` lists the fields."""
    names = ", ".join(PRESETS)
    if not arguments or arguments[0] not in PRESETS:
        seen = repr(arguments[0]) if arguments else "nothing"
        raise SystemExit(f"The first word is the preset, one of: {names}; got {seen}.\n{__doc__}")
    return tyro.cli(PretrainConfig, default=PRESETS[arguments[0]](), args=arguments[1:], prog="training.pretrain")


if __name__ == "__main__":
    pretrain(parse(sys.argv[1:]))
