"""What changes in the course of a run: image size (ReCLIP), dropped patches (FLIP), layers shared and then delinked.

Tested by `pytest tests/training/test_schedule.py`. The loop asks `plan_phases` once and takes the phases in turn; all
else is a function of the step's number and the settings, so that a resumed run needs nothing but its step.

Resolution (ReCLIP, arXiv 2304.06028; CLIPA, arXiv 2305.07017). The position table always has the grid of
`config.image_size`; on small images the model reads it resized, on the fly (`interpolate_pos_encoding=True`). The
alternative, a small table that is resized at the switch together with the optimizer's moments, was not taken: bicubic
resizing there and back is not the identity, Adam's second moments do not resize (a variance is no smooth map of
places), a checkpoint of an early phase would need a configuration of its own, and every wrapper (DDP, FSDP) would have
to be rebuilt. Here the switch changes no parameter and no moment: at either size the model computes the same function
before and after it, at its own size without any resizing, and a folder exported from any phase is an ordinary one. The
price: what the coarse grid cannot see of the table (its fine detail) stays as it was initialised until the last phase.

Sharing and delinking (M6-10T, arXiv 2110.03888; Yang et al., arXiv 2110.12661). One layer's weights serve all depths
of a stack: of the vision experts, of the text experts, of the shared upper layers; drop-path rates stay those of the
depths. Delinking gives each depth a copy of its own.

Patch dropping (FLIP, arXiv 2212.00794) is drawn with the masks, by `training.masking.Masker`, from each pair's own
generator: the batch carries `kept_patches`, so that a bank that runs a micro-batch twice drops the same patches twice.

Shapes: k micro-batches of a bank, N pairs in one loss, U uses of a shared parameter.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modeling_m2encoder import M2EncoderModel

from .bank import BankPlan, plan_bank

Sharing = Literal["none", "layer", "attn"]

# How each entry of an optimizer's state follows from the shared one, as a power of 1/U; see `delink`.
_MOMENT_POWERS = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
# What wrappers put into the names of parameters: DDP, torch.compile, activation checkpointing.
_WRAPPER_NAMES = ("module", "_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class SharingConfig:
    """Stage one of M6-10T's "pseudo-to-real" training."""

    mode: Sharing = "none"
    """`layer`: one layer per stack serves all its depths. `attn`: only its self-attention does."""
    until: float = 0.5
    """Where the layers are delinked: a fraction of the run up to 1, a step above 1."""
    rewarm_steps: int = 0
    """Steps over which the learning rate climbs back to its schedule after the delinking."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Phases of a run, one entry of each tuple per phase; an empty tuple leaves that setting alone.

    ReCLIP: `until=(0.9, 1.0), image_size=(112, 224), rewarm_steps=(0, 500)`. FLIP with its unmasked tuning:
    `until=(0.95, 1.0), drop_patches=(0.5, 0.0)`.
    """

    until: tuple[float, ...] = (1.0,)
    """Where each phase ends: a fraction of the run up to 1, a step above 1. The last is 1 or the run's last step."""
    image_size: tuple[int, ...] = ()
    """Side of the training images in pixels, a multiple of the patch size; else that of the model's configuration."""
    drop_patches: tuple[float, ...] = ()
    """Part of each image's patches that its contrastive features do without, in [0, 1); the class token stays."""
    bank_steps: tuple[int, ...] = ()
    """k of each phase; else the run's. The bank N and the batch stay: small images fit with fewer, larger micro-
    batches."""
    rewarm_steps: tuple[int, ...] = ()
    """Steps over which the learning rate climbs back to its schedule; 0 for the first phase, which has the warm-up."""
    sharing: SharingConfig = SharingConfig()


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with the same settings. A delinking begins a phase of its own."""

    first_step: int
    """Updates are numbered from 1, as in `training.optim.warmup_cosine`."""
    last_step: int
    image_size: int
    drop_patches: float
    bank_steps: int
    sharing: Sharing
    rewarm_steps: int

    def __contains__(self, step: int) -> bool:
        return self.first_step <= step <= self.last_step

    def lr_factor(self, step: int) -> float:
        """On top of the run's learning-rate schedule: i / `rewarm_steps` at the i-th step of the phase, up to 1."""
        return min(1.0, (step - self.first_step + 1) / max(self.rewarm_steps, 1))


