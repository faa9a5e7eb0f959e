"""Phases by hand; every switch keeps the function, the optimizer's next step is what it should be, and a run resumed
inside any phase is the uninterrupted one; shared layers under every sharding strategy equal one process."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel, AutoModelForPreTraining

from modeling_m2encoder import M2EncoderConfig, M2EncoderForPreTraining, M2EncoderModel
from tests.distributed import run_distributed
from training.bank import MicroBatchOutput, banked_backward
from training.losses import grouped_itc_loss
from training.masking import Masker, MaskingConfig
from training.optim import build_optimizer, warmup_cosine
from training.schedule import (
    Phase,
    ScheduleConfig,
    SharingConfig,
    delink,
    phase_at,
    plan_banks,
    plan_phases,
    share_layers,
)
from training.sharding import Distributed, ShardingConfig, distribute, shared_modules

CONFIG = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_upper_layers": 2,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "projection_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "max_position_embeddings": 16,
    "max_text_length": 14,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "mask_token_id": 2,
}
MODES = ["layer", "attn"]


def build(kind: type[M2EncoderModel] = M2EncoderModel, seed: int = 0, **overrides: Any) -> M2EncoderModel:
    torch.manual_seed(seed)
    return kind(M2EncoderConfig(**{**CONFIG, **overrides})).double().train()


def make_batch(step: int, rows: int = 4, side: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        "input_ids": torch.randint(3, 60, (rows, 7), generator=generator),
        "attention_mask": torch.ones(rows, 7, dtype=torch.long),
        "pixel_values": torch.randn(rows, 3, side, side, generator=generator).double(),
    }


def loss_of(model: nn.Module, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    output = model(**batch, **kwargs)
    return grouped_itc_loss(output.image_embeds, output.text_embeds, model.logit_scale)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, **kwargs: Any) -> None:
    for step in steps:
        loss_of(model, make_batch(step), **kwargs).backward()
        optimizer.step()
        optimizer.zero_grad()


def plan(schedule: ScheduleConfig, steps: int = 100) -> tuple[Phase, ...]:
    return plan_phases(schedule, steps=steps, image_size=224, patch_size=16, bank_steps=4)


# ---- Phases


def test_no_schedule_is_one_phase():
    assert plan(ScheduleConfig()) == (Phase(1, 100, 224, 0.0, 4, "none", 0),)


def test_phases_by_hand():
    """Fractions and steps; the delinking falls into the second phase and makes two of it."""
    schedule = ScheduleConfig(
        until=(0.5, 80, 1.0),
        image_size=(64, 112, 224),
        drop_patches=(0.0, 0.75, 0.0),
        bank_steps=(1, 2, 4),
        rewarm_steps=(0, 5, 10),
        sharing=SharingConfig("layer", until=60, rewarm_steps=7),
    )
    assert plan(schedule) == (
        Phase(1, 50, 64, 0.0, 1, "layer", 0),
        Phase(51, 60, 112, 0.75, 2, "layer", 5),
        Phase(61, 80, 112, 0.75, 2, "none", 7),
        Phase(81, 100, 224, 0.0, 4, "none", 10),
    )


@pytest.mark.parametrize(
    ("until", "rewarm_steps", "expected"),
    [
        (50, 3, [(1, 50, "attn", 0), (51, 100, "none", 5)]),  # together with a phase: the longer re-warm
        (50, 9, [(1, 50, "attn", 0), (51, 100, "none", 9)]),
        (1.0, 0, [(1, 50, "attn", 0), (51, 100, "attn", 5)]),  # never
        (0.3, 2, [(1, 30, "attn", 0), (31, 50, "none", 2), (51, 100, "none", 5)]),
    ],
)
def test_where_the_delinking_falls(until, rewarm_steps, expected):
    schedule = ScheduleConfig(until=(0.5, 1), rewarm_steps=(0, 5), sharing=SharingConfig("attn", until, rewarm_steps))
    assert [(p.first_step, p.last_step, p.sharing, p.rewarm_steps) for p in plan(schedule)] == expected


def test_every_step_has_one_phase():
    phases = plan(ScheduleConfig(until=(0.31, 0.9, 1.0), sharing=SharingConfig("layer", 0.6)))
    for step in range(1, 101):
        assert [phase for phase in phases if step in phase] == [phase_at(phases, step)]
    for step in (0, 101):
        with pytest.raises(ValueError, match="outside of the run's steps, 1 to 100"):
            phase_at(phases, step)


def test_rewarm():
    first, second = plan(ScheduleConfig(until=(0.5, 1.0), rewarm_steps=(0, 4)))
    assert [first.lr_factor(step) for step in (1, 2, 50)] == [1, 1, 1]
    assert [second.lr_factor(step) for step in (51, 52, 53, 54, 55, 100)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_bank_stays_the_same():
    """8 GPUs in groups of 4, 1024 pairs: N = 512 in every phase, of 1, 2 and 4 micro-batches."""
    phases = plan(ScheduleConfig(until=(0.2, 0.6, 1.0), bank_steps=(1, 2, 4)))
    plans = plan_banks(phases, 8, batch_size=1024, group_size=4)
    assert [(p.bank_steps, p.batch_per_gpu, p.bank_size) for p in plans] == [(1, 128, 512), (2, 64, 512), (4, 32, 512)]
    with pytest.raises(ValueError, match=r"Steps 21 to 60: batch_size 1000 .* bank_steps 2 .* nearest are 992 .* 1008"):
        plan_banks(phases, 8, batch_size=1000, group_size=4)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"until": ()}, "must rise and end with 1"),
        ({"until": (0.5, 0.9)}, r"must rise and end with 1 \(the run's 100 steps\)"),
        ({"until": (0.5, 0.5, 1.0)}, r"the steps \[50, 50, 100\]"),
        ({"until": (-0.5, 1.0)}, r"a fraction of the run in \(0, 1\] or one of its 100 steps, got -0.5"),
        ({"until": (0.001, 1.0)}, "got 0.001"),
        ({"until": (1.5, 1.0)}, "got 1.5"),
        ({"until": (float("nan"), 1.0)}, "got nan"),
        ({"until": (0.5, 101)}, "got 101"),
        ({"image_size": (112,)}, "image_size .* one entry for each of the 2 phases"),
        ({"image_size": (100, 224)}, "multiple of the patch size 16, got 100; the nearest are 96 and 112"),
        ({"image_size": (8, 224)}, "got 8; the nearest are 16 and 32"),
        ({"drop_patches": (1.0, 0.0)}, r"lie in \[0, 1\) and keep one of 196 patches, got 1.0"),
        ({"drop_patches": (-0.1, 0.0)}, "got -0.1"),
        ({"drop_patches": (0.5, 0.0), "image_size": (16, 224)}, None),  # round(0.5) of one patch is 0: it stays
        ({"drop_patches": (0.6, 0.0), "image_size": (16, 224)}, "keep one of 1 patches"),
        ({"bank_steps": (0, 1)}, "bank_steps must be at least 1, got 0"),
        ({"rewarm_steps": (5, 0)}, "0 in the first phase"),
        ({"rewarm_steps": (0, 51)}, r"lie in \[0, 50\]"),
        ({"sharing": SharingConfig("layer", 1.5)}, "sharing.until must be a fraction"),
        ({"sharing": SharingConfig("layers")}, "must be one of .*'attn'.*, got 'layers'"),
    ],
)
def test_impossible_schedules(changed, named):
    schedule = replace(ScheduleConfig(until=(0.5, 1.0)), **changed)
    if named is None:
        assert plan(schedule)
        return
    with pytest.raises(ValueError, match=named):
        plan(schedule)


# ---- Resolution


def test_positions_at_the_own_size_are_the_table_itself():
    model, batch = build(), make_batch(0)
    with torch.no_grad():
        plain, asked = (model(**batch, interpolate_pos_encoding=flag).image_embeds for flag in (False, True))
    assert torch.equal(plain, asked)


def test_small_images_teach_the_whole_table():
    """The gradient of the full table is that of the small one, spread by the resizing, whose weights sum up to 1."""
    embeddings = build().encoder.vision_embeddings
    small = embeddings.interpolate_positions(16, 16)
    weights = torch.randn_like(small)
    (small * weights).sum().backward()
    gradient = embeddings.position_embeddings.weight.grad[2:]
    assert torch.equal(gradient[0], weights[0]) and (gradient[1:].abs().sum(dim=1) > 0).all()
    torch.testing.assert_close(gradient[1:].sum(dim=0), weights[1:].sum(dim=0), atol=1e-10, rtol=0)
    # A linear map: resized values are exactly what a step along the gradient makes of them.
    with torch.no_grad():
        embeddings.position_embeddings.weight[2:] += 0.1 * gradient
        moved = embeddings.interpolate_positions(16, 16) - small
    assert ((moved * weights).sum() / (0.1 * gradient.square().sum())).item() == pytest.approx(1, abs=1e-9)


def test_a_switch_of_size_touches_nothing():
    """At 16 and at 32 pixels the loss is the same before and after the switch, and the moments go on: the next step is
    AdamW's by hand, from the moments that the small images have left."""
    phases = plan_phases(ScheduleConfig(until=(0.5, 1.0), image_size=(16, 32)), steps=4, image_size=32, patch_size=8)
    model = build()
    optimizer = build_optimizer(model, "adamw", 1e-2)
    seen = {}
    for step in range(1, 5):
        phase = phase_at(phases, step)
        if step == 3:
            table = model.encoder.vision_embeddings.position_embeddings.weight
            before, state = table.detach().clone(), copy.deepcopy(optimizer.state[table])
            assert state["step"].item() == 2 and (state["exp_avg"][3:] != 0).any(dim=1).all()
        batch = make_batch(step, side=phase.image_size)
        loss_of(model, batch, interpolate_pos_encoding=phase.image_size != 32).backward()
        if step == 3:
            gradient = table.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        seen[step] = table.detach().clone() if step == 3 else None
    first = 0.9 * state["exp_avg"] + 0.1 * gradient
    second = 0.98 * state["exp_avg_sq"] + 0.02 * gradient.square()
    update = (first / (1 - 0.9**3)) / ((second / (1 - 0.98**3)).sqrt() + 1e-6)
    torch.testing.assert_close(seen[3], before - 1e-2 * update, atol=1e-12, rtol=0)


