"""The plan of a run: its numbers by hand, its activations against what autograd keeps, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from modeling_m2encoder import M2EncoderConfig, M2EncoderForPreTraining
from training.bank import BankPlan
from training.configs import PRESETS, ITCConfig, ObjectiveConfig, PretrainConfig, base_0_4b, huge_10b, large_1b, nano
from training.cost_model import activation_bytes, itc_traffic, memory_estimate, parameter_traffic
from training.preflight import Plan, build_on_meta, main, plan
from training.schedule import ScheduleConfig


def settings(preset: PretrainConfig, **changes: Any) -> PretrainConfig:
    """A preset with fields replaced, those of its parts by `part__field`."""
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        if part:
            value = dataclasses.replace(getattr(preset, part), **{field: value})
        preset = dataclasses.replace(preset, **{part or field: value})
    return preset


# ---- The plan


def test_the_paper_on_32_nodes():
    """Table 10: 131,072 pairs in a batch, 32,768 in a loss; 9 B pairs are 68,665 steps of them."""
    seen = plan(base_0_4b(), world_size=256, gpus_per_node=8)
    assert (seen.nodes, seen.bank.num_groups, seen.bank.group_size) == (32, 4, 64)
    assert seen.bank.bank_size == 32_768 and seen.global_batch == 131_072 and seen.steps_for_paper == 68_665
    by_nodes = settings(base_0_4b(), itc=ITCConfig(group_nodes=8, bank_steps=base_0_4b().itc.bank_steps))
    assert plan(by_nodes, world_size=256, gpus_per_node=8).bank == seen.bank
    for part in ("256 GPUs on 32 node(s)", "N = 32,768", "131,072 pairs", "68,665 steps", "405.1 M", "ITC features"):
        assert part in str(seen), part


@pytest.mark.parametrize(("preset", "millions"), [(base_0_4b, 405.1), (large_1b, 909.2), (huge_10b, 11_102.1)])
def test_the_same_run_on_1_4_and_32_nodes(preset: Any, millions: float):
    """Only the number of micro-batches changes: the batch, the loss, and what a GPU holds of activations stay."""
    plans = []
    for nodes, bank_steps, strategy in [(1, 64, "fsdp"), (4, 16, "hsdp"), (32, 2, "hsdp")]:
        config = settings(preset(), itc__bank_steps=bank_steps, sharding__strategy=strategy)
        plans.append(plan(config, world_size=8 * nodes, gpus_per_node=8))
    assert {(p.global_batch, p.bank.bank_size, p.bank.num_groups, p.memory["activations"]) for p in plans} == {
        (preset().batch_size, preset().itc.bank_size, 4, plans[0].memory["activations"])
    }
    assert plans[0].parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_given_model_counts_what_it_trains():
    config = settings(nano(), objective=ObjectiveConfig())
    model = build_on_meta(config)
    model.pretraining_heads.text_head.requires_grad_(False)
    seen = plan(config, world_size=2, gpus_per_node=2, model=model)
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.pretraining_heads.text_head.parameters())
    assert seen.parameters == total and seen.memory["parameters (fp32)"] == 4 * total
    assert seen.memory["gradients (fp32)"] == 4 * (total - frozen)
    assert seen.memory["optimizer moments (fp32)"] == 8 * (total - frozen)


# ---- Memory


def test_shares_of_the_state_by_strategy():
    bank, objective = BankPlan(16, 16, 2, 4), ObjectiveConfig(0, 0)
    model = build_on_meta(settings(nano(), objective=objective))
    total = sum(p.numel() for p in model.parameters())
    fixed = {"retain": 1, "tile": 1024, "gradient_checkpointing": False, "itemsize": 2}

    def state(strategy: str, shard_size: int, second: int | None = None) -> dict[str, float]:
        return memory_estimate(
            model, objective, bank, strategy=strategy, shard_size=shard_size, second_shard_size=second, **fixed
        )

    assert state("ddp", 1)["optimizer moments (fp32)"] == 8 * total
    assert state("fsdp", 16)["optimizer moments (fp32)"] == 8 * total / 16
    hsdp = state("hsdp", 4)
    assert hsdp["parameters (fp32)"] == hsdp["gradients not yet reduced (fp32)"] == total
    assert 0 < state("hpz", 16, 4)["second shards of the parameters"] < 2 * total / 4
    # N = 16 * 4 * 2 = 128 rows of 2 * 128 bf16 numbers; b = 8 own rows three times in bf16 and once in fp32.
    assert hsdp["features, gathered and own"] == 128 * 256 * 2 + 8 * 256 * (3 * 2 + 4)
    assert "vocabulary head" not in hsdp


@pytest.mark.parametrize(("cmlm", "cmim"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.3, 0.3)])
@pytest.mark.parametrize("context", ["tokens", "cls"])
def test_activations_are_what_autograd_keeps(cmlm: float, cmim: float, context: str):
    """Every storage that a real forward saves, but the parameters, the [L, L] attention of the CPU, and the masked
    language loss, which is counted by itself."""
    config = M2EncoderConfig.from_size(
        "nano", vocab_size=50, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_decoder_layers=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, mask_token_id=2, decoder_context=context,
    )  # fmt: skip
    model, b, length = M2EncoderForPreTraining(config).train(), 8, config.max_text_length
    inputs = {"input_ids": torch.randint(3, 50, (b, length)), "pixel_values": torch.randn(b, 3, 64, 64)}
    inputs["attention_mask"] = torch.ones(b, length, dtype=torch.long)
    if cmlm:
        inputs["text_mask"] = torch.rand(b, length) < 0.5
    if cmim:
        inputs["patch_mask"] = torch.rand(b, 16) < 0.75
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {x.untyped_storage().data_ptr() for x in inputs.values()}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # or its address could be another's
        storage = tensor.untyped_storage()
        is_map = tensor.ndim >= 3 and tensor.shape[-1] in (17, length) and tensor.shape[-2] in (17, length)
        if storage.data_ptr() not in own and not is_map and 50 not in tensor.shape:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)
        del output
    objective = ObjectiveConfig(cmlm_weight=cmlm, cmim_weight=cmim)
    estimate = activation_bytes(config, objective, b, itemsize=4)
    assert estimate == pytest.approx(sum(kept.values()), rel=0.03)


def test_checkpointing_keeps_the_inputs_of_layers():
    """One more layer is one more state of the image and of the text, and of each masked pass."""

    def kept(layers: int, objective: ObjectiveConfig, itemsize: int = 2) -> int:
        config = M2EncoderConfig.from_size("0.4B", num_hidden_layers=layers)
        return activation_bytes(config, objective, 8, itemsize=itemsize, gradient_checkpointing=True)

    both, itc = ObjectiveConfig(), ObjectiveConfig(0, 0)
    assert kept(10, itc) - kept(9, itc) == 8 * (197 + 52) * 768 * 2
    assert kept(10, both) - kept(9, both) == 2 * 8 * (197 + 52) * 768 * 2
    assert kept(9, itc, itemsize=4) == 2 * kept(9, itc)
    assert kept(9, both) < activation_bytes(M2EncoderConfig.from_size("0.4B"), both, 8) / 8


def test_norms_in_fp32_keep_more():
    config, objective = M2EncoderConfig.from_size("0.4B"), ObjectiveConfig()
    plain = activation_bytes(config, objective, 8)
    assert 1.3 < activation_bytes(config, objective, 8, norms_in_fp32=True) / plain < 1.45
    assert activation_bytes(config, objective, 16) == 2 * plain


# ---- Bytes on the wire


def test_itc_traffic():
    """g = 16 on nodes of 8: 15 times b = 4 * 2 rows of 2 * 100 bf16 numbers and two fp32, out of each node once."""
    sent = 15 * 8 * (2 * 100 * 2 + 8)
    traffic = itc_traffic(BankPlan(64, 16, 2, 4), 100, 8, 2)
    assert (traffic.per_gpu_inside, traffic.per_node_between) == (sent * 7 / 8, sent)
    inside = itc_traffic(BankPlan(64, 8, 2, 4), 100, 8, 2)
    assert (inside.per_gpu_inside, inside.per_node_between) == (7 * 8 * 408, 0)
    alone = itc_traffic(BankPlan(64, 1, 2, 4), 100, 8, 2)
    assert (alone.per_gpu_inside, alone.per_node_between) == (0, 0)


def test_parameter_traffic():
    """P = 1000 parameters on 4 nodes of 2, k = 3 with one graph kept: 3 * 2 + 2 gathers."""

    def sent(strategy: str, shard_size: int, second: int | None = None) -> dict[str, tuple[float, float]]:
        rows = parameter_traffic(
            1000, 8, 2, strategy=strategy, shard_size=shard_size, second_shard_size=second, bank_steps=3, retain=1,
            itemsize=2,
        )  # fmt: skip
        return {row.name: (row.per_gpu_inside, row.per_node_between) for row in rows}

    assert sent("ddp", 1) == {"gradients": (2 * 7 / 8 * 4000 / 2, 2 * 7 / 8 * 4000)}
    assert sent("fsdp", 8) == {
        "parameters": (7 / 8 * 2000 * 8 / 2, 7 / 8 * 2000 * 8),
        "gradients, reduce-scatter": (7 / 8 * 4000 * 3 / 2, 7 / 8 * 4000 * 3),
    }
    # Both GPUs of a node reduce their half of the parameters with the 3 other copies, once.
    assert sent("hsdp", 2) == {
        "parameters": (1 / 2 * 2000 * 8, 0),
        "gradients, reduce-scatter": (1 / 2 * 4000 * 3, 0),
        "gradients, between the copies": (0, 2 * 3 / 4 * 2000 * 2),
    }
    assert sent("hpz", 8, 2) == {
        "parameters, forward": (7 / 8 * 2000 * 5 / 2, 7 / 8 * 2000 * 5),
        "parameters, backward": (1 / 2 * 2000 * 3, 0),
        "gradients, reduce-scatter": (7 / 8 * 4000 * 3 / 2, 7 / 8 * 4000 * 3),
    }


# ---- Refusals


@pytest.mark.parametrize(
    ("changes", "world", "named"),
    [
        ({}, {"world_size": 12, "gpus_per_node": 8}, "12 processes are not whole nodes of 8"),
        ({}, {"world_size": 0, "gpus_per_node": 8}, "at least 1, got 0 and 8"),
        ({"itc__bank_steps": 5}, {"world_size": 8, "gpus_per_node": 8}, "nearest"),
        ({"itc__bank_size": 1000}, {"world_size": 8, "gpus_per_node": 8}, "nearest bank_size"),
        ({"itc__retain": 3}, {"world_size": 8, "gpus_per_node": 8}, "retain"),
        ({"sharding__strategy": "hsdp", "sharding__shard_size": 3}, {"world_size": 8, "gpus_per_node": 8}, "2 and 4"),
        ({"sharding__strategy": "hsdp"}, {"world_size": 8, "gpus_per_node": 8}, "One single group is fsdp"),
        ({"size": "2B"}, {"world_size": 8, "gpus_per_node": 8}, "2B"),
    ],
)
def test_what_cannot_work(changes: dict[str, Any], world: dict[str, int], named: str):
    with pytest.raises(ValueError, match=named):
        plan(settings(nano(), **changes), **world)


def test_too_little_memory():
    """10B without sharding: 16 bytes for each of 11.1 G parameters; sharded over a node it fits."""
    whole = settings(huge_10b(), sharding__strategy="ddp")
    with pytest.raises(
        ValueError, match=r"needs an estimated 2\d\d\.\d GB per GPU; a GPU has 80\.0\. Most of it is .*hsdp"
    ):
        plan(whole, world_size=256, gpus_per_node=8, gpu_memory=80e9)
    assert isinstance(plan(huge_10b(), world_size=256, gpus_per_node=8, gpu_memory=80e9), Plan)
    much = settings(large_1b(), gradient_checkpointing=False, itc__bank_steps=1)
    with pytest.raises(ValueError, match="Most of it is activations .*gradient_checkpointing"):
        plan(much, world_size=256, gpus_per_node=8, gpu_memory=80e9)


def test_phases():
    """Small images and dropped patches need less; the plan is for the phase that needs the most."""
    schedule = ScheduleConfig(until=(0.5, 0.9, 1.0), image_size=(112, 224, 224), drop_patches=(0, 0.5, 0),
                              bank_steps=(1, 2, 4))  # fmt: skip
    seen = plan(settings(large_1b(), schedule=schedule), world_size=256, gpus_per_node=8)
    assert [bank.batch_per_gpu for bank in seen.banks] == [512, 256, 128] and seen.bank.bank_size == 32_768
    assert "112 pixels, 0% of patches dropped, B = 512, k = 1" in str(seen)
    config, objective = M2EncoderConfig.from_size("1B"), ObjectiveConfig(0, 0)
    whole = activation_bytes(config, objective, 8)
    assert activation_bytes(config, objective, 8, image_size=112) / whole == pytest.approx((50 + 52) / (197 + 52))
    assert activation_bytes(config, objective, 8, drop_patches=0.5) / whole == pytest.approx((99 + 52) / (197 + 52))


def test_notes():
    crossing = plan(settings(nano(), batch_size=240, itc__group_size=12), world_size=24, gpus_per_node=8)
    assert any("12 GPUs does not lie along nodes of 8" in note for note in crossing.notes)
    whole = plan(huge_10b(), world_size=256, gpus_per_node=8)
    assert not whole.notes
    tight = plan(huge_10b(), world_size=256, gpus_per_node=8, gpu_memory=whole.memory_per_gpu * 1.05)
    assert any("nine tenths" in note for note in tight.notes)


# ---- Command line


def test_command_line(capsys: pytest.CaptureFixture[str]):
    main(["large_1b", "--world-size", "32", "--gpu-memory", "80", "--itc.bank-steps", "16"])
    printed = capsys.readouterr().out
    assert "32 GPUs on 4 node(s)" in printed and "k = 16" in printed and "N = 32,768" in printed
    with pytest.raises(SystemExit, match="This cannot work: .*whole nodes"):
        main(["large_1b", "--world-size", "12"])
    with pytest.raises(SystemExit):
        main(["no_such_preset", "--world-size", "8"])
    assert set(PRESETS) >= {"nano", "base_0_4b", "large_1b", "huge_10b"}
