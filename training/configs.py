"""What a pretraining run consists of: frozen dataclasses, and presets as functions that return one.

A preset's name is the first word of the command: `python -m training.pretrain nano --output-dir runs/a
--data.files DIR`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoConfig

from modeling_m2encoder import M2EncoderConfig

from .bank import BankPlan
from .images import Augmentation
from .masking import MaskingConfig
from .publish import check_repo_id
from .schedule import Phase, ScheduleConfig, plan_banks, plan_phases
from .sharding import ShardingConfig

# Pairs seen in the paper's pretraining, of either size.
PAPER_SAMPLES = 9_000_000_000


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from."""

    files: tuple[str, ...] = ()
    """Parquet or tar shards: local paths, globs and folders, URLs, ids on the Hub, see `training.data.open_source`."""
    streaming: Literal["auto", "on", "off"] = "auto"
    """Read in order with a window shuffled, for what cannot be indexed; `auto`: all but local parquet files."""
    shuffle_window: int = 4096
    """Undecoded samples that each worker shuffles together when streaming."""
    draft: bool = True
    """Decode JPEGs that are much larger than the training images at a fraction of their size: twice as fast, a grey
    level off."""
    image_column: str = "image"
    captions: dict[str, str] = field(default_factory=dict)
    """Language -> column of one caption or a list of captions per image; the scenes' columns unless given."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """Share of each language in every global batch; equal shares unless given (the paper's corpus is about 1:1)."""
    augment: Augmentation = "none"
    """`crop`: random resized crop of 0.8 to 1.0 of the area; `official`: the published training transform, a crop, a
    flip and RandAugment."""
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
    decoder_context: Literal["tokens", "cls"] = "tokens"
    """What the decoders see of the other modality: all its states, or only its [CLS]. The paper names both."""
    normalize_pixels: bool = True
    """CMIM predicts each patch normalised to its own mean and variance (MAE) instead of the pixels as they enter."""

    @property
    def masks(self) -> bool:
        """Whether any masked loss counts, so that the model needs the pretraining heads."""
        return bool(self.cmlm_weight or self.cmim_weight)


@dataclass(frozen=True)
class ITCConfig:
    """Grouped-ITC and GBA-ITC (paper, section 2.3; `training.bank`): which pairs contrast with each other.

    With n GPUs, `PretrainConfig.batch_size` = n * B * k pairs make one optimizer step and N = g * B * k pairs one loss.
    At most one of the first three says how many GPUs g a group has; with none of them all GPUs are one group.
    """

    group_size: int | None = None
    """g, in GPUs of consecutive ranks."""
    group_nodes: int | None = None
    """g, in nodes (`aggregate_nodes` in the official code)."""
    bank_size: int | None = None
    """N, "batch size of GBA-ITC" in Table 10; g follows."""
    bank_steps: int = 1
    """k, micro-batches in one loss. Changes neither the pairs of a step nor its loss, only memory and time."""
    retain: int = 1
    """Micro-batches whose graphs are kept, 0 to k; the others run twice. k is the paper's single backward pass."""
    tile: int = 1024
    """Rows and columns of similarities that exist at a time."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a killed run can go on from: `OUTPUT_DIR/checkpoints/step_00000100`."""

    every: int = 0
    """Optimizer steps between checkpoints (and one after the last step); 0 writes none."""
    keep: int = 2
    """Checkpoints kept, the newest ones; at least 2 let a damaged newest one fall back."""


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
    itc: ITCConfig = ITCConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    sharding: ShardingConfig = ShardingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: str = "none"
    """`auto`: go on from the newest whole checkpoint in `output_dir`, or begin if there is none. A path: from that
    checkpoint. `none`: begin, in a folder without a run."""

    batch_size: int = 256
    """Pairs per optimizer step over all processes, n * B * k; each process takes an equal share of it and runs it in
    `itc.bank_steps` micro-batches."""
    steps: int = 1000
    seed: int = 0
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """`auto`: bf16 on an accelerator that supports it, fp32 otherwise (bf16 on a CPU without AMX is slower than
    fp32)."""
    log_every: int = 10
    trackers: tuple[str, ...] = ()
    """Accelerate trackers beside `log.jsonl`, e.g. tensorboard, wandb, trackio."""
    push_to_hub: str | None = None
    """Publish the finished model there, NAMESPACE/NAME, as `python -m conversion.push` does."""
    push_private: bool = False
    """Make that repository a private one."""

    def check(self, num_processes: int, gpus_per_node: int = 1) -> tuple[tuple[Phase, ...], tuple[BankPlan, ...]]:
        """Refuses impossible settings before anything is written; gives the phases of the run and the bank of each.

        Args:
            num_processes: n, processes in all, one per GPU.
            gpus_per_node: those of one node, for `itc.group_nodes`.

        Raises:
            ValueError: naming the setting and what to do.
        """
        if not self.output_dir:
            raise ValueError("Say where to write: --output-dir runs/NAME.")
        if not self.data.files:
            raise ValueError("Say what to train on: --data.files FILES (parquet or tar files, globs, folders, URLs).")
        for name in ("cmlm_weight", "cmim_weight"):
            if getattr(self.objective, name) < 0:
                raise ValueError(f"objective.{name} must be 0 or more, got {getattr(self.objective, name)}.")
        for name in ("batch_size", "steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: with one pair there is nothing to contrast it with.")
        if not 0 <= self.optimizer.warmup_steps <= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps must lie in [0, steps = {self.steps}], got {self.optimizer.warmup_steps}."
            )
        if self.evaluation.every and not (self.evaluation.scenes or self.evaluation.retrieval):
            raise ValueError("evaluation.every needs data: --evaluation.scenes DIR or --evaluation.retrieval FILES.")
        if self.push_to_hub is not None:
            check_repo_id(self.push_to_hub)
        if self.checkpoint.every < 0 or self.checkpoint.keep < 1:
            raise ValueError(
                "checkpoint.every must be 0 or more and checkpoint.keep 1 or more, got "
                f"{self.checkpoint.every} and {self.checkpoint.keep}."
            )
        sharding = self.sharding
        if sharding.strategy in ("hsdp", "hpz") and sharding.shard_size is None:
            sharding = dataclasses.replace(sharding, shard_size=gpus_per_node)
        sharding.check(num_processes)
        return self._check_phases(num_processes, gpus_per_node)

    def _check_phases(self, num_processes: int, gpus_per_node: int) -> tuple[tuple[Phase, ...], tuple[BankPlan, ...]]:
        itc, model = self.itc, self.model_config()
        phases = plan_phases(
            self.schedule,
            steps=self.steps,
            image_size=model.image_size,
            patch_size=model.patch_size,
            bank_steps=itc.bank_steps,
        )
        banks = plan_banks(
            phases,
            num_processes,
            batch_size=self.batch_size,
            group_size=itc.group_size,
            group_nodes=itc.group_nodes,
            bank_size=itc.bank_size,
            gpus_per_node=gpus_per_node,
        )
        smallest = min(bank.bank_steps for bank in banks)
        if not 0 <= itc.retain <= smallest:
            raise ValueError(f"itc.retain must lie in [0, bank_steps = {smallest}], got {itc.retain}.")
        if itc.tile < 1:
            raise ValueError(f"itc.tile must be at least 1, got {itc.tile}.")
        return phases, banks

    def model_config(self, **values: Any) -> M2EncoderConfig:
        """Of the model that will be trained; `values` come from the tokenizer, where there is one already.

        Raises:
            ValueError: for a size that does not exist.
        """
        values |= {
            "drop_path_rate": self.drop_path_rate,
            "decoder_context": self.objective.decoder_context,
            "normalize_pixels": self.objective.normalize_pixels,
        }
        if self.init_from:
            return AutoConfig.from_pretrained(self.init_from, **values)
        # The default ids are those of the published tokenizer, which a small vocabulary does not have.
        unknown = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"))
        return M2EncoderConfig.from_size(self.size, **{**unknown, **values})


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
    return _smoke(nano())