# ---- Sharing


@pytest.mark.parametrize("mode", MODES)
def test_each_stack_shares_with_itself(mode):
    model = build(M2EncoderForPreTraining)
    plain = {name: parameter.shape.numel() for name, parameter in model.named_parameters()}
    share_layers(model, mode)
    part = "self_attn" if mode == "attn" else ""
    # By hand: 3 depths of 2 experts and 2 upper layers; all but the first of each stack are gone.
    gone = [f"layers.{i}.{kind}." for i in (1, 2) for kind in ("vision", "text")] + ["upper_layers.1."]
    kept = [name for name in plain if not any(f"encoder.{g}{part}" in name for g in gone)]
    assert [name for name, _ in model.named_parameters()] == kept
    assert sum(p.numel() for p in model.parameters()) == sum(plain[name] for name in kept)
    assert model.state_dict().keys() == plain.keys()
    shared = shared_modules(model)
    encoder = model.encoder
    stacks = [encoder.layers[0]["vision"], encoder.layers[0]["text"], encoder.upper_layers[0]]
    assert shared == [layer if mode == "layer" else layer.self_attn for layer in stacks]
    assert shared_modules(build()) == []


def test_mode_none_does_nothing_and_others_are_refused():
    model = build()
    before = list(model.parameters())
    share_layers(model, "none")
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="got 'all'"):
        share_layers(model, "all")


