"""Every strategy in real gloo processes against one process: masked losses, gradients, optimizers, clipping, export.

`tests/training/test_bank.py` has the bank under `ddp`, `fsdp` and `hsdp` with 2, 4 and 8 processes; here is the real
model with all its losses. All cases run in one set of processes, and the tests look at what the ranks gave back.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modeling_m2encoder import M2EncoderConfig, M2EncoderForPreTraining
from tests.distributed import run_distributed
from training.bank import MicroBatchOutput, banked_backward
from training.optim import build_optimizer
from training.sharding import Distributed, ShardingConfig, distribute

WORLD, ROWS, K, TOKENS, VOCABULARY = 4, 2, 2, 6, 40
STRATEGIES = ("ddp", "fsdp", "hsdp", "hpz")
OPTIMIZERS = ("adamw", "lamb")
MAX_NORM, STEPS = 0.5, 2
FEATURES = ("input_ids", "attention_mask", "pixel_values")


def tiny(seed: int = 0, **settings: Any) -> M2EncoderForPreTraining:
    config = M2EncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_upper_layers=1,
        num_decoder_layers=1,
        projection_dim=6,
        image_size=8,
        patch_size=4,
        max_text_length=TOKENS,
        mask_token_id=3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **settings,
    )
    torch.manual_seed(seed)
    return M2EncoderForPreTraining(config).double().train()


def micro_batch(rank: int, j: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Pairs with padding; every rank and micro-batch masks another number of tokens."""
    generator = torch.Generator().manual_seed(100 * rank + j)
    attention_mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    attention_mask[0, 4:] = 0
    text_mask = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    text_mask[:, 1 : 2 + (rank + j) % 3] = True
    patch_mask = torch.zeros(ROWS, 4, dtype=torch.bool)
    patch_mask[:, [rank % 4, (rank + 1 + j) % 4]] = True
    return {
        "input_ids": torch.randint(4, VOCABULARY, (ROWS, TOKENS), generator=generator),
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(ROWS, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
        "text_mask": text_mask,
        "patch_mask": patch_mask,
    }


def with_all_losses(model: nn.Module, batch: dict[str, Tensor], with_auxiliary: bool) -> MicroBatchOutput:
    if not with_auxiliary:
        return only_contrastive(model, batch, False)
    output = model(**batch)
    return MicroBatchOutput(output.image_embeds, output.text_embeds, 0.3 * output.loss_cmlm + 0.3 * output.loss_cmim)


def only_contrastive(model: nn.Module, batch: dict[str, Tensor], with_auxiliary: bool) -> MicroBatchOutput:
    output = model(**{name: batch[name] for name in FEATURES})
    return MicroBatchOutput(output.image_embeds, output.text_embeds)


def bank(distributed: Distributed, step: Any = with_all_losses, retain: int = 1, defer: bool = True) -> Tensor:
    """One bank of `K` micro-batches; this rank's loss."""
    dtype = distributed.parameters[0].dtype
    return banked_backward(
        functools.partial(step, distributed.model),
        [micro_batch(dist.get_rank(), j, dtype) for j in range(K)],
        distributed.module.logit_scale,
        retain=retain,
        no_sync=distributed.no_sync if defer else nullcontext,
    )["loss"]


def whole_bank(model: nn.Module, step: Any = with_all_losses) -> Tensor:
    """The same for all ranks' pairs in one process: torch's cross_entropy, one backward. The loss."""
    outputs = [step(model, micro_batch(rank, j), True) for rank in range(WORLD) for j in range(K)]
    images = torch.cat([output.image_embeds for output in outputs])
    texts = torch.cat([output.text_embeds for output in outputs])
    logits = model.logit_scale.exp() * images @ texts.T
    target = torch.arange(len(images))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    if outputs[0].auxiliary_loss is not None:
        loss = loss + torch.stack([output.auxiliary_loss for output in outputs]).mean()
    loss.backward()
    return loss.detach()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error. Some gradients are zero but for rounding (a key's bias moves no softmax): what is
    a thousand times smaller than the rest is compared with the rest."""
    assert got.keys() == expected.keys()
    norms = {name: value.norm().item() for name, value in expected.items()}
    floor = 1e-3 * max(norms.values())
    return max((got[name] - expected[name]).norm().item() / max(norms[name], floor) for name in expected)


def spread(strategy: str, model: nn.Module, **settings: Any) -> Distributed:
    compiled = settings.pop("compile", False)
    size = 2 if strategy in ("hsdp", "hpz") else None
    return distribute(model, ShardingConfig(strategy, size, compiled), device="cpu", **settings)


# ---- In the processes ----------------------------------------------------------------------------------------------


def update(model: nn.Module, name: str) -> None:
    optimizer = build_optimizer(model, name, lr=0.02)
    for _ in range(STEPS):
        optimizer.step()


def run_cases() -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for strategy in STRATEGIES:
        results[strategy] = exact_case(strategy)
        results[strategy, "bf16"] = bf16_case(strategy)
        results[strategy, "frozen"] = frozen_case(strategy)
    results["deferred"], results["not deferred"] = deferral_case(True), deferral_case(False)
    return results


def exact_case(strategy: str) -> dict[str, Any]:
    """From weights that only rank 0 has, with recomputed activations, to the export after a few updates."""
    model = tiny() if dist.get_rank() == 0 else tiny().to("meta")
    distributed = spread(strategy, model, gradient_checkpointing=True)
    module, seen = distributed.module, {}
    seen["loss"] = bank(distributed)
    seen["gradients"] = gradients(module)
    seen["norm"] = distributed.clip_grad_norm_(MAX_NORM)
    seen["clipped"] = gradients(module)
    start = [parameter.detach().clone() for parameter in distributed.parameters]
    for name in OPTIMIZERS:
        for parameter, value in zip(distributed.parameters, start, strict=True):
            parameter.detach().copy_(value)
        update(module, name)
        seen[name] = {name: whole(parameter) for name, parameter in module.named_parameters()}
    module.eval()
    images = micro_batch(0, 0)["pixel_values"]
    with torch.no_grad():
        seen["embeds"] = module.get_image_features(images).pooler_output
        forward = module(**{name: value for name, value in micro_batch(0, 0).items() if name in FEATURES})
    seen["forward"] = forward.image_embeds
    seen["sharded"] = isinstance(module.logit_scale, DTensor)
    weights, copy = distributed.full_state_dict(), distributed.full_copy()
    seen["names"], seen["weights"] = list(weights), {name: value.clone() for name, value in weights.items()}
    if copy is not None:
        seen["type"] = type(copy)
        with torch.no_grad():
            seen["copied embeds"] = copy.get_image_features(images).pooler_output
    # Training goes on after an evaluation, with the same parameters.
    module.train().zero_grad()
    bank(distributed, retain=0)
    seen["later"] = gradients(module)
    return seen


def bf16_case(strategy: str) -> dict[str, Any]:
    distributed = spread(strategy, tiny().float(), mixed_precision="bf16")
    loss = bank(distributed)
    return {
        "loss": loss.double(),
        "gradients": {name: value.double() for name, value in gradients(distributed.module).items()},
        "dtypes": {p.dtype for p in distributed.parameters} | {p.grad.dtype for p in distributed.parameters},
        "embeds": only_contrastive(distributed.model, micro_batch(0, 0, torch.float32), False).image_embeds.dtype,
    }


def frozen_case(strategy: str) -> list[dict[str, Tensor]]:
    """Two steps in which no head has a part."""
    model = tiny()
    model.pretraining_heads.requires_grad_(False)
    distributed, seen = spread(strategy, model), []
    for retain in (0, K):
        bank(distributed, only_contrastive, retain)
        seen.append(gradients(distributed.module))
        distributed.module.zero_grad()
    return seen


def deferral_case(defer: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients, and how often they were reduced across the groups of `hsdp`."""
    distributed = spread("hsdp", tiny())
    # By its ranks: meshes that were made alike are equal, and each has communicators of its own.
    across = dist.get_process_group_ranks(distributed.module.logit_scale.device_mesh.get_group(0))
    all_reduce, count = dist.all_reduce, 0

    def counted(*arguments: Any, group: Any = None, **settings: Any) -> Any:
        nonlocal count
        count += dist.get_process_group_ranks(group) == across
        return all_reduce(*arguments, group=group, **settings)

    dist.all_reduce = counted
    bank(distributed, retain=0, defer=defer)
    dist.all_reduce = all_reduce
    return gradients(distributed.module), count


# ---- What they gave back -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_distributed(run_cases, WORLD, timeout=500)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """The same steps by a bare model in one process."""
    model = tiny()
    seen: dict[str, Any] = {"loss": whole_bank(model), "gradients": gradients(model)}
    seen["norm"] = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).detach()
    seen["clipped"] = gradients(model)
    for name in OPTIMIZERS:
        other = tiny()
        for parameter, clipped in zip(other.parameters(), seen["clipped"].values(), strict=True):
            parameter.grad = clipped.clone()
        update(other, name)
        other.zero_grad()
        seen[name] = {name: value.clone() for name, value in other.state_dict().items()}
        whole_bank(other)
        seen[name, "later"] = gradients(other)
    return seen


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_losses_and_gradients(strategy: str, ranks: list[Any], reference: dict[str, Any]) -> None:
    loss = torch.stack([rank[strategy]["loss"] for rank in ranks]).mean()
    assert loss.item() == pytest.approx(reference["loss"].item(), rel=1e-10)
    for rank in ranks:
        assert error(rank[strategy]["gradients"], reference["gradients"]) < 1e-10
    assert len(reference["gradients"]) == len(list(tiny().parameters()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_clipped_by_the_norm_of_all(strategy: str, ranks: list[Any], reference: dict[str, Any]) -> None:
    """Neither parts forgotten nor replicas counted twice."""
    assert reference["norm"] > 2 * MAX_NORM
    for rank in ranks:
        norm = rank[strategy]["norm"]
        assert type(norm) is Tensor and norm.ndim == 0 and norm.item() == pytest.approx(reference["norm"].item(), 1e-10)
        assert error(rank[strategy]["clipped"], reference["clipped"]) < 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_updates_equal_one_process(strategy: str, ranks: list[Any], reference: dict[str, Any]) -> None:
    for name in OPTIMIZERS:
        moved = [(reference[name][key] - value).abs().max() for key, value in tiny().state_dict().items()]
        assert max(moved) > 0.01
        for rank in ranks:
            assert_weights(rank[strategy][name], reference[name])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_export_and_what_comes_after_it(strategy: str, ranks: list[Any], reference: dict[str, Any]) -> None:
    first, *others = (rank[strategy] for rank in ranks)
    assert all(rank["weights"] == {} and "type" not in rank for rank in others)  # only rank 0 has the memory for it
    assert first["names"] == list(tiny().state_dict())
    assert_weights(first["weights"], reference[OPTIMIZERS[-1]])
    # Another bank with these weights: the evaluation in between has left nothing behind.
    assert error(first["later"], reference[OPTIMIZERS[-1], "later"]) < 1e-6


def assert_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        # Adam moves a parameter whose gradient is nothing but rounding by little more than rounding.
        torch.testing.assert_close(
            value, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_features_outside_forward_and_on_the_copy(strategy: str, ranks: list[Any]) -> None:
    first = ranks[0][strategy]
    assert first["type"] is M2EncoderForPreTraining
    assert first["sharded"] is (strategy != "ddp")
    for rank in ranks:
        torch.testing.assert_close(rank[strategy]["embeds"], first["copied embeds"], rtol=1e-12, atol=1e-14)
        normalised = F.normalize(first["copied embeds"], dim=-1)
        torch.testing.assert_close(rank[strategy]["forward"], normalised, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_computes_in_half_and_keeps_masters(strategy: str, ranks: list[Any], reference: dict[str, Any]) -> None:
    loss = torch.stack([rank[strategy, "bf16"]["loss"] for rank in ranks]).mean()
    assert loss.item() == pytest.approx(reference["loss"].item(), rel=0.03) and loss != reference["loss"]
    seen = ranks[0][strategy, "bf16"]
    assert seen["dtypes"] == {torch.float32} and seen["embeds"] == torch.bfloat16
    flat = [torch.cat([g.flatten() for g in x.values()]) for x in (seen["gradients"], reference["gradients"])]
    assert F.cosine_similarity(*flat, dim=0) > 0.98


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_heads(strategy: str, ranks: list[Any]) -> None:
    model = tiny()
    model.pretraining_heads.requires_grad_(False)
    whole_bank(model, only_contrastive)
    for rank in ranks:
        for seen in rank[strategy, "frozen"]:
            assert error(seen, gradients(model)) < 1e-10
            assert not any(name.startswith("pretraining_heads") for name in seen)


def test_hsdp_reduces_across_groups_once(ranks: list[Any], reference: dict[str, Any]) -> None:
    for rank in ranks:
        deferred, often = rank["deferred"], rank["not deferred"]
        assert error(deferred[0], reference["gradients"]) < 1e-10
        assert error(often[0], reference["gradients"]) < 1e-10
        assert 0 < K * deferred[1] == often[1]


def test_a_wrong_mean_is_noticed(ranks: list[Any], reference: dict[str, Any]) -> None:
    """Sums over ranks instead of means, and one gradient that was counted by every replica."""
    got = ranks[0]["hsdp"]["gradients"]
    assert error({name: WORLD * value for name, value in got.items()}, reference["gradients"]) > 1
    assert error(got | {"logit_scale": 2 * got["logit_scale"]}, reference["gradients"]) > 0.9


# ---- torch.compile -------------------------------------------------------------------------------------------------


def compiled_case() -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and graphs, with stochastic depth and recomputed activations."""
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    # Tracing, autograd and hooks as with inductor, without the minutes that generating C++ takes.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    config.fail_on_recompile_limit_hit = True
    model = tiny(drop_path_rate=0.3)
    distributed = spread("fsdp", model, compile=True, gradient_checkpointing=True)
    torch.manual_seed(dist.get_rank())
    loss = bank(distributed)
    return loss, gradients(distributed.module), counters["stats"]["unique_graphs"]


def eager_case() -> tuple[Tensor, dict[str, Tensor]]:
    distributed = spread("fsdp", tiny(drop_path_rate=0.3))
    torch.manual_seed(dist.get_rank())
    return bank(distributed), gradients(distributed.module)


def test_compiled_equals_eager() -> None:
    compiled, eager = run_distributed(compiled_case, 2, timeout=500), run_distributed(eager_case, 2)
    for (loss, seen, graphs), (expected_loss, expected) in zip(compiled, eager, strict=True):
        assert graphs >= 2 and loss.item() == pytest.approx(expected_loss.item(), rel=1e-9)
        assert error(seen, expected) < 1e-9


# ---- Settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy, size, world, group",
    [("ddp", None, 1, 1), ("fsdp", None, 8, 8), ("hsdp", 8, 256, 8), ("hpz", 16, 32, 16), ("hsdp", 4, 8, 4)],
)
def test_legal_settings(strategy: str, size: int | None, world: int, group: int) -> None:
    assert ShardingConfig(strategy, size).check(world) == group


def test_a_group_is_a_node_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ShardingConfig("hsdp").check(32) == 8
    with pytest.raises(ValueError, match="shard_size 8 .LOCAL_WORLD_SIZE. does not.*fsdp"):
        ShardingConfig("hsdp").check(8)


@pytest.mark.parametrize(
    "strategy, size, world, message",
    [
        ("hsdp", 3, 8, "hsdp.*8 ranks.*shard_size 3.*nearest are 2 and 4"),
        ("hpz", 32, 32, "nearest are 16"),
        ("hsdp", 1, 4, "nearest are 2"),
        ("hsdp", 0, 4, "nearest are 2"),
        ("hsdp", 2, 1, "1 has none.*fsdp"),
        ("hsdp", None, 1, "1 has none"),
        ("hsdp", 7, 7, "7 has none"),
        ("ddp", 2, 4, "ddp has no groups.*2"),
        ("zero3", None, 4, "zero3.*ddp, fsdp, hsdp, hpz"),
    ],
)
def test_impossible_settings(strategy: Any, size: int | None, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardingConfig(strategy, size).check(world)


def test_without_processes() -> None:
    distributed = distribute(tiny(), ShardingConfig(), device="cpu")
    assert distributed.model is distributed.module
    with distributed.no_sync():
        whole_bank(distributed.model)
    assert distributed.clip_grad_norm_(1e9) > 0 and distributed.full_state_dict().keys() == tiny().state_dict().keys()
    with pytest.raises(ValueError, match="fsdp needs processes.*torchrun"):
        distribute(tiny(), ShardingConfig("fsdp"), device="cpu")