def base_0_4b() -> PretrainConfig:
    """The 0.4B model with the settings that the paper gives.

    The paper's: 131,072 pairs per optimizer step and 32,768 per contrastive loss, LAMB with betas 0.9 and 0.98, epsilon
    1e-6 and weight decay 0.05 (Table 10); 9 B samples in all; the weights 0.3 of both masked losses (section 2). From
    the official code: 224-pixel images and their training transform, which also flips them, captions of left and right
    or not; and whole-word masking.
    Ours, because neither says it or nobody here has seen it: learning rate, warm-up and decay, clipping of gradients,
    masking ratios (see `MaskingConfig`), sharding and `bank_steps`.
    """
    return PretrainConfig(
        size="0.4B",
        vocab_size=115_244,
        optimizer=OptimizerConfig(name="lamb", lr=1e-3, warmup_steps=2_000),
        itc=ITCConfig(bank_size=32_768),
        checkpoint=CheckpointConfig(every=500, keep=3),
        resume="auto",
        data=DataConfig(augment="official", num_workers=8),
        gradient_checkpointing=True,  # the activations of 512 pairs per GPU do not fit otherwise (training.preflight)
        batch_size=131_072,
        steps=_steps_of(PAPER_SAMPLES, 131_072),
        log_every=20,
    )