@pytest.mark.parametrize("mode", MODES)
def test_a_shared_gradient_is_the_sum_over_depths(mode):
    model = build()
    share_layers(model, mode)
    unshared = build(seed=1)
    unshared.load_state_dict(model.state_dict())
    batch = make_batch(0)
    for each in (model, unshared):
        loss_of(each, batch).backward()
    sums: dict[Tensor, Tensor] = {}
    of_unshared = dict(unshared.named_parameters())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sums[parameter] = sums.get(parameter, 0) + of_unshared[name].grad
    for parameter, total in sums.items():
        torch.testing.assert_close(parameter.grad, total, atol=1e-12, rtol=1e-9)


def test_drop_path_stays_with_the_depth():
    """Rates 0, 0.2, ... 0.8 at five depths, of which three share one layer."""
    model = build(drop_path_rate=0.8)
    share_layers(model, "layer")
    assert model.encoder.drop_path_rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    seen = []
    for layer in (model.encoder.layers[0]["text"], model.encoder.upper_layers[0]):
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["drop_path_rate"]), with_kwargs=True)
    batch = make_batch(0)
    model(input_ids=batch["input_ids"])
    assert seen == model.encoder.drop_path_rates


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_shared_layers_changes_nothing(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build(drop_path_rate=0.3)
        share_layers(model, "layer")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        loss_of(model, make_batch(0)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [M2EncoderModel, M2EncoderForPreTraining])
def test_a_shared_model_is_saved_as_an_ordinary_one(mode, kind, tmp_path: Path):
    model = build(kind)
    share_layers(model, mode)
    optimizer = build_optimizer(model, "adamw", 1e-2)
    train(model, optimizer, range(1))
    model.eval().save_pretrained(tmp_path)
    auto = AutoModelForPreTraining if kind is M2EncoderForPreTraining else AutoModel
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(list(loaded.parameters())) > len(list(model.parameters()))  # not shared: it can be trained on
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    with torch.no_grad():
        ours, theirs = (m(**make_batch(9)).logits_per_image for m in (model, loaded))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    first, second = (loaded.encoder.layers[i]["text"].self_attn.q_proj.weight for i in (0, 1))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


# ---- Delinking


def delinked(mode: str, name: str, steps: int = 3) -> tuple[nn.Module, Any, nn.Module, Any]:
    """A shared pair after some steps, and the unshared one that goes on from it."""
    model = build()
    share_layers(model, mode)
    optimizer = build_optimizer(model, name, 1e-2)
    train(model, optimizer, range(steps))
    fresh = build(seed=1)
    fresh_optimizer = build_optimizer(fresh, name, 1e-2)
    delink(model, optimizer, fresh, fresh_optimizer)
    return model, optimizer, fresh, fresh_optimizer


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("mode", MODES)
def test_delinking_keeps_the_function_and_shares_out_the_moments(mode, name):
    model, optimizer, fresh, fresh_optimizer = delinked(mode, name)
    for step in (5, 6):
        assert torch.equal(loss_of(model, make_batch(step)), loss_of(fresh, make_batch(step)))
    shared = dict(model.named_parameters(remove_duplicate=False))
    tensors = set()
    for key, parameter in fresh.named_parameters():
        uses = sum(other is shared[key] for other in shared.values())
        inside = "self_attn" if mode == "attn" else "."
        depths = 3 if "encoder.layers." in key else 2 if "upper_layers." in key else 1
        assert uses == (depths if inside in key else 1), key
        before, after = optimizer.state[shared[key]], fresh_optimizer.state[parameter]
        assert after["step"] == before["step"] == 3
        torch.testing.assert_close(after["exp_avg"] * uses, before["exp_avg"], atol=1e-15, rtol=1e-12)
        torch.testing.assert_close(after["exp_avg_sq"] * uses**2, before["exp_avg_sq"], atol=1e-15, rtol=1e-12)
        tensors |= {id(value) for value in after.values()} | {value.data_ptr() for value in after.values()}
    assert len(tensors) == 6 * len(list(fresh.parameters()))  # nothing is held twice


def test_the_step_after_delinking_by_hand():
    """AdamW from a third of the first moment and a ninth of the second, with the gradient of each depth alone."""
    model, optimizer, fresh, fresh_optimizer = delinked("layer", "adamw")
    source = model.encoder.layers[0]["text"].mlp.fc1.weight
    state = optimizer.state[source]
    weights = [layer["text"].mlp.fc1.weight for layer in fresh.encoder.layers]
    before = [weight.detach().clone() for weight in weights]
    loss_of(fresh, make_batch(3)).backward()
    fresh_optimizer.step()
    assert not torch.equal(weights[0], weights[1])
    for weight, old in zip(weights, before, strict=True):
        first = 0.9 * state["exp_avg"] / 3 + 0.1 * weight.grad
        second = 0.98 * state["exp_avg_sq"] / 9 + 0.02 * weight.grad.square()
        update = (first / (1 - 0.9**4)) / ((second / (1 - 0.98**4)).sqrt() + 1e-6)
        torch.testing.assert_close(weight, old * (1 - 1e-2 * 0.05) - 1e-2 * update, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_alike_gradients_make_the_step_that_sharing_would_have_made(name):
    """If every depth had the U-th part of the shared gradient, delinking would change nothing at all."""
    model, optimizer, fresh, fresh_optimizer = delinked("layer", name)
    for group in (*optimizer.param_groups, *fresh_optimizer.param_groups):
        group["eps"] = 0.0  # the one thing that does not scale
    generator = torch.Generator().manual_seed(0)
    shared = dict(model.named_parameters(remove_duplicate=False))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for key, parameter in fresh.named_parameters():
        parameter.grad = shared[key].grad / sum(other is shared[key] for other in shared.values())
    optimizer.step()
    fresh_optimizer.step()
    for key, parameter in fresh.named_parameters():
        torch.testing.assert_close(parameter, shared[key], atol=1e-12, rtol=1e-10)


def test_delink_before_the_first_step_and_with_frozen_parts():
    model, fresh = build(M2EncoderForPreTraining), build(M2EncoderForPreTraining, seed=1)
    share_layers(model, "layer")
    for each in (model, fresh):
        each.pretraining_heads.requires_grad_(False)
    optimizer, fresh_optimizer = (build_optimizer(each, "lamb", 1e-2) for each in (model, fresh))
    delink(model, optimizer, fresh, fresh_optimizer)
    assert not fresh_optimizer.state
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_delink_refuses_what_it_does_not_know():
    model = build()
    share_layers(model, "layer")
    fresh = build(M2EncoderForPreTraining)
    with pytest.raises(ValueError, match=r"same model without sharing.*pretraining_heads"):
        delink(model, build_optimizer(model, "lamb", 1e-2), fresh, build_optimizer(fresh, "lamb", 1e-2))
    optimizer, fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), build(seed=1)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="momentum_buffer"):
        delink(model, optimizer, fresh, torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9))


