"""What a pretraining run consists of: frozen dataclasses, and presets as functions that return one.

A preset's name is the first word of the command: `python -m training.pretrain nano --output-dir runs/a
--data.files DIR`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .masking import MaskingConfig


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from."""

    files: tuple[str, ...] = ()
    """Parquet files, globs or folders."""
    image_column: str = "image"
    captions: dict[str, str] = field(default_factory=dict)
    """Language -> column of one caption or a list of captions per image; the scenes' columns unless given."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """Share of each language in every global batch; equal shares unless given (the paper's corpus is about 1:1)."""
    augment: Literal["none", "crop"] = "none"
    """`crop`: random resized crop of 0.8 to 1.0 of the area, as the official training transform does."""
    flip: bool = False
    """Mirror half of the images; wrong for captions that say left and right."""
    neighbours: int = 1
    """Rows of the files that stay together when shuffled, so that hard negatives meet in one batch: 4 for scenes."""
    num_workers: int = 1
    """Decoding processes per rank; 0 decodes in the training process."""

    @property
    def caption_columns(self) -> dict[str, str]:
        # Not the field's default: tyro makes a fixed option of each key of a default, and no language could be added.
        return self.captions or {"en": "captions_en", "zh": "captions_zh"}


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "lamb"] = "lamb"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    warmup_steps: int = 100
    """Linear warm-up from 0, then cosine to `min_lr_ratio` times `lr` at the last step."""
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = L_ITC + `cmim_weight` L_CMIM + `cmlm_weight` L_CMLM (paper, section 2). With weight 0 a loss is left out."""

    cmlm_weight: float = 0.3
    """Cross-modal masked language modelling: words from the image and the rest of the text."""
    cmim_weight: float = 0.3
    """Cross-modal masked image modelling: patches from the text and the rest of the image."""
    masking: MaskingConfig = MaskingConfig()

    @property
    def masks(self) -> bool:
        """Whether any masked loss counts, so that the model needs the pretraining heads."""
        return bool(self.cmlm_weight or self.cmim_weight)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation while training, by the same functions as `python -m eval`."""

    every: int = 0
    """Steps between evaluations; 0 turns them off. The last step is always evaluated otherwise."""
    scenes: str | None = None
    """A folder written by `training.scenes`: retrieval on its validation split."""
    retrieval: tuple[str, ...] = ()
    """Parquet files with the training data's columns: retrieval on them."""
    limit: int = 500
    """Images used at most."""


@dataclass(frozen=True)
class PretrainConfig:
    """One run. A field is here only if it changes a result or where it is written."""

    output_dir: str = ""
    size: str = "nano"
    """A name of `modeling_m2encoder.SIZES`."""
    init_from: str | None = None
    """Continue from the weights and the processor of this folder or Hub id, instead of `size` and a new tokenizer."""
    tokenizer: str | None = None
    """A tokenizer folder; without it one is trained on the captions (see `vocab_size`)."""
    vocab_size: int = 2000
    drop_path_rate: float = 0.0
    gradient_checkpointing: bool = False

    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    batch_size: int = 256
    """Pairs per optimizer step over all processes; each process takes an equal share."""
    steps: int = 1000
    seed: int = 0
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """`auto`: bf16 on an accelerator that supports it, fp32 otherwise (bf16 on a CPU without AMX is slower than
    fp32)."""
    log_every: int = 10
    trackers: tuple[str, ...] = ()
    """Accelerate trackers beside `log.jsonl`, e.g. tensorboard, wandb, trackio."""

    def check(self, num_processes: int) -> None:
        """Refuses impossible settings before anything is written.

        Raises:
            ValueError: naming the setting and what to do.
        """
        if not self.output_dir:
            raise ValueError("Say where to write: --output-dir runs/NAME.")
        if not self.data.files:
            raise ValueError("Say what to train on: --data.files FILES (parquet files, globs or folders).")
        for name in ("cmlm_weight", "cmim_weight"):
            if getattr(self.objective, name) < 0:
                raise ValueError(f"objective.{name} must be 0 or more, got {getattr(self.objective, name)}.")
        for name in ("batch_size", "steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % num_processes:
            raise ValueError(
                f"batch_size {self.batch_size} is over all processes and must be a multiple of their number "
                f"({num_processes}); the nearest are {self.batch_size // num_processes * num_processes} and "
                f"{(self.batch_size // num_processes + 1) * num_processes}."
            )
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: with one pair there is nothing to contrast it with.")
        if not 0 <= self.optimizer.warmup_steps <= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps must lie in [0, steps = {self.steps}], got {self.optimizer.warmup_steps}."
            )
        if self.evaluation.every and not (self.evaluation.scenes or self.evaluation.retrieval):
            raise ValueError("evaluation.every needs data: --evaluation.scenes DIR or --evaluation.retrieval FILES.")


def nano() -> PretrainConfig:
    """The smallest model, trained on scenes in minutes on two CPU cores; what `make quickstart` runs."""
    return PretrainConfig(
        # AdamW learns several times faster than LAMB in the few hundred steps there are (docs/log.md).
        optimizer=OptimizerConfig(name="adamw", lr=1e-3, warmup_steps=100),
        # Beside ITC, L_CMLM alone halves the steps that these minutes have (docs/log.md).
        objective=ObjectiveConfig(cmlm_weight=0.0, cmim_weight=0.0),
        batch_size=128,
        steps=1200,
        data=DataConfig(neighbours=4),  # a family of scenes, see training/scene_families.py
    )


def nano_smoke() -> PretrainConfig:
    """`nano` for a few steps, to see that everything runs."""
    preset = nano()
    return dataclasses.replace(
        preset,
        batch_size=16,
        steps=4,
        vocab_size=500,
        log_every=1,
        optimizer=dataclasses.replace(preset.optimizer, warmup_steps=2),
        data=dataclasses.replace(preset.data, num_workers=0),
    )


PRESETS: dict[str, Callable[[], PretrainConfig]] = {"nano": nano, "nano_smoke": nano_smoke}
