"""The bank's schedule in fp64 against autograd on the whole batch in one process; legal and impossible settings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from training import bank
from training.bank import BankPlan, MicroBatchOutput, banked_backward, plan_bank
from training.sharding import ShardingConfig, distribute

ROWS, INPUT, HIDDEN, EMBED = 3, 5, 8, 6
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
LIMIT = LIMITS[torch.float64]
CASES = [(k, retain) for k in (1, 2, 3) for retain in sorted({0, 1, k})]


class Layer(nn.Sequential):
    """What both branches share."""


class TwoTowers(nn.Module):
    """Two residual branches that share a layer, with dropout and drop-path, and a decoder with dropout of its own."""

    _no_split_modules = ["Layer"]

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(INPUT, HIDDEN), nn.Linear(INPUT, HIDDEN)
        self.shared = Layer(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Dropout(0.3))
        self.projection = nn.Linear(HIDDEN, EMBED, bias=False)
        self.decoder = nn.Linear(HIDDEN, INPUT)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))

    def _embed(self, stem: nn.Linear, rows: Tensor) -> tuple[Tensor, Tensor]:
        hidden = stem(rows)
        kept = torch.rand(len(rows), 1, dtype=rows.dtype) > 0.2  # drop-path: whole branches of single samples
        hidden = hidden + self.shared(hidden) * kept / 0.8
        return hidden, F.normalize(self.projection(hidden), dim=-1)

    def forward(self, image: Tensor, text: Tensor, with_auxiliary: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        image, text = image.to(self.projection.weight.dtype), text.to(self.projection.weight.dtype)
        states, image_embeds = self._embed(self.image, image)
        _, text_embeds = self._embed(self.text, text)
        if not with_auxiliary:
            return image_embeds, text_embeds, None
        return image_embeds, text_embeds, (self.decoder(F.dropout(states, 0.4)) - text).square().mean()


def towers(dtype: torch.dtype = torch.float64) -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers().to(dtype)


def micro_batch(rank: int, j: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + j)
    return torch.randn(2, ROWS, INPUT, generator=generator, dtype=torch.float64).unbind()


def run_bank(
    model: nn.Module, logit_scale: Tensor, rank: int, k: int, retain: int, **settings: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One bank; its metrics, and the random states in which the micro-batches were first computed."""
    states: dict[int, Tensor] = {}

    def model_step(j: int, with_auxiliary: bool) -> MicroBatchOutput:
        states.setdefault(j, torch.get_rng_state())
        image, text, auxiliary = model(*micro_batch(rank, j), with_auxiliary)
        metrics = {} if auxiliary is None else {"decoder": auxiliary.detach()}
        return MicroBatchOutput(image, text, None if auxiliary is None else 0.3 * auxiliary, metrics)

    torch.manual_seed(1000 + rank)  # other random numbers on every rank
    metrics = banked_backward(model_step, range(k), logit_scale, retain=retain, **settings)
    return metrics, [states[j] for j in range(k)]


