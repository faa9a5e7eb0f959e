"""LAMB by hand, parameter groups on the real model, the schedule's end points."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import math
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement

from modeling_m2encoder import M2EncoderConfig, M2EncoderModel
from tests.distributed import run_distributed
from training.optim import Lamb, build_optimizer, global_norms, parameter_groups, warmup_cosine

# A matrix, a bias, a convolution, a vector shorter than the ranks, `logit_scale`, and more rows than ranks but not a
# multiple of them.
SHAPES = [(8, 6), (8,), (5, 3, 2, 2), (3,), (1,), (7, 2)]
STEPS = 5


def test_one_lamb_step_by_hand() -> None:
    """p = (3, 4), g = (0.1, -0.2). After one step with bias correction m^ = g and v^ = g^2, so m^/sqrt(v^) = (1, -1);
    u = (1, -1) + 0.05 (3, 4) = (1.15, -0.8); |p| = 5, |u| = sqrt(1.3225 + 0.64) = 1.4008926...
    """
    p = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    p.grad = torch.tensor([[0.1, -0.2]], dtype=torch.float64)
    Lamb([p], lr=0.01, eps=0.0, weight_decay=0.05).step()
    ratio = 5 / math.sqrt(1.9625)
    expected = [3 - 0.01 * ratio * 1.15, 4 + 0.01 * ratio * 0.8]
    assert p.detach()[0].tolist() == pytest.approx(expected, rel=1e-14)


def lamb_in_plain_python(p: list[float], grads: list[list[float]], lr: float, wd: float) -> list[float]:
    beta1, beta2, eps = 0.9, 0.98, 1e-6
    m, v = [0.0] * len(p), [0.0] * len(p)
    for t, g in enumerate(grads, start=1):
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g, strict=True)]
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g, strict=True)]
        u = [
            (a / (1 - beta1**t)) / (math.sqrt(b / (1 - beta2**t)) + eps) + wd * w
            for a, b, w in zip(m, v, p, strict=True)
        ]
        ratio = math.hypot(*p) / math.hypot(*u) if wd and any(p) and any(u) else 1.0
        p = [w - lr * ratio * b for w, b in zip(p, u, strict=True)]
    return p


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_many_lamb_steps_equal_plain_python(weight_decay: float) -> None:
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (1, 1, 2), (1,)]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    starts = [p.detach().flatten().tolist() for p in params]
    grads = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(7)]
    optimizer = Lamb(params, lr=0.02, weight_decay=weight_decay)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
    for i, p in enumerate(params):
        flat = [step[i].flatten().tolist() for step in grads]
        expected = lamb_in_plain_python(starts[i], flat, 0.02, weight_decay)
        assert p.detach().flatten().tolist() == pytest.approx(expected, rel=1e-12)


def timm_lamb() -> type[torch.optim.Optimizer]:
    """timm's LAMB out of the installed package. `import timm` imports torchvision, its optimizers need only torch."""
    try:
        folder = importlib.metadata.distribution("timm").locate_file("timm/optim")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("timm is not installed: pip install --no-deps -c constraints.txt timm (it would bring torchvision)")
    package = types.ModuleType("timm_optim")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    return importlib.import_module("timm_optim.lamb").Lamb


