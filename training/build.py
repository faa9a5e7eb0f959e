"""The parts of a pretraining run: its process's Accelerator, its folder, processor, model with optimizer, and data."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor, AutoTokenizer

from modeling_m2encoder import (
    M2EncoderForPreTraining,
    M2EncoderImageProcessorPil,
    M2EncoderModel,
    M2EncoderProcessor,
)

from .checkpoint import Checkpoint
from .configs import ObjectiveConfig, PretrainConfig, flat_settings
from .data import BatchStream, CaptionDataset, StreamedSource, batches, open_source
from .masking import Masker, describe_vocabulary
from .optim import build_optimizer
from .preflight import plan
from .schedule import Phase, Sharing, delink, share_layers
from .sharding import Distributed, distribute
from .tokenizer import train_tokenizer

# Enough for any vocabulary of a few thousand pieces; learning one takes 0.1 ms per caption.
TOKENIZER_CAPTIONS = 100_000


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """The Accelerator of this process, on the CPU where there is no accelerator."""
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        log_with=list(config.trackers) or None,
        project_dir=config.output_dir,
    )
    if config.sharding.strategy != "ddp" and not dist.is_initialized():
        # Without a launcher: a group of one, so that every strategy can be tried in a single process.
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if config.trackers:
        values = flat_settings(config).items()
        accelerator.init_trackers("m2encoder", config={k: v if _is_plain(v) else str(v) for k, v in values})
    return accelerator


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str))


def gpus_per_node() -> int:
    """Processes on this node, as torchrun and accelerate tell them; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def print_plan(config: PretrainConfig, accelerator: Accelerator) -> None:
    """Says on the main process what the run will do and need.

    Raises:
        ValueError: for what cannot work on these GPUs, see `training.preflight.plan`.
    """
    on_gpu = accelerator.device.type == "cuda"
    memory = torch.cuda.get_device_properties(accelerator.device).total_memory if on_gpu else None
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    made = plan(
        config,
        world_size=accelerator.num_processes,
        gpus_per_node=gpus_per_node(),
        gpu_memory=memory,
        compute_dtype=dtype,
    )
    if accelerator.is_main_process:  # not accelerator.print, which speaks once per node
        print(made)