# ---- Patch dropping


def test_a_bank_drops_the_same_patches_twice():
    """Gradients of the bank do not depend on how many graphs are kept, with drop path on top."""
    masker = Masker(MaskingConfig(), None, 16, masks_images=False, drop_patches=0.5)
    micro_batches = []
    for step in range(2):
        batch = make_batch(step)
        generators = [np.random.default_rng([step, row]) for row in range(4)]
        micro_batches.append({**batch, **masker(batch["input_ids"], batch["attention_mask"], generators)})
    assert micro_batches[0]["kept_patches"].shape == (4, 8)
    gradients = []
    for retain in (0, 1, 2):
        model = build(drop_path_rate=0.2)

        def model_step(batch: dict[str, Tensor], _: bool, model: nn.Module = model) -> MicroBatchOutput:
            output = model(**batch)
            return MicroBatchOutput(output.image_embeds, output.text_embeds)

        torch.manual_seed(7)
        banked_backward(model_step, micro_batches, model.logit_scale, retain=retain)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-12, rtol=1e-9)


# ---- Resume


EVERYTHING = ScheduleConfig(
    until=(3, 6, 1.0),
    image_size=(16, 16, 32),
    drop_patches=(0.5, 0.0, 0.25),
    rewarm_steps=(0, 0, 2),
    sharing=SharingConfig("layer", until=5, rewarm_steps=1),
)