def starts_and_gradients() -> tuple[list[Tensor], list[list[Tensor]]]:
    """The parameters at first, and their gradients in each step."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]

    return draw(), [draw() for _ in range(STEPS)]


def own_part(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's part of a tensor that every rank has, without communication."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def run_lamb(kind: type[torch.optim.Optimizer], params: list[nn.Parameter], **settings: Any) -> None:
    """`STEPS` updates: matrices with one weight decay, the convolution with another, the rest without."""
    groups = [
        {"params": [params[0], params[5]], "weight_decay": 0.05},
        {"params": [params[2]], "weight_decay": 0.2, "lr": 0.01},
        {"params": [params[1], params[3], params[4]], "weight_decay": 0.0},
    ]
    optimizer = kind(groups, lr=0.02, betas=(0.9, 0.98), eps=1e-6, **settings)
    for gradients in starts_and_gradients()[1]:
        for parameter, gradient in zip(params, gradients, strict=True):
            if isinstance(parameter, DTensor):
                gradient = own_part(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()


def test_lamb_equals_timm() -> None:
    ours, theirs = ([nn.Parameter(start) for start in starts_and_gradients()[0]] for _ in range(2))
    run_lamb(Lamb, ours)
    run_lamb(timm_lamb(), theirs, max_grad_norm=None)  # clipping is not the optimizer's affair here
    for own, expected, start in zip(ours, theirs, starts_and_gradients()[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)
        assert (own - start).abs().max() > 0.01


def sharded_lamb() -> dict[str, Any]:
    """Whole parameters after `STEPS` updates on a mesh of one and of two dimensions, and the collectives of them."""
    results: dict[str, Any] = {}
    for name, shape, placements in [
        ("fsdp", (dist.get_world_size(),), [Shard(0)]),
        ("hsdp", (2, 2), [Replicate(), Shard(0)]),
        ("two dimensions", (2, 2), [Shard(0), Shard(0)]),
    ]:
        mesh = init_device_mesh("cpu", shape)
        params = [nn.Parameter(own_part(start, mesh, placements)) for start in starts_and_gradients()[0]]
        empty = sum(parameter.to_local().numel() == 0 for parameter in params)
        with CommDebugMode() as communication:
            run_lamb(Lamb, params)
        collectives = communication.get_total_counts()
        results[name] = [parameter.full_tensor().detach() for parameter in params], collectives, empty
    mesh = init_device_mesh("cpu", (2, 2))
    scalar = own_part(torch.tensor(-3.0), mesh, [Replicate(), Replicate()])
    rows = own_part(torch.tensor([[3.0], [4.0], [0.0]]), mesh, [Replicate(), Shard(0)])
    results["norms"] = global_norms([scalar, rows, torch.tensor([5.0, 12.0])]).tolist()
    with pytest.raises(ValueError, match="still to be reduced"):
        global_norms([DTensor.from_local(torch.ones(2), mesh, [Partial(), Partial()])])
    return results


def test_sharded_lamb_equals_whole_and_reduces_once_per_step() -> None:
    whole = [nn.Parameter(start) for start in starts_and_gradients()[0]]
    run_lamb(Lamb, whole)
    ranks = run_distributed(sharded_lamb, 4, timeout=200)
    assert ranks[3]["fsdp"][2] == 3  # of 5, 3 and 1 rows the last of four ranks holds nothing
    for results in ranks:
        norms = results.pop("norms")
        assert norms == pytest.approx([3.0, 5.0, 13.0], rel=1e-6)
        for name, (params, collectives, _) in results.items():
            assert collectives == STEPS * (2 if name == "two dimensions" else 1), (name, collectives)
            for parameter, expected in zip(params, whole, strict=True):
                torch.testing.assert_close(parameter, expected.detach(), rtol=1e-12, atol=1e-14)


def test_trust_ratio_is_one_without_a_norm() -> None:
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    still = nn.Parameter(torch.zeros(2, 2))
    still.grad = torch.zeros(2, 2)
    Lamb([zero, still], lr=0.1).step()
    assert torch.allclose(zero, torch.full((2, 2), -0.1), atol=1e-6)
    assert torch.equal(still, torch.zeros(2, 2))


def test_a_parameter_that_joins_later_has_its_own_bias_correction() -> None:
    early, late = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = Lamb([early, late], lr=0.1)
    early.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(late, torch.ones(2, 2))
    late.grad = torch.full((2, 2), 3.0)
    optimizer.step()
    alone = nn.Parameter(torch.ones(2, 2))
    alone.grad = torch.full((2, 2), 3.0)
    Lamb([alone], lr=0.1).step()
    assert torch.equal(late, alone)


def test_lamb_resumes_bit_exactly_and_follows_a_scheduler() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(model, "lamb", lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step + 1, 2, 6, 0.0))
    data = torch.randn(6, 5, 4)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: object, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(data[step]).square().mean().backward()
            optimizer.step()
            schedule.step()

    train(model, optimizer, schedule, range(3))
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, "lamb", lr=0.1)
    other_schedule = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: warmup_cosine(step + 1, 2, 6, 0.0))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_schedule.load_state_dict(schedule.state_dict())
    train(model, optimizer, schedule, range(3, 6))
    train(other, resumed, other_schedule, range(3, 6))
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    assert optimizer.param_groups[0]["lr"] == 0.0  # the schedule stands after the last update


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_optimizers_minimise(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    optimizer = build_optimizer(model, name, lr=0.02)

    def loss() -> Tensor:
        return (model(x)[:, 0] - x.prod(dim=1)).square().mean()

    before = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * before


def test_bf16_parameters_have_fp32_norms() -> None:
    """65,536 ones: the norm is 256; a bf16 sum of squares would stop growing at 256 and give 16."""
    p = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    Lamb([p], lr=0.5, weight_decay=0.05).step()
    # u = 1.05 everywhere, so lr * ratio * u = lr * |p|/|u| * 1.05 = 0.5.
    assert torch.allclose(p.float(), torch.full((256, 256), 0.5), atol=0.01)


def test_groups_of_the_real_model() -> None:
    model = M2EncoderModel(M2EncoderConfig.from_size("nano", vocab_size=50))
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0.0
    assert sorted(map(id, decayed["params"] + plain["params"])) == sorted(names)
    with_decay = {names[id(p)] for p in decayed["params"]}
    without = {names[id(p)] for p in plain["params"]}
    assert all(name.endswith(".weight") for name in with_decay)
    assert not any("norm" in name or "embeddings.word" in name or "position" in name for name in with_decay)
    assert {"logit_scale"} <= without
    for word in ("cls_token", "word_embeddings", "position_embeddings", "norm", "bias"):
        assert any(word in name for name in without), word
    # What is left without decay beside these would be a matrix that the rule forgot.
    assert all(
        any(word in name for word in ("token", "embeddings.", "norm", "bias", "logit_scale")) for name in without
    )


def test_groups_leave_out_frozen_and_repeat_nothing() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "cls": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model["cls"].requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert len(decayed["params"]) == 1 and len(plain["params"]) == 2
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable"):
        parameter_groups(model, 0.1)
    with pytest.raises(ValueError, match="weight_decay"):
        parameter_groups(nn.Linear(1, 1), -1.0)


def test_schedule_by_hand() -> None:
    values = [warmup_cosine(step, 4, 12, 0.1) for step in range(15)]
    assert values[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert values[8] == pytest.approx(0.55, abs=1e-12)  # half way: the mean of 1 and 0.1
    assert values[12:] == [0.1, 0.1, 0.1]
    assert all(a > b for a, b in zip(values[4:12], values[5:13], strict=True))
    assert warmup_cosine(0, 0, 2, 0.0) == 1.0 and warmup_cosine(1, 0, 2, 0.0) == pytest.approx(0.5)
    assert warmup_cosine(3, 4, 4, 0.0) == 0.75 and warmup_cosine(4, 4, 4, 0.0) == 0.0


@pytest.mark.parametrize(
    "arguments", [(0, 5, 4, 0.0), (0, -1, 4, 0.0), (0, 0, 0, 0.0), (0, 0, 4, 1.5), (-1, 0, 4, 0.0)]
)
def test_schedule_refuses(arguments: tuple[int, int, int, float]) -> None:
    with pytest.raises(ValueError, match="warmup_steps"):
        warmup_cosine(*arguments)


def test_bad_hyperparameters() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="lamb, adamw"):
        build_optimizer(model, "sgd", lr=0.1)
    for wrong in ({"lr": -1.0}, {"lr": 1.0, "betas": (0.9, 1.0)}, {"lr": 1.0, "eps": -1.0}):
        with pytest.raises(ValueError, match="Expected lr"):
            build_optimizer(model, "lamb", **wrong)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense"):
        Lamb(embedding.parameters(), lr=0.1).step()