def claim_output_dir(config: PretrainConfig, accelerator: Accelerator, checkpoint: Checkpoint | None) -> IO[str] | None:
    """Makes the run's folder, locks it and writes its settings.

    Args:
        checkpoint: what the run goes on from.

    Returns:
        On the main process what holds the lock until it is closed or the process ends, however it ends.

    Raises:
        ValueError: for a folder that holds a run already, unless this goes on from its checkpoint, or `resume` is
            "auto" and the run died before its first checkpoint; or for one that a living process writes to.
    """
    output_dir = Path(config.output_dir)
    finished = (output_dir / "model").exists()
    taken = finished or any((output_dir / name).exists() for name in ("log.jsonl", "checkpoints"))
    accelerator.wait_for_everyone()  # all look before one writes
    own = checkpoint is not None and checkpoint.path.resolve().parent == (output_dir / "checkpoints").resolve()
    died_early = checkpoint is None and config.resume == "auto" and not finished
    if taken and not own and not died_early:
        raise ValueError(
            f"{output_dir} already holds a run: choose another --output-dir, delete it, or go on from its newest "
            "checkpoint with --resume auto."
        )
    lock = None
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(output_dir / ".lock")
    if not any(gather_object([lock is not None])):
        raise ValueError(
            f"Another process still writes to {output_dir}: end it first. (A torchrun that is killed outright leaves "
            "its processes running.)"
        )
    if accelerator.is_main_process:
        text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
        (output_dir / "config.json").write_text(text + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    return lock


def _lock(path: Path) -> IO[str] | None:
    """The locked file; None if another process has it. Of this process alone: forked loaders do not keep it."""
    file = path.open("w", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        # A file system without locks: better unguarded than not at all.
    return file


# ---- Processor and model


def build_processor(
    config: PretrainConfig,
    captions: Callable[[], Iterable[str]],
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> M2EncoderProcessor:
    """The processor of `init_from`, or one of `size` with the given tokenizer or one learned from the captions."""
    if config.init_from:
        return AutoProcessor.from_pretrained(config.init_from)
    folder = Path(config.tokenizer) if config.tokenizer else Path(config.output_dir) / "tokenizer"
    if checkpoint and not config.tokenizer:
        folder = checkpoint.path.parents[1] / "tokenizer"
    elif not config.tokenizer:
        if accelerator.is_main_process:
            train_tokenizer(itertools.islice(captions(), TOKENIZER_CAPTIONS), config.vocab_size).save_pretrained(folder)
        accelerator.wait_for_everyone()
    side = config.model_config().image_size
    image_processor = M2EncoderImageProcessorPil(size={"height": side, "width": side})
    return M2EncoderProcessor(image_processor, AutoTokenizer.from_pretrained(str(folder)))


def build_model(config: PretrainConfig, processor: M2EncoderProcessor, on_meta: bool = False) -> M2EncoderModel:
    """The model of `init_from`, or a new one of `size`, in fp32, with what no loss uses frozen.

    Args:
        on_meta: without values, for a rank that is given rank 0's (`training.sharding.distribute`).
    """
    objective, tokenizer = config.objective, processor.tokenizer
    if config.init_from and not on_meta:
        auto_class = AutoModelForPreTraining if objective.masks else AutoModel
        model = auto_class.from_pretrained(config.init_from, config=config.model_config(), dtype=torch.float32)
    else:
        of_tokenizer = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "mask_token_id": tokenizer.mask_token_id,
        }
        model_config = config.model_config(**({} if config.init_from else of_tokenizer))
        with torch.device("meta") if on_meta else nullcontext():
            model = (M2EncoderForPreTraining if objective.masks else M2EncoderModel)(model_config)
    if objective.masks:
        _freeze_unused(model, objective)
    return model


def _freeze_unused(model: M2EncoderForPreTraining, objective: ObjectiveConfig) -> None:
    """Parameters without a gradient would keep DDP waiting for them."""
    heads = model.pretraining_heads
    unused: list[Any] = []
    if not objective.cmlm_weight:
        unused += [heads.image_to_text_decoder, heads.text_head]
    if not objective.cmim_weight:
        unused += [heads.text_to_image_decoder, heads.pixel_head, heads.mask_token]
    for module in unused:
        module.requires_grad_(False)


@dataclass(frozen=True)
class Trainee:
    """A model on its ranks, and what trains it."""

    distributed: Distributed
    optimizer: torch.optim.Optimizer
    sharing: Sharing

    def with_sharing(
        self, sharing: Sharing, config: PretrainConfig, processor: M2EncoderProcessor, accelerator: Accelerator
    ) -> Trainee:
        """The same trainee, its layers delinked where `sharing` no longer asks for sharing them."""
        if sharing == self.sharing:
            return self
        fresh = build_trainee(config, processor, accelerator, sharing)
        delink(self.distributed.module, self.optimizer, fresh.distributed.module, fresh.optimizer)
        return fresh


def build_trainee(
    config: PretrainConfig, processor: M2EncoderProcessor, accelerator: Accelerator, sharing: Sharing
) -> Trainee:
    """The model spread over all ranks, in training mode, and its optimizer."""
    # Outputs are views in places (states of [CLS]); nothing here changes them in place, which the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    model = build_model(config, processor, on_meta=not accelerator.is_main_process)
    share_layers(model, sharing)
    distributed = distribute(
        model.train(),
        config.sharding,
        device=accelerator.device,
        mixed_precision=accelerator.mixed_precision,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    settings = config.optimizer
    optimizer = build_optimizer(
        distributed.module, settings.name, settings.lr, settings.betas, settings.eps, settings.weight_decay
    )
    return Trainee(distributed, optimizer, sharing)


# ---- Data


def open_pairs(config: PretrainConfig) -> CaptionDataset | StreamedSource:
    """What `config.data` names.

    Raises:
        ValueError: for missing files or columns.
    """
    streaming: dict[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False}
    return open_source(
        config.data.files,
        image_column=config.data.image_column,
        captions=config.data.caption_columns,
        streaming=streaming[config.data.streaming],
    )


def open_stream(
    config: PretrainConfig,
    source: CaptionDataset | StreamedSource,
    processor: M2EncoderProcessor,
    accelerator: Accelerator,
    phase: Phase,
    position: Mapping[str, Any] | None,
) -> BatchStream:
    """This rank's batches of a phase and those after it.

    A rank takes the same consecutive part of each global batch whatever k is, and so does a group of consecutive ranks:
    k changes neither a step's pairs nor which of them are contrasted.

    Args:
        position: of a stream that this one goes on from.
    """
    settings = config.data
    stream = batches(
        source,
        processor,
        seed=config.seed,
        global_batch_size=config.batch_size,
        # Not through accelerator.prepare: the stream already gives each process its own share of every batch.
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_steps=config.steps,
        num_workers=settings.num_workers,
        language_weights=settings.language_weights or None,
        augment=settings.augment,
        flip=settings.flip,
        draft=settings.draft,
        neighbours=settings.neighbours,
        shuffle_window=settings.shuffle_window,
        masker=build_masker(config, processor, phase),
    )
    if position is not None:
        stream.load_state_dict(position)
    stream.set_image_size(phase.image_size)
    return stream


def build_masker(config: PretrainConfig, processor: M2EncoderProcessor, phase: Phase) -> Masker | None:
    """What draws the masks of the losses that have a weight, and the patches that are dropped; None if there are
    none."""
    objective = config.objective
    if not objective.masks and not phase.drop_patches:
        return None
    return Masker(
        objective.masking,
        describe_vocabulary(processor.tokenizer) if objective.cmlm_weight else None,
        config.model_config().num_patches,
        masks_images=bool(objective.cmim_weight),
        drop_patches=phase.drop_patches,
    )
