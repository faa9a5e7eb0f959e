"""LAMB by hand, parameter groups on the real model, the schedule's end points."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from modeling_m2encoder import M2EncoderConfig, M2EncoderModel
from training.optim import Lamb, build_optimizer, parameter_groups, warmup_cosine


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