def large_1b() -> PretrainConfig:
    """The 1B model; as `base_0_4b`, with the model and optimizer sharded inside each node."""
    preset = base_0_4b()
    return dataclasses.replace(
        preset,
        size="1B",
        itc=dataclasses.replace(preset.itc, bank_steps=2),
        sharding=ShardingConfig(strategy="hsdp"),
    )


def huge_10b() -> PretrainConfig:
    """The 10B model; as `large_1b`, with the 143,360 pairs per optimizer step of Table 10.

    Table 10's 32,768 pairs per loss do not divide 143,360 (4.375). 35,840 pairs, which make four groups, are the
    nearest that do, and ours.
    """
    preset = large_1b()
    return dataclasses.replace(
        preset,
        size="10B",
        itc=dataclasses.replace(preset.itc, bank_size=35_840, bank_steps=4),
        batch_size=143_360,
        steps=_steps_of(PAPER_SAMPLES, 143_360),
    )


def base_0_4b_smoke() -> PretrainConfig:
    """`base_0_4b` with nano's model, for a few steps."""
    return _smoke(base_0_4b())


def large_1b_smoke() -> PretrainConfig:
    """`large_1b` with nano's model, for a few steps."""
    return _smoke(large_1b())


def huge_10b_smoke() -> PretrainConfig:
    """`huge_10b` with nano's model, for a few steps."""
    return _smoke(huge_10b())


def _smoke(preset: PretrainConfig) -> PretrainConfig:
    """Four steps of nano's model along the code path of a preset, on one CPU process or any even number of them."""
    grouped, sharding = preset.itc.bank_size is not None, preset.sharding
    if sharding.strategy == "hsdp":  # which needs four processes; in one group it is this
        sharding = dataclasses.replace(sharding, strategy="fsdp")
    return dataclasses.replace(
        preset,
        size="nano",
        batch_size=16,
        steps=4,
        vocab_size=500,
        log_every=1,
        optimizer=dataclasses.replace(preset.optimizer, warmup_steps=2),
        # A GPU per group instead of a bank's size: as many groups as processes, and a single process has one.
        itc=dataclasses.replace(preset.itc, bank_size=None, group_size=1 if grouped else None),
        sharding=sharding,
        checkpoint=dataclasses.replace(preset.checkpoint, every=2 if preset.checkpoint.every else 0),
        data=dataclasses.replace(preset.data, num_workers=0),
    )


def _steps_of(samples: int, batch_size: int) -> int:
    return -(-samples // batch_size)


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    preset.__name__: preset
    for preset in (
        nano,
        nano_smoke,
        base_0_4b,
        base_0_4b_smoke,
        large_1b,
        large_1b_smoke,
        huge_10b,
        huge_10b_smoke,
    )
}


def flat_settings(config: PretrainConfig) -> dict[str, Any]:
    """The settings as one level of JSON values: {"data.files": [...], "steps": 1000, ...}."""

    def flatten(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in settings.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield prefix + name, list(value) if isinstance(value, tuple) else value

    return dict(flatten(dataclasses.asdict(config), ""))