def reference(random_states: list[list[Tensor]], groups: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Loss and gradients of all ranks' pairs at once: torch's cross_entropy per group, one backward."""
    model = towers(dtype)
    k = len(random_states[0])
    images, texts, auxiliaries = [], [], []
    for rank, states in enumerate(random_states):
        for j, state in enumerate(states):
            torch.set_rng_state(state)
            image, text, auxiliary = model(*micro_batch(rank, j), True)
            images.append(image), texts.append(text), auxiliaries.append(auxiliary)
    losses = []
    for v, t in zip(torch.cat(images).chunk(groups), torch.cat(texts).chunk(groups), strict=True):
        logits = model.logit_scale.exp() * v @ t.T
        target = torch.arange(len(v))
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    itc, auxiliary = torch.stack(losses).mean(), torch.stack(auxiliaries).mean()
    assert len(images) == len(random_states) * k
    loss = itc + 0.3 * auxiliary
    loss.backward()
    values = {"loss": loss.detach(), "loss_itc": itc.detach(), "decoder": auxiliary.detach()}
    return values | gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, in full."""
    full = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        full[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return full


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == expected.keys()
    return {name: ((got[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected}


@pytest.mark.parametrize("k, retain", CASES)
def test_one_process_equals_the_whole_batch(k: int, retain: int) -> None:
    model = towers()
    metrics, states = run_bank(model, model.logit_scale, 0, k, retain)
    assert max(errors(metrics | gradients(model), reference([states], 1)).values()) < LIMIT


def test_retain_changes_nothing_but_the_work() -> None:
    """Dropout included: the same gradients for every r, and the random state after the bank does not depend on it."""
    results, after, forwards = [], [], []
    for retain in range(4):
        model, calls = towers(), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        metrics, _ = run_bank(model, model.logit_scale, 0, 3, retain)
        results.append(metrics | gradients(model))
        after.append(torch.get_rng_state())
        forwards.append((calls.count(False), calls.count(True)))
    assert forwards == [(3, 3), (2, 3), (1, 3), (0, 3)]
    for result, state in zip(results[1:], after[1:], strict=True):
        assert max(errors(result, results[0]).values()) < LIMIT and torch.equal(state, after[0])


def test_gradients_are_added_and_dropout_differs_between_banks_and_micro_batches() -> None:
    model = towers()
    _, states = run_bank(model, model.logit_scale, 0, 2, 1)
    once = gradients(model)
    once = {name: value.clone() for name, value in once.items()}
    run_bank(model, model.logit_scale, 0, 2, 1)
    assert max(errors(gradients(model), {name: 2 * value for name, value in once.items()}).values()) < LIMIT
    assert not torch.equal(*states)


def cases_of(world: int, group_sizes: list[int]) -> list[tuple[torch.dtype, int, int, int]]:
    """dtype, g, k and r: all of them in fp64, and in fp32 the longest bank over all ranks."""
    exact = [(torch.float64, size, *case) for size, case in itertools.product(group_sizes, CASES)]
    return exact + [(torch.float32, world, 3, retain) for retain in (0, 1, 3)]


def ranks_of(strategies: list[str], group_sizes: list[int]) -> dict[Any, Any]:
    """This rank's result for every strategy and case: metrics and reduced gradients, and its random states."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = {size: BankPlan(world, size, 1, ROWS).make_group() for size in group_sizes}
    results = {}
    for strategy in strategies:
        config = ShardingConfig(strategy, world // 2 if strategy == "hsdp" else None)
        models = {dtype: distribute(towers(dtype), config, device="cpu") for dtype in LIMITS}
        for dtype, group_size, k, retain in cases_of(world, group_sizes):
            distributed = models[dtype]
            distributed.module.zero_grad()
            metrics, states = run_bank(
                distributed.model,
                distributed.module.logit_scale,
                rank,
                k,
                retain,
                group=groups[group_size],
                no_sync=distributed.no_sync,
                tile=4,
            )
            values = {name: value.clone() for name, value in gradients(distributed.module).items()}
            results[strategy, dtype, group_size, k, retain] = metrics | values, states
    return results


@pytest.mark.parametrize(
    "world, strategies", [(2, ["ddp"]), (4, ["ddp", "fsdp", "hsdp"]), (8, ["ddp", "fsdp", "hsdp"])]
)
def test_processes_equal_the_whole_batch(world: int, strategies: list[str]) -> None:
    group_sizes = [size for size in (1, 2, 4, 8) if size <= world]
    ranks = run_distributed(ranks_of, world, strategies, group_sizes, timeout=500)
    assert len(ranks[0]) == len(strategies) * len(cases_of(world, group_sizes))
    references: dict[Any, Any] = {}
    for case in ranks[0]:
        _, dtype, group_size, k, _ = case
        values, states = zip(*(result[case] for result in ranks), strict=True)
        # The gradients are reduced: alike on every rank. The losses are each rank's own.
        got = {name: torch.stack([value[name] for value in values]).mean(0) for name in values[0]}
        for name in dict(towers().named_parameters()):
            assert all(torch.equal(value[name], values[0][name]) for value in values), (case, name)
        # Neither the strategy nor `retain` may change what is random, so that all of them have one reference.
        if (dtype, group_size, k) not in references:
            references[dtype, group_size, k] = states, reference(list(states), world // group_size, dtype)
        expected_states, expected = references[dtype, group_size, k]
        assert all(torch.equal(torch.stack(x), torch.stack(y)) for x, y in zip(states, expected_states, strict=True))
        seen = errors(got, expected)
        assert max(seen.values()) < LIMITS[dtype], (case, seen)


def test_the_comparison_notices_faults_of_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults that are common elsewhere, put into the code under test, must be seen, and each where it belongs."""
    backward = bank._backward

    def auxiliary_losses_added(outputs: Any, gradients: Any, k: int, scale: Any) -> None:
        backward(outputs, gradients, 1, scale)

    def scale_in_every_backward(outputs: Any, gradients: Any, k: int, scale: Any) -> None:
        backward(outputs, gradients, k, scale)
        if scale is not None:
            for _ in range(k - 1):
                torch.autograd.backward([scale[0]], [scale[1]])

    def features_not_summed_over_the_group(outputs: Any, gradients: Any, k: int, scale: Any) -> None:
        backward(outputs, [(image / k, text / k) for image, text in gradients], k, scale)

    for fault, name, error in [
        (auxiliary_losses_added, "decoder.weight", 2.0),
        (scale_in_every_backward, "logit_scale", 2.0),
        (features_not_summed_over_the_group, "projection.weight", 2 / 3),
    ]:
        monkeypatch.setattr(bank, "_backward", fault)
        model = towers()
        metrics, states = run_bank(model, model.logit_scale, 0, 3, 1)
        seen = errors(metrics | gradients(model), reference([states], 1))
        assert seen[name] == pytest.approx(error) and seen["loss"] < LIMIT, (fault, seen)


def test_the_comparison_notices_another_objective() -> None:
    model = towers()
    metrics, states = run_bank(model, model.logit_scale, 0, 3, 1)
    got = metrics | gradients(model)
    # Fresh random numbers in the second pass, a bank without replay.
    other = reference([[*states[:2], states[0]]], 1)
    assert errors(got, other)["projection.weight"] > 1e-3
    # Groups of a third of the size.
    assert errors(got, reference([states], 3))["projection.weight"] > 1e-2


def test_frozen_scale_and_no_auxiliary_losses() -> None:
    model = towers()
    model.logit_scale.requires_grad_(False)
    rows = [micro_batch(0, j) for j in range(2)]

    def model_step(pair: tuple[Tensor, Tensor], with_auxiliary: bool) -> MicroBatchOutput:
        return MicroBatchOutput(*model(*pair, False)[:2])

    metrics = banked_backward(model_step, rows, model.logit_scale, retain=1)
    assert model.logit_scale.grad is None and model.image.weight.grad is not None and model.decoder.weight.grad is None
    assert metrics.keys() == {"loss", "loss_itc"} and metrics["loss"] == metrics["loss_itc"]


def order_of_gathers() -> list[str]:
    """What happens in which order on this rank."""
    events: list[str] = []
    start, model = dist.all_gather, towers()

    def recorded(places: list[Tensor], rows: Tensor, **settings: Any) -> Any:
        work = start(places, rows, **settings)
        if not settings.get("async_op"):
            return work
        events.append("gather")
        wait = work.wait
        return type("Recorded", (), {"wait": lambda self: (events.append("wait"), wait())})()

    dist.all_gather = recorded
    model.register_forward_hook(lambda *_: events.append("forward"))
    run_bank(model, model.logit_scale, dist.get_rank(), 3, 0)
    dist.all_gather = start
    return events


def test_gathers_run_beside_the_next_forward() -> None:
    expected = ["forward", "gather"] * 3 + ["wait"] * 3 + ["forward"] * 3
    assert run_distributed(order_of_gathers, 2) == [expected] * 2


def disagreeing_ranks() -> list[str]:
    """Messages when the ranks differ in k, in B, and when one brings images and texts that differ."""
    rank = dist.get_rank()
    rows = [torch.ones(2, 4), torch.ones(2 + rank, 4), torch.ones(2, 4)]
    texts = [*rows[:2], torch.ones(2, 4 + rank)]
    messages = []
    for case, (image, text) in enumerate(zip(rows, texts, strict=True)):
        micro_batches = range(1 + rank) if case == 0 else range(2)
        output = MicroBatchOutput(image, text)
        with pytest.raises(ValueError, match="Every rank") as caught:
            banked_backward(lambda *_, o=output: o, micro_batches, torch.zeros(1), retain=0)
        messages.append(str(caught.value))
    return messages


def test_ranks_that_disagree_all_raise() -> None:
    first, second = run_distributed(disagreeing_ranks, 2, timeout=30)
    assert first == second
    assert "[[1, 2, 4, 4], [2, 2, 4, 4]]" in first[0] and "[2, 3, 4, 4]" in first[1] and "[0, 0, 0, 0]" in first[2]


@pytest.mark.parametrize("k, retain", [(0, 0), (2, 3), (2, -1)])
def test_bad_retain(k: int, retain: int) -> None:
    with pytest.raises(ValueError, match="retain"):
        banked_backward(
            lambda *_: MicroBatchOutput(torch.ones(2, 4), torch.ones(2, 4)), range(k), torch.zeros(1), retain=retain
        )


def test_micro_batches_that_differ() -> None:
    outputs = [MicroBatchOutput(torch.ones(rows, 4), torch.ones(rows, 4)) for rows in (2, 3)]
    with pytest.raises(ValueError, match="alike"):
        banked_backward(lambda j, _: outputs[j], range(2), torch.zeros(1), retain=0)


@pytest.mark.parametrize(
    "world, settings, group_size, bank_size, per_gpu",
    [
        # Table 6: three ways to 16,384 on 32 GPUs.
        (32, {"batch_size": 16384}, 32, 16384, 512),
        (32, {"batch_size": 32768, "group_size": 16}, 16, 16384, 1024),
        (32, {"batch_size": 65536, "bank_steps": 2, "group_nodes": 1, "gpus_per_node": 8}, 8, 16384, 1024),
        # Table 10: overall 131,072 and banks of 32,768, here on 256 GPUs.
        (256, {"batch_size": 131072, "bank_size": 32768, "bank_steps": 4}, 64, 32768, 128),
        (1, {"batch_size": 2}, 1, 2, 2),
    ],
)
def test_legal_plans(world: int, settings: dict[str, Any], group_size: int, bank_size: int, per_gpu: int) -> None:
    plan = plan_bank(world, **settings)
    assert (plan.group_size, plan.bank_size, plan.batch_per_gpu) == (group_size, bank_size, per_gpu)
    assert plan.num_groups * plan.bank_size == settings["batch_size"]


@pytest.mark.parametrize(
    "world, settings, message",
    [
        # The paper's 10B row.
        (
            256,
            {"batch_size": 143360, "bank_size": 32768},
            r"4\.375 banks.*17920 \(8 groups of 32 GPUs\) and 35840 \(4 groups of 64.*131072 \(4 groups\) or 262144",
        ),
        (4, {"batch_size": 1000, "bank_steps": 3}, r"83\.333 per GPU.*996 \(83 per GPU\) and 1008 \(84 per GPU\)"),
        (8, {"batch_size": 3}, r"nearest are 8 \(1 per GPU\)\."),
        (8, {"batch_size": 64, "group_size": 3}, "group_size 3 does not divide the 8 GPUs.*2 and 4"),
        (8, {"batch_size": 64, "group_size": 9}, "nearest: 8"),
        (8, {"batch_size": 64, "group_size": 0}, "nearest: 1"),
        (24, {"batch_size": 48, "group_nodes": 2, "gpus_per_node": 8}, "3 nodes.*nearest: 1 and 3"),
        (12, {"batch_size": 48, "group_nodes": 1, "gpus_per_node": 8}, "whole nodes"),
        (8, {"batch_size": 64, "bank_size": 0}, "nearest bank_size: 8"),
        (8, {"batch_size": 64, "group_size": 2, "bank_size": 16}, "give one"),
        (2, {"batch_size": 2, "group_size": 1}, "one pair"),
        (0, {"batch_size": 2}, "world_size"),
        (1, {"batch_size": 2, "bank_steps": 0}, "bank_steps"),
    ],
)
def test_impossible_plans(world: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_bank(world, **settings)
