"""Optimizers, parameter groups and the learning-rate schedule. Tested by `pytest tests/training/test_optim.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.optim import AdamW, Optimizer

# Learned positions and tokens that are parameters of their own rather than rows of an nn.Embedding.
_NO_DECAY_NAMES = ("logit_scale", "cls_token", "mask_token", "position_embeddings")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as two groups: matrices and convolutions with weight decay, everything else without.

    Without decay, as ViT and BEiT training code has it: biases, norms and other vectors, `logit_scale`, class and mask
    tokens, position tables. Word embeddings too (as in GPT code, unlike BEiT's): a row whose token is not in the batch
    has no gradient, so that decay would be all that ever moves a rare word. Shared parameters are listed once.

    Args:
        model: any module; parameters with `requires_grad=False` are left out.
        weight_decay: of the first group, >= 0; the second group has 0.

    Raises:
        ValueError: for a negative weight decay, or when nothing is trainable.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}.")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or id(parameter) in embeddings or name.split(".")[-1] in _NO_DECAY_NAMES
        (plain if exempt else decayed).append(parameter)
    if not decayed and not plain:
        raise ValueError("The model has no trainable parameter: every requires_grad is False.")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Factor on the learning rate of update number `step`; the first update is number 1, the last `total_steps`.

    Linear from 0 at step 0 to exactly 1 at `warmup_steps`, then half a cosine to exactly `min_ratio` at `total_steps`;
    `min_ratio` after that.

    Raises:
        ValueError: unless 0 <= warmup_steps <= total_steps, total_steps >= 1, 0 <= min_ratio <= 1 and step >= 0.
    """
    if not (0 <= warmup_steps <= total_steps and total_steps >= 1 and 0 <= min_ratio <= 1 and step >= 0):
        raise ValueError(
            "Expected 0 <= warmup_steps <= total_steps, total_steps >= 1, 0 <= min_ratio <= 1 and step >= 0, got "
            f"{warmup_steps=}, {total_steps=}, {min_ratio=}, {step=}."
        )
    if step >= total_steps:
        return min_ratio
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2


class Lamb(Optimizer):
    """LAMB, version 3 of the paper (arXiv 1904.00962), with bias correction.

    For each parameter tensor p with gradient g: m and v are Adam's moments, u = m^/(sqrt(v^) + eps) + weight_decay * p,
    and p moves by -lr * (|p| / |u|) * u. The trust ratio |p| / |u| is 1 where either norm is 0. Groups with weight
    decay 0 (biases, norms, ...) take the plain Adam step with trust ratio 1, as NVLAMB and timm have it. Gradients are
    not clipped here.

    Sharded parameters (DTensors) move as whole ones do: the norms are those of whole parameters, all of them from one
    all-reduce per step and sharded mesh dimension. (ZeRO optimizers with LAMB often take norms of each rank's part.)

    Args:
        params: parameters or groups of them, see `parameter_groups`.
        lr: learning rate, >= 0.
        betas: decay of the two moments; the paper's (0.9, 0.98).
        eps: added to the root of the second moment.
        weight_decay: decoupled, inside the update that the trust ratio scales.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.05,
    ):
        _check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        adapted, updates, rates = [], [], []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            update = self._adam_update(params, [self._state_of(p) for p in params], group)
            if group["weight_decay"]:
                adapted += params
                updates += update
                rates += [group["lr"]] * len(params)
            else:
                torch._foreach_add_(_local(params), update, alpha=-group["lr"])
        if adapted:
            # After the loop, so that the norms of all groups travel together.
            norms = global_norms([*adapted, *adapted], [*_local(adapted), *updates])
            weight, update = norms.chunk(2)
            ratios = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
            factors = ratios * -ratios.new_tensor(rates)
            torch._foreach_mul_(updates, list(factors.unbind()))
            torch._foreach_add_(_local(adapted), updates)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            if parameter.grad.is_sparse:
                raise ValueError("Lamb takes dense gradients only: use nn.Embedding(sparse=False).")
            # On the CPU, as torch's own optimizers keep it: reading it never waits for the device.
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        return state

    @staticmethod
    def _adam_update(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        """u of each parameter, as far as this rank holds it; elementwise, so that shards need not know each other."""
        beta1, beta2 = group["betas"]
        grads = _local([p.grad for p in params])
        first, second = (_local([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
        steps = [state["step"].item() for state in states]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)

        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(denominator, group["eps"])
        update = torch._foreach_div(first, denominator)
        torch._foreach_div_(update, [1 - beta1**step for step in steps])
        if group["weight_decay"]:
            torch._foreach_add_(update, _local(params), alpha=group["weight_decay"])
        return update


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor; no copies."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def global_norms(tensors: Sequence[Tensor], parts: Sequence[Tensor] | None = None) -> Tensor:
    """The 2-norm of each whole tensor, [len(tensors)], alike on all ranks; summed up in fp32 or better.

    All norms travel together: one all-reduce for each mesh dimension over which DTensors are sharded, none without.
    Replicas are counted once, and a rank may hold nothing of a tensor.

    Args:
        tensors: of one device and at least one; plain tensors are whole on every rank.
        parts: this rank's parts, where they are not those of `tensors` but only laid out like them.

    Raises:
        ValueError: for a DTensor that is not reduced yet (`Partial`).
    """
    parts = _local(list(tensors)) if parts is None else list(parts)
    dtype = reduce(torch.promote_types, {part.dtype for part in parts}, torch.float32)
    norms = torch.stack(torch._foreach_norm(parts, 2, dtype=dtype))
    layouts: dict[tuple[DeviceMesh, tuple[Placement, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            layouts.setdefault((tensor.device_mesh, tensor.placements), []).append(i)
    for (mesh, placements), rows in layouts.items():
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"The norm of a tensor that is still to be reduced is not known: {placements}.")
        # Squares in fp64: those of small fp32 norms would vanish.
        squares = norms[rows].double().square()
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(squares, group=mesh.get_group(dimension))
        norms[rows] = squares.sqrt().to(dtype)
    return norms


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.05,
) -> Optimizer:
    """The optimizer called "lamb" or "adamw" over `parameter_groups(model, weight_decay)`.

    Defaults are Table 10's of the paper (arXiv 2401.15896).

    Raises:
        ValueError: for another name, or hyperparameters out of range.
    """
    optimizers: dict[str, type[Optimizer]] = {"lamb": Lamb, "adamw": AdamW}
    if name not in optimizers:
        raise ValueError(f"Unknown optimizer {name!r}: choose one of {', '.join(optimizers)}.")
    _check_hyperparameters(lr, betas, eps, weight_decay)
    return optimizers[name](parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps)


def _check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if lr < 0 or eps < 0 or weight_decay < 0 or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            "Expected lr, eps, weight_decay >= 0 and two betas in [0, 1), got "
            f"{lr=}, {eps=}, {weight_decay=}, {betas=}."
        )