def plan_phases(
    schedule: ScheduleConfig, *, steps: int, image_size: int, patch_size: int, bank_steps: int = 1
) -> tuple[Phase, ...]:
    """The phases of a run of `steps` updates, in order and without gaps.

    Args:
        steps: updates of the whole run.
        image_size, patch_size: of the model's configuration, in pixels.
        bank_steps: the run's k.

    Raises:
        ValueError: for tuples of different lengths, ends that do not rise or do not reach the last step, an image size
            that is no multiple of the patch size, patches of which none would be kept, or a re-warm longer than its
            phase.
    """
    ends = _ends(schedule, steps)
    columns = {
        "image_size": schedule.image_size or (image_size,) * len(ends),
        "drop_patches": schedule.drop_patches or (0.0,) * len(ends),
        "bank_steps": schedule.bank_steps or (bank_steps,) * len(ends),
        "rewarm_steps": schedule.rewarm_steps or (0,) * len(ends),
    }
    for name, values in columns.items():
        if len(values) != len(ends):
            raise ValueError(
                f"schedule.{name} {values} must have one entry for each of the {len(ends)} phases that schedule.until "
                f"{schedule.until} makes, or none."
            )
    phases, first = [], 1
    for i, end in enumerate(ends):
        settings = {name: values[i] for name, values in columns.items()}
        phases.append(Phase(first, end, sharing="none", **settings))
        first = end + 1
    phases = _split_at_delinking(phases, schedule.sharing, steps)
    for phase in phases:
        _check_phase(phase, patch_size)
    return tuple(phases)


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase of update number `step`.

    Raises:
        ValueError: for a step outside of the run.
    """
    for phase in phases:
        if step in phase:
            return phase
    raise ValueError(f"Step {step} lies outside of the run's steps, 1 to {phases[-1].last_step}.")


def plan_banks(phases: tuple[Phase, ...], world_size: int, **settings: Any) -> tuple[BankPlan, ...]:
    """Each phase's plan: the same batch and bank N in all, k of the phase, hence its own batch per GPU.

    Args:
        settings: of `training.bank.plan_bank`, without `bank_steps`.

    Raises:
        ValueError: when a phase's k does not fit, with the nearest legal settings.
    """
    plans = []
    for phase in phases:
        try:
            plans.append(plan_bank(world_size, bank_steps=phase.bank_steps, **settings))
        except ValueError as error:
            raise ValueError(f"Steps {phase.first_step} to {phase.last_step}: {error}") from None
    assert len({plan.bank_size for plan in plans}) == 1, "N = g * batch / n does not depend on k"
    return tuple(plans)


# ---- Sharing -------------------------------------------------------------------------------------------------------


def share_layers(model: M2EncoderModel, mode: Sharing) -> None:
    """Lets the first layer of each stack serve all its depths, in place: the other depths' weights are dropped.

    Before the model is wrapped and its optimizer built. `state_dict()` then repeats each shared parameter under the
    name of every depth, so that it loads into the unshared class; `parameters()` has it once. The model's
    `save_pretrained` writes the ordinary unshared folder.

    Args:
        mode: "none" does nothing; "layer" shares whole layers, "attn" their self-attention.

    Raises:
        ValueError: for another mode.
    """
    if mode not in get_args(Sharing):
        raise ValueError(f"mode must be one of {get_args(Sharing)}, got {mode!r}.")
    encoder = model.encoder
    slots = [(layer, name) for layer in encoder.layers for name in layer]
    slots += [(encoder.upper_layers, str(i)) for i in range(len(encoder.upper_layers))]
    first: dict[str, nn.Module] = {}
    for holder, name in slots:
        kind = "upper" if holder is encoder.upper_layers else name
        layer = holder.get_submodule(name)
        original = first.setdefault(kind, layer)
        if mode == "layer":
            holder.register_module(name, original)
        elif mode == "attn":
            layer.self_attn = original.self_attn


def delink(model: nn.Module, optimizer: Optimizer, fresh_model: nn.Module, fresh_optimizer: Optimizer) -> None:
    """Carries a run with shared layers over into an unshared model, which then computes the same function.

    A new model rather than new layers in the old one: DDP and FSDP know their parameters from the moment they wrap.
    Build the fresh pair as the first one was built, wrappers included, but without `share_layers`. Sharded parameters
    are copied shard by shard. `named_parameters` must agree apart from the sharing.

    The moments. A shared parameter's gradient is the sum over its U uses, G = g_1 + ... + g_U, and each depth will see
    g_l alone. By linearity the running means of the g_l sum up to that of G, so `exp_avg` is divided by U: each depth
    gets their average. `exp_avg_sq` is divided by U**2, as if every use had contributed G / U: the next step then has
    the shared run's direction and length, and the step count (the bias correction) goes on. It is the smallest value
    that fits (a mean of squares is at least the square of the mean): where the depths' gradients disagree their true
    second moments are up to U times larger, and until 1 / (1 - beta2) steps have replaced it, updates may be up to
    sqrt(U) times too long. `SharingConfig.rewarm_steps` is there for that.

    Args:
        model, optimizer: the pair with shared layers; not changed.
        fresh_model, fresh_optimizer: the pair without; its weights and its state are overwritten.

    Raises:
        ValueError: when the two do not have the same names, or an optimizer keeps state that is not known here.
    """
    old, new = _named_parameters(model), _named_parameters(fresh_model)
    if old.keys() != new.keys():
        raise ValueError(
            f"delink needs the same model without sharing; only one of them has: {sorted(old.keys() ^ new.keys())[:5]}."
        )
    uses: dict[Tensor, int] = defaultdict(int)
    for parameter in old.values():
        uses[parameter] += 1
    with torch.no_grad():
        for name, parameter in new.items():
            source = old[name]
            parameter.copy_(source)
            state = optimizer.state.get(source)
            if state:
                fresh_optimizer.state[parameter] = _delinked_state(state, parameter, uses[source])


def _delinked_state(state: dict[str, Tensor], parameter: Tensor, uses: int) -> dict[str, Tensor]:
    unknown = state.keys() - _MOMENT_POWERS.keys()
    if unknown:
        raise ValueError(f"delink does not know how to divide the optimizer's {sorted(unknown)} among the depths.")
    moved = {}
    for name, value in state.items():
        scaled = value / uses ** _MOMENT_POWERS[name]
        # Laid out as the parameter (sharding, memory format); the step's number is a tensor of its own.
        moved[name] = scaled if name == "step" else torch.zeros_like(parameter, dtype=value.dtype).copy_(scaled)
    return moved


def _named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every name a parameter has, without the wrappers' parts."""
    named = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named[".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)] = parameter
    return named


# ---- Checks --------------------------------------------------------------------------------------------------------


def _as_step(name: str, until: float, steps: int) -> int:
    """The last step of a stretch of the run: a fraction of it up to 1, a step above 1."""
    end = round(until * steps) if until <= 1 else until
    if not (until > 0 and end == int(end) and 1 <= end <= steps):
        raise ValueError(
            f"schedule.{name} must be a fraction of the run in (0, 1] or one of its {steps} steps, got {until}."
        )
    return int(end)


def _ends(schedule: ScheduleConfig, steps: int) -> list[int]:
    ends = [_as_step("until", until, steps) for until in schedule.until]
    if not ends or ends[-1] != steps or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
        raise ValueError(
            f"schedule.until must rise and end with 1 (the run's {steps} steps), got {schedule.until}, which are the "
            f"steps {ends}."
        )
    return ends


def _split_at_delinking(phases: list[Phase], sharing: SharingConfig, steps: int) -> list[Phase]:
    """The phases up to the delinking share; one that it falls into becomes two."""
    if sharing.mode not in get_args(Sharing):
        raise ValueError(f"schedule.sharing.mode must be one of {get_args(Sharing)}, got {sharing.mode!r}.")
    if sharing.mode == "none":
        return phases
    last = _as_step("sharing.until", sharing.until, steps)
    split = []
    for phase in phases:
        if phase.first_step <= last:
            split.append(dataclasses.replace(phase, last_step=min(phase.last_step, last), sharing=sharing.mode))
        if phase.last_step > last:
            # The delinking's re-warm, unless that of a phase which begins right there is longer.
            rewarm_steps = phase.rewarm_steps if phase.first_step > last else 0
            if phase.first_step <= last + 1:
                rewarm_steps = max(rewarm_steps, sharing.rewarm_steps)
            first_step = max(phase.first_step, last + 1)
            split.append(dataclasses.replace(phase, first_step=first_step, rewarm_steps=rewarm_steps))
    return split


def _check_phase(phase: Phase, patch_size: int) -> None:
    where = f"In steps {phase.first_step} to {phase.last_step}"
    if phase.image_size < 1 or phase.image_size % patch_size:
        low = max(phase.image_size // patch_size, 1) * patch_size
        raise ValueError(
            f"{where} schedule.image_size must be a multiple of the patch size {patch_size}, got {phase.image_size}; "
            f"the nearest are {low} and {low + patch_size}."
        )
    patches = (phase.image_size // patch_size) ** 2
    if not (0 <= phase.drop_patches < 1 and round(phase.drop_patches * patches) < patches):
        raise ValueError(
            f"{where} schedule.drop_patches must lie in [0, 1) and keep one of {patches} patches, got "
            f"{phase.drop_patches}."
        )
    if phase.bank_steps < 1:
        raise ValueError(f"{where} schedule.bank_steps must be at least 1, got {phase.bank_steps}.")
    length = phase.last_step - phase.first_step + 1
    if not 0 <= phase.rewarm_steps <= (length if phase.first_step > 1 else 0):
        raise ValueError(
            f"{where} rewarm_steps must lie in [0, {length}], and be 0 in the first phase, where the run's warm-up is; "
            f"got {phase.rewarm_steps}."
        )