def run(start: dict[str, Any] | None, steps: int = 8) -> list[dict[str, Any]]:
    """A run through every kind of phase, from its beginning or from a checkpoint; one checkpoint per step."""
    phases = plan_phases(EVERYTHING, steps=steps, image_size=32, patch_size=8)

    def make(sharing: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build(drop_path_rate=0.2)
        share_layers(model, sharing)
        return model, build_optimizer(model, "lamb", 1e-2)

    done = 0 if start is None else start["step"]
    phase = phase_at(phases, max(done, 1))
    model, optimizer = make(phase.sharing)
    if start is not None:
        model.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
    checkpoints = []
    for step in range(done + 1, steps + 1):
        before, phase = phase, phase_at(phases, step)
        if phase.sharing != before.sharing:
            fresh = make(phase.sharing)
            delink(model, optimizer, *fresh)
            model, optimizer = fresh
        torch.manual_seed(step)
        masker = Masker(MaskingConfig(), None, (phase.image_size // 8) ** 2, False, phase.drop_patches)
        batch = make_batch(step, side=phase.image_size)
        generators = [np.random.default_rng([step, row]) for row in range(4)]
        batch |= masker(batch["input_ids"], batch["attention_mask"], generators)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * warmup_cosine(step, 2, steps, 0.1) * phase.lr_factor(step)
        loss = loss_of(model, batch, interpolate_pos_encoding=phase.image_size != 32)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = {"step": step, "loss": loss.item(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.append(copy.deepcopy(state))
    return checkpoints


def test_resumed_anywhere_is_the_uninterrupted_run():
    whole = run(None)
    assert len({state["loss"] for state in whole}) == 8 and all(math.isfinite(state["loss"]) for state in whole)
    for state in whole[:-1]:
        resumed = run(state)
        assert [s["loss"] for s in resumed] == [s["loss"] for s in whole[state["step"] :]]
        for name, value in whole[-1]["model"].items():
            assert torch.equal(value, resumed[-1]["model"][name]), (state["step"], name)


# ---- Several processes

STRATEGIES = {"ddp": None, "fsdp": None, "hsdp": 2, "hpz": 2}  # with the ranks of a group


def shared_then_delinked(strategy: str, mode: str, rows: slice) -> dict[str, Any]:
    """Two shared steps and a delinked one over the same banks of 2 x 4 pairs. Every parameter at the switch and at
    the end, the losses at the switch."""

    def make(sharing: str, seed: int) -> tuple[Distributed, torch.optim.Optimizer]:
        model = build(seed=seed)
        share_layers(model, sharing)
        config = ShardingConfig(strategy, STRATEGIES[strategy] if dist.is_initialized() else None)
        # Recomputed activations in the processes only: one more thing that must not change anything.
        distributed = distribute(model, config, device="cpu", gradient_checkpointing=dist.is_initialized())
        # LAMB's norms under sharding are tested with the optimizer. A large epsilon, or rounding decides the sign of
        # the steps of weights with no gradient to speak of.
        return distributed, torch.optim.AdamW(distributed.parameters, lr=1e-2, eps=1e-3)

    def bank(distributed: Distributed, step: int) -> Tensor:
        def model_step(batch: dict[str, Tensor], _: bool) -> MicroBatchOutput:
            output = distributed.model(**batch)
            return MicroBatchOutput(output.image_embeds, output.text_embeds)

        micro_batches = [{key: x[rows] for key, x in make_batch(10 * step + j).items()} for j in range(2)]
        scale = distributed.module.logit_scale
        return banked_backward(model_step, micro_batches, scale, retain=1, no_sync=distributed.no_sync)["loss"]

    def steps(distributed: Distributed, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            bank(distributed, step)
            optimizer.step()
            optimizer.zero_grad()

    def values(distributed: Distributed) -> dict[str, np.ndarray]:
        whole = {}
        for name, parameter in distributed.module.named_parameters(remove_duplicate=False):
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            whole[name] = full.detach().numpy().copy()
        return whole

    shared, optimizer = make(mode, 0)
    steps(shared, optimizer, range(2))
    exported = {name: value.numpy().copy() for name, value in shared.full_state_dict().items()}
    fresh, fresh_optimizer = make("none", 1)
    delink(shared.module, optimizer, fresh.module, fresh_optimizer)
    seen = {"shared": values(shared), "exported": exported, "delinked": values(fresh)}
    seen["losses"] = []
    for distributed in (shared, fresh):
        seen["losses"].append(bank(distributed, 7).item())
        distributed.module.zero_grad()
    steps(fresh, fresh_optimizer, range(2, 3))
    return seen | {"end": values(fresh)}


def on_one_of_four() -> dict[tuple[str, str], dict[str, Any]]:
    rank = dist.get_rank()
    return {
        (strategy, mode): shared_then_delinked(strategy, mode, slice(rank, rank + 1))
        for strategy in STRATEGIES
        for mode in MODES
    }


@pytest.fixture(scope="module")
def of_four_processes() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_distributed(on_one_of_four, 4, timeout=500)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_processes_equal_one(of_four_processes, strategy, mode):
    expected = shared_then_delinked("ddp", mode, slice(None))
    assert expected["exported"].keys() == build().state_dict().keys()  # the names of the ordinary model
    for rank, seen in enumerate(results[strategy, mode] for results in of_four_processes):
        before, after = seen["losses"]
        assert before == pytest.approx(after, rel=1e-12)
        for stage in ("shared", "delinked", "end", *(["exported"] if rank == 0 else [])):
            assert seen[stage].keys() == expected[stage].keys()
            for name, value in seen[stage].items():
                np.testing.assert_allclose(value, expected[stage][name], rtol=0, atol=1e-11, err_msg=f"{stage} {name}")
        moved = max(np.abs(seen["end"][name] - value).max() for name, value in seen["delinked"].items())
        assert moved > 1e-3
