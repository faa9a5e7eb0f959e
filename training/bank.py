"""GBA-ITC: one contrastive loss over a bank of micro-batches, with exact gradients.

Tested by `pytest tests/training/test_bank.py`.

Shapes: B pairs of one micro-batch on one GPU, k micro-batches (`bank_steps`), g GPUs in a group (`group_size`), n GPUs
in all, N = g * B * k pairs in one loss, E embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from .losses import gather_rows, grouped_itc_loss


@dataclass(frozen=True)
class MicroBatchOutput:
    """What the model makes of one micro-batch."""

    image_embeds: Tensor
    """[B, E], L2-normalised."""
    text_embeds: Tensor
    """[B, E], row i belongs to image row i."""
    auxiliary_loss: Tensor | None = None
    """The weighted sum of this micro-batch's other losses (a mean over its pairs), None without any."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached values to report: their means over the micro-batches are returned."""


ModelStep = Callable[[Any, bool], MicroBatchOutput]
"""`model_step(micro_batch, with_auxiliary)`. Without the auxiliary losses it must draw the same random numbers for the
features as with them, that is, compute the features first; and it opens autocast itself, once per call."""


def banked_backward(
    model_step: ModelStep,
    micro_batches: Sequence[Any],
    logit_scale: Tensor,
    *,
    retain: int,
    group: dist.ProcessGroup | None = None,
    tile: int = 1024,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """Adds the gradients of one bank's loss: ITC over all N pairs, plus the mean of the auxiliary losses (section 2.3).

    The paper accumulates "through multiple forward passes with a single gradient backpropagation step". The graphs of
    the last `retain` micro-batches are kept for that; the features of the others are computed without a graph, and once
    more with one when their gradients are known (gradient caching, arXiv 2101.06983). Every micro-batch runs from a
    seed of its own, so the gradients are the same for every `retain`: it only trades memory for the forward passes of
    `k - retain` micro-batches. numpy's and Python's random numbers are not replayed.

    Gradients are exact in the sense of `grouped_itc_loss`: after the mean over all ranks that DDP and FSDP take, they
    are those of the mean of the groups' losses, and `logit_scale` receives its own once. The features of a micro-batch
    travel to the group while the next is computed.

    Args:
        model_step: runs the (wrapped) model on one micro-batch, see `ModelStep`.
        micro_batches: k of them with B pairs each; k and B are the same on every rank of the group.
        logit_scale: the model's parameter of one element, as it is outside of forward (under `fully_shard` a DTensor).
        retain: graphs to keep, from 0 (least memory) to k (least computation; one single backward).
        group: processes to contrast over; `None` as in `grouped_itc_loss`.
        tile: see `grouped_itc_loss`.
        no_sync: makes the context of every forward and backward but the last, in which gradients need not be reduced
            over the ranks: `partial(accelerator.no_sync, model)` for DDP, deferral of the all-reduce for HSDP.

    Returns:
        0-d detached tensors of this rank: `loss`, `loss_itc`, and the means of the micro-batches' `metrics`.

    Raises:
        ValueError: for `retain` outside [0, k], no micro-batch, features that differ in shape between micro-batches, or
            (on every rank of the group) between ranks.
    """
    k = len(micro_batches)
    if not (k >= 1 and 0 <= retain <= k):
        raise ValueError(f"retain must lie in [0, k] for k >= 1 micro-batches, got retain {retain} and k {k}.")
    kept_from = k - retain
    seeds = torch.randint(2**62, (k,)).tolist()
    bank = _Bank(k, group)

    def run(j: int, gradients: bool) -> MicroBatchOutput:
        with torch.set_grad_enabled(gradients), _seeded(seeds[j], logit_scale.device):
            return model_step(micro_batches[j], gradients)

    # ---- Forward. DDP prepares its reduction in a forward, so the one before the last backward is not under no_sync.
    kept = []
    for j in range(k):
        with nullcontext() if retain == k == j + 1 else no_sync():
            output = run(j, gradients=j >= kept_from)
        bank.add(output.image_embeds.detach(), output.text_embeds.detach())
        if j >= kept_from:
            kept.append(output)

    # ---- One loss; its gradients stop at the features.
    scale = logit_scale.full_tensor() if isinstance(logit_scale, DTensor) else logit_scale
    scale = scale.detach().requires_grad_(logit_scale.requires_grad)
    loss_itc, gradients = bank.loss_and_gradients(scale, tile)

    # ---- Backward. Kept graphs first and all at once: DDP takes the next backward for the one its forward announced.
    reports = []
    if kept:
        with nullcontext() if retain == k else no_sync():
            _backward(kept, gradients[kept_from:], k, (logit_scale, scale.grad) if retain == k else None)
        reports = [_report(output) for output in kept]
        kept.clear()
    for j in range(kept_from):
        last = j == kept_from - 1
        with nullcontext() if last else no_sync():
            output = run(j, gradients=True)
            _backward([output], gradients[j : j + 1], k, (logit_scale, scale.grad) if last else None)
        reports.append(_report(output))
    means = {name: torch.stack([report[name] for report in reports]).mean() for name in reports[0]}
    auxiliary = means.pop("auxiliary_loss", 0.0)
    return {"loss": loss_itc + auxiliary, "loss_itc": loss_itc, **means}


@dataclass(frozen=True)
class BankPlan:
    """A legal combination of the settings of Grouped-ITC and GBA-ITC; `plan_bank` makes it."""

    world_size: int
    group_size: int
    """g, GPUs that contrast with each other."""
    bank_steps: int
    """k, micro-batches in one loss and in one optimizer step."""
    batch_per_gpu: int
    """B, pairs of one micro-batch on one GPU."""

    @property
    def bank_size(self) -> int:
        """N = g * B * k, the paper's "batch size of GBA-ITC" (Table 10)."""
        return self.group_size * self.batch_per_gpu * self.bank_steps

    @property
    def num_groups(self) -> int:
        return self.world_size // self.group_size

    def make_group(self) -> dist.ProcessGroup | None:
        """This rank's group of consecutive ranks; every rank must call it. `None` where one group is all ranks."""
        return dist.new_subgroups(self.group_size)[0] if self.num_groups > 1 else None


def plan_bank(
    world_size: int,
    *,
    batch_size: int,
    bank_steps: int = 1,
    group_size: int | None = None,
    group_nodes: int | None = None,
    bank_size: int | None = None,
    gpus_per_node: int = 1,
) -> BankPlan:
    """Checks the settings and works out what they leave open.

    Args:
        world_size: n, GPUs in all.
        batch_size: pairs per optimizer step over all GPUs, n * B * k (the paper's "batch size").
        bank_steps: k, micro-batches in one loss.
        group_size: g in GPUs; or
        group_nodes: g in nodes of `gpus_per_node`; or
        bank_size: N, which fixes g. With none of the three, all GPUs are one group.
        gpus_per_node: GPUs of one node.

    Raises:
        ValueError: for impossible combinations, with the nearest legal ones. The paper's own 10B row is one: batches
            of 143,360 do not divide into banks of 32,768 (4.375).
    """
    for name, value in [("world_size", world_size), ("batch_size", batch_size), ("bank_steps", bank_steps)]:
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    given = {"group_size": group_size, "group_nodes": group_nodes, "bank_size": bank_size}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"group_size, group_nodes and bank_size each fix the group: give one, got {given}.")
    micro_batches = world_size * bank_steps
    if batch_size % micro_batches:
        low = batch_size // micro_batches
        legal = [f"{b * micro_batches} ({b} per GPU)" for b in (low, low + 1) if b]
        raise ValueError(
            f"batch_size {batch_size} is not world_size {world_size} * bank_steps {bank_steps} * a batch per GPU: "
            f"{batch_size / micro_batches:.3f} per GPU. The nearest are {' and '.join(legal)}."
        )
    if bank_size is not None:
        group_size = _group_of_bank(world_size, batch_size, bank_size, micro_batches)
    elif group_nodes is not None:
        if gpus_per_node < 1 or world_size % gpus_per_node:
            raise ValueError(f"world_size {world_size} must be whole nodes of gpus_per_node {gpus_per_node}.")
        _check_divides("group_nodes", group_nodes, world_size // gpus_per_node, "nodes")
        group_size = group_nodes * gpus_per_node
    elif group_size is not None:
        _check_divides("group_size", group_size, world_size, "GPUs")
    plan = BankPlan(world_size, group_size or world_size, bank_steps, batch_size // micro_batches)
    if plan.bank_size < 2:
        raise ValueError(f"A bank of one pair has nothing to contrast: raise batch_size {batch_size} or the group.")
    return plan


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest(value: float, legal: Sequence[int]) -> list[int]:
    """The closest on either side of `value`, of which there may be one."""
    return [*[x for x in sorted(legal) if x < value][-1:], *[x for x in sorted(legal) if x > value][:1]]


def _check_divides(name: str, value: int, whole: int, unit: str) -> None:
    if value < 1 or whole % value:
        legal = " and ".join(map(str, _nearest(value, _divisors(whole))))
        raise ValueError(f"{name} {value} does not divide the {whole} {unit} into equal groups; nearest: {legal}.")


def _group_of_bank(world_size: int, batch_size: int, bank_size: int, micro_batches: int) -> int:
    """g for a bank of `bank_size` pairs: batch_size / bank_size groups that share the GPUs equally."""
    groups = batch_size / bank_size if bank_size >= 1 else 0.0
    if groups in _divisors(world_size):
        return world_size // int(groups)
    banks = {batch_size // m: m for m in _divisors(world_size)}
    nearest = [f"{n} ({banks[n]} groups of {world_size // banks[n]} GPUs)" for n in _nearest(bank_size, list(banks))]
    batches = {m * bank_size: m for m in _divisors(world_size) if bank_size > 0 and m * bank_size % micro_batches == 0}
    kept = [f"{n} ({batches[n]} groups)" for n in _nearest(batch_size, list(batches))]
    raise ValueError(
        f"bank_size {bank_size} does not divide batch_size {batch_size} into equal groups of {world_size} GPUs: "
        f"{groups:.3f} banks. The nearest bank_size: {' and '.join(nearest)}"
        + (f"; or keep it with batch_size {' or '.join(kept)}." if kept else ".")
    )


class _Bank:
    """The features of k micro-batches of a whole group; each gather runs while the model computes the next."""

    def __init__(self, steps: int, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.steps, self.group = steps, group
        self.group_size = 1 if group is None else dist.get_world_size(group)
        self.own: list[Tensor] = []  # [B, 2E] each: images beside texts
        self.gathered: Tensor | None = None  # [g, k, B, 2E]
        self.pending: list[dist.Work] = []

    def add(self, image: Tensor, text: Tensor) -> None:
        if not self.own:
            self._check_first(image, text)
        both = torch.cat([image, text], dim=1)
        if self.own and both.shape != self.own[0].shape:
            raise ValueError(f"All micro-batches must be alike, got {list(self.own[0].shape)} and {list(both.shape)}.")
        j = len(self.own)
        self.own.append(both)
        if self.group_size > 1:
            if self.gathered is None:
                self.gathered = both.new_empty(self.group_size, self.steps, *both.shape)
            # Straight to where each rank's rows belong: ranks in order, each with its micro-batches in order.
            places = [self.gathered[rank, j] for rank in range(self.group_size)]
            self.pending.append(dist.all_gather(places, both, group=self.group, async_op=True))

    def loss_and_gradients(self, scale: Tensor, tile: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """This rank's loss; for each micro-batch the gradients [B, E] of its images and texts. Fills `scale.grad`."""
        for work in self.pending:
            work.wait()
        gathered = None if self.gathered is None else self.gathered.flatten(0, 2)
        both = torch.cat(self.own)
        image, text = (half.contiguous().requires_grad_() for half in both.chunk(2, dim=1))
        loss = grouped_itc_loss(image, text, scale, group=self.group, tile=tile, gathered=gathered)
        loss.backward()
        assert image.grad is not None and text.grad is not None
        pairs = zip(image.grad.chunk(self.steps), text.grad.chunk(self.steps), strict=True)
        return loss.detach(), list(pairs)

    def _check_first(self, image: Tensor, text: Tensor) -> None:
        """Before the first gather every rank learns every rank's [k, B, E, bytes], so that all raise and none waits."""
        valid = image.ndim == 2 and image.shape == text.shape and image.dtype == text.dtype
        own = torch.tensor([self.steps, *image.shape, image.itemsize] if valid else [0] * 4, device=image.device)
        seen = gather_rows(own[None], self.group).tolist()
        if not valid or any(row != seen[0] for row in seen):
            raise ValueError(
                "Every rank of the group must bring image and text features of one shape [B, E] and dtype, in the same "
                f"number of micro-batches; [k, B, E, bytes] by rank, zeros where they differ: {seen}."
            )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Runs the body from `seed` and leaves the random state of the CPU and of `device` as it was."""
    on_cpu = device.type == "cpu"
    kind = {} if on_cpu else {"device_type": device.type}
    with torch.random.fork_rng(devices=[] if on_cpu else [device], **kind):
        torch.manual_seed(seed)
        yield


def _backward(
    outputs: Sequence[MicroBatchOutput],
    gradients: Sequence[tuple[Tensor, Tensor]],
    k: int,
    scale_and_gradient: tuple[Tensor, Tensor | None] | None,
) -> None:
    """One backward through the graphs of `outputs`, from the features' gradients and 1/k of each auxiliary loss."""
    roots: list[Tensor] = []
    seeds: list[Tensor] = []
    for output, (image, text) in zip(outputs, gradients, strict=True):
        roots += [output.image_embeds, output.text_embeds]
        seeds += [image, text]
        if output.auxiliary_loss is not None:
            roots.append(output.auxiliary_loss)
            seeds.append(torch.full_like(output.auxiliary_loss, 1 / k))
    if scale_and_gradient is not None and scale_and_gradient[1] is not None:
        # As a root of the last backward: DDP waits for every parameter's gradient in it.
        parameter, gradient = scale_and_gradient
        roots.append(parameter)
        seeds.append(_sharded_mean(gradient, parameter) if isinstance(parameter, DTensor) else gradient)
    # Not accelerator.backward: it takes one loss, and divides it by gradient_accumulation_steps.
    torch.autograd.backward(roots, seeds)


def _sharded_mean(gradient: Tensor, parameter: DTensor) -> DTensor:
    """The ranks' mean, laid out as the parameter: FSDP reduces only what its own forward has used."""
    mesh = parameter.device_mesh
    summed = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim)
    return summed.redistribute(mesh, parameter.placements)


def _report(output: MicroBatchOutput) -> dict[str, Tensor]:
    auxiliary = {} if output.auxiliary_loss is None else {"auxiliary_loss": output.auxiliary_loss.detach()}
    return {**auxiliary, **output.metrics}
