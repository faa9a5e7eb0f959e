"""Contrastive pretraining on image-caption pairs in Chinese and English: the loop on one page.

    python -m training.pretrain nano --output-dir runs/a --data.files runs/scenes/train-*.parquet
    torchrun --nproc_per_node 2 -m training.pretrain nano ...      (or: accelerate launch -m training.pretrain nano ...)

Writes OUTPUT_DIR/log.jsonl (one object per logged step), OUTPUT_DIR/config.json and OUTPUT_DIR/model (for
from_pretrained).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor, AutoTokenizer

from eval.retrieval import evaluate_retrieval
from eval.scenes import evaluate_scenes
from modeling_m2encoder import (
    M2EncoderConfig,
    M2EncoderForPreTraining,
    M2EncoderImageProcessorPil,
    M2EncoderModel,
    M2EncoderProcessor,
)

from .checkpoint import export
from .configs import PRESETS, ObjectiveConfig, PretrainConfig
from .data import CaptionDataset, batches
from .losses import grouped_itc_loss
from .masking import Masker, describe_vocabulary
from .optim import build_optimizer, warmup_cosine
from .run_log import RunLog
from .tokenizer import train_tokenizer

# CLIP (arXiv 2103.00020, section 2.5): the temperature is kept from sharpening beyond 1/100.
MAX_LOGIT_SCALE = math.log(100)
# Enough for any vocabulary of a few thousand pieces; learning one takes 0.1 ms per caption.
TOKENIZER_CAPTIONS = 100_000


def pretrain(config: PretrainConfig) -> Path:
    """Runs one pretraining and returns the exported folder.

    Raises:
        ValueError: for impossible settings, missing columns or files.
    """
    # ---- Parts
    accelerator = make_accelerator(config)
    config.check(accelerator.num_processes)
    set_seed(config.seed)
    output_dir = claim_output_dir(config, accelerator)
    dataset = CaptionDataset(
        config.data.files, image_column=config.data.image_column, captions=config.data.caption_columns
    )
    model, processor = build_model(config, dataset, output_dir, accelerator)
    settings = config.optimizer
    optimizer = build_optimizer(model, settings.name, settings.lr, settings.betas, settings.eps, settings.weight_decay)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    log = RunLog(accelerator, output_dir, steps=config.steps, batch_size=config.batch_size)
    stream = batches(
        dataset,
        processor,
        seed=config.seed,
        global_batch_size=config.batch_size,
        # Not through accelerator.prepare: the stream already gives each process its own share of every batch.
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_steps=config.steps,
        num_workers=config.data.num_workers,
        language_weights=config.data.language_weights or None,
        augment=config.data.augment,
        flip=config.data.flip,
        neighbours=config.data.neighbours,
        masker=build_masker(config.objective, model, processor),
    )

    # ---- Loop
    wrapped.train()
    for step, batch in enumerate(stream, start=1):
        lr = settings.lr * warmup_cosine(step, settings.warmup_steps, config.steps, settings.min_lr_ratio)
        metrics = train_step(accelerator, wrapped, optimizer, batch, config.objective, lr, settings.max_grad_norm)
        log.count_skipped(batch["skipped"])
        last = step == config.steps
        evaluating = config.evaluation.every > 0 and (step % config.evaluation.every == 0 or last)
        if evaluating or last or step % config.log_every == 0 or step == 1:
            record = {**metrics, "lr": lr, "samples_per_second": log.samples_per_second(step)}
            if evaluating:
                record |= evaluate(config, accelerator, wrapped, processor)
            log.write(step, record)
    log.close()

    # ---- Result
    folder = output_dir / "model"
    if accelerator.is_main_process:
        export(accelerator.unwrap_model(wrapped), processor, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    objective: ObjectiveConfig,
    lr: float,
    max_grad_norm: float,
) -> dict[str, torch.Tensor]:
    """One optimizer step over the global batch: loss over all processes, clipped gradients, clamped temperature.

    Returns this process's losses (the global batch's are their means over processes), `logit_scale` and `grad_norm`,
    left on the device so that nothing waits for them here.
    """
    names = ("input_ids", "attention_mask", "pixel_values", "text_mask", "patch_mask")
    inputs = {name: batch[name].to(accelerator.device, non_blocking=True) for name in names if name in batch}
    output = model(**inputs)
    logit_scale = accelerator.unwrap_model(model).logit_scale
    loss = itc = grouped_itc_loss(output.image_embeds, output.text_embeds, logit_scale)
    parts = {"loss_itc": itc.detach()}
    if "patch_mask" in inputs:  # every image hides the same number of patches
        loss = loss + objective.cmim_weight * output.loss_cmim
        parts["loss_cmim"] = output.loss_cmim.detach()
    if "text_mask" in inputs:
        # The mean over all masked tokens, wherever they are: each process has its own number of them.
        hidden = inputs["text_mask"].sum()
        cmlm = output.loss_cmlm * hidden / accelerator.reduce(hidden.float(), "mean").clamp(min=1)
        loss = loss + objective.cmlm_weight * cmlm
        parts["loss_cmlm"] = cmlm.detach()
    accelerator.backward(loss)
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    return {"loss": loss.detach(), **parts, "logit_scale": logit_scale.detach().clone(), "grad_norm": grad_norm}


def build_masker(objective: ObjectiveConfig, model: M2EncoderModel, processor: M2EncoderProcessor) -> Masker | None:
    """What draws the masks of the losses that have a weight; None if none has."""
    if not objective.masks:
        return None
    return Masker(
        objective.masking,
        describe_vocabulary(processor.tokenizer) if objective.cmlm_weight else None,
        (model.config.image_size // model.config.patch_size) ** 2 if objective.cmim_weight else 0,
    )


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """The Accelerator of this process, on the CPU where there is no accelerator."""
    on_cpu = not torch.accelerator.is_available()
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision=precision, log_with=list(config.trackers) or None, project_dir=config.output_dir
    )
    if config.trackers:
        accelerator.init_trackers("m2encoder", config=_flat(dataclasses.asdict(config)))
    return accelerator


def claim_output_dir(config: PretrainConfig, accelerator: Accelerator) -> Path:
    """Makes the run's folder and writes its settings; refuses one that holds a run already."""
    output_dir = Path(config.output_dir)
    taken = (output_dir / "log.jsonl").exists() or (output_dir / "model").exists()
    accelerator.wait_for_everyone()  # all look before one writes
    if taken:
        raise ValueError(f"{output_dir} already holds a run: choose another --output-dir, or delete it.")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
        (output_dir / "config.json").write_text(text + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    return output_dir


def build_model(
    config: PretrainConfig, dataset: CaptionDataset, output_dir: Path, accelerator: Accelerator
) -> tuple[M2EncoderModel, M2EncoderProcessor]:
    """The model and its processor: those of `init_from`, or new ones of `size` with the given or a new tokenizer."""
    objective = config.objective
    if config.init_from:
        model_config = AutoConfig.from_pretrained(config.init_from)
        model_config.drop_path_rate = config.drop_path_rate
        auto_class = AutoModelForPreTraining if objective.masks else AutoModel
        model = auto_class.from_pretrained(config.init_from, config=model_config, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(config.init_from)
    else:
        folder = config.tokenizer or str(output_dir / "tokenizer")
        if not config.tokenizer:
            if accelerator.is_main_process:
                captions = itertools.islice(dataset.captions(), TOKENIZER_CAPTIONS)
                train_tokenizer(captions, config.vocab_size).save_pretrained(folder)
            accelerator.wait_for_everyone()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model_config = M2EncoderConfig.from_size(
            config.size,
            vocab_size=len(tokenizer),
            drop_path_rate=config.drop_path_rate,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            mask_token_id=tokenizer.mask_token_id,
        )
        model = (M2EncoderForPreTraining if objective.masks else M2EncoderModel)(model_config)
        side = model_config.image_size
        processor = M2EncoderProcessor(M2EncoderImageProcessorPil(size={"height": side, "width": side}), tokenizer)
    if objective.masks:
        # Parameters without a gradient would keep DDP waiting for them.
        heads = model.pretraining_heads
        if not objective.cmlm_weight:
            for module in (heads.image_to_text_decoder, heads.text_head):
                module.requires_grad_(False)
        if not objective.cmim_weight:
            for module in (heads.text_to_image_decoder, heads.pixel_head, heads.mask_token):
                module.requires_grad_(False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, processor


def evaluate(
    config: PretrainConfig, accelerator: Accelerator, model: torch.nn.Module, processor: M2EncoderProcessor
) -> dict[str, float]:
    """Retrieval scores on held-out data, on the main process while the others wait."""
    scores: dict[str, float] = {}
    if accelerator.is_main_process:
        bare, settings = accelerator.unwrap_model(model), config.evaluation
        if settings.scenes:
            scores |= evaluate_scenes(bare, processor, settings.scenes, split="validation", limit=settings.limit)
        if settings.retrieval:
            scores |= evaluate_retrieval(
                bare,
                processor,
                settings.retrieval,
                image_column=config.data.image_column,
                captions=config.data.caption_columns,
                limit=settings.limit,
            )
    accelerator.wait_for_everyone()
    return scores


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as the flat numbers and strings that trackers take."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str)) else str(value)
    return flat


def parse(arguments: list[str]) -> PretrainConfig:
    """`PRESET [--field value ...]`; `PRESET --help` lists the fields."""
    names = ", ".join(PRESETS)
    if not arguments or arguments[0] not in PRESETS:
        seen = repr(arguments[0]) if arguments else "nothing"
        raise SystemExit(f"The first word is the preset, one of: {names}; got {seen}.\n{__doc__}")
    return tyro.cli(PretrainConfig, default=PRESETS[arguments[0]](), args=arguments[1:], prog="training.pretrain")


if __name__ == "__main__":
    pretrain(parse(sys.argv[1:]))
