"""How the model lies on the ranks, by torch's DDP and `fully_shard`. Tested by `pytest tests/training/test_sharding.py`.

`accelerate launch` (or torchrun) starts the processes, but the model does not go through `Accelerator.prepare`: its FSDP
plugin is silently ignored on CPUs (accelerate 1.15 falls back to DDP there, so that nothing here could be tested), it
takes `reshard_after_forward` as a bool only, so that `hpz` cannot be said, and its `no_sync` keeps whole unsharded
gradients where `hsdp` only has to put off the reduction between groups.

Memory for n ranks and P parameters, as copies of parameters, gradients and optimizer state per rank: 1 for `ddp`, 1/n for
`fsdp` and `hpz` (and in `hpz` another 1/`shard_size` of the parameters in the compute dtype between forward and
backward), 1/`shard_size` for `hsdp`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Strategy = Literal["ddp", "fsdp", "hsdp", "hpz"]


@dataclass(frozen=True)
class ShardingConfig:
    """How parameters, gradients and optimizer state are spread over the ranks."""

    strategy: Strategy = "ddp"
    """`ddp`: whole on every rank. `fsdp`: sharded over all ranks. `hsdp`: sharded inside groups of `shard_size` ranks
    and replicated across them; the reduction across groups happens once per optimizer step (the practical form of PaRO,
    arXiv 2310.06003). `hpz`: sharded over all ranks, and between forward and backward inside groups of `shard_size`
    (ZeRO++, arXiv 2306.10209)."""
    shard_size: int | None = None
    """Consecutive ranks in a group of `hsdp` and `hpz`; a node's ranks (LOCAL_WORLD_SIZE) unless given."""
    compile: bool = False
    """torch.compile for each transformer layer."""

    def check(self, world_size: int) -> int:
        """The number of ranks over which one copy of parameters, gradients and optimizer state is spread.

        Raises:
            ValueError: for what `world_size` ranks cannot do, with the nearest legal values.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Distributed:
    """A model on its ranks; `distribute` makes it."""

    model: nn.Module
    """What is called in training. Opens autocast itself under `ddp` with bf16."""
    module: nn.Module
    """The model without wrappers: its parameters (for the optimizer), `logit_scale`, `config`. Under every strategy but
    `ddp` they are DTensors, also right after a forward, and `get_text_features`, `get_image_features` and `forward` are
    calls that every rank has to make."""
    strategy: Strategy

    def no_sync(self) -> AbstractContextManager[Any]:
        """Around every forward and backward but the last of an optimizer step, see `training.bank.banked_backward`.

        `ddp` leaves gradients unreduced in it, `hsdp` reduces inside the group only; the others reduce as ever, since
        what they leave out would be kept in whole gradients.
        """
        raise NotImplementedError

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients to a global 2-norm of at most `max_norm`; the norm before, 0-d and alike on all ranks."""
        raise NotImplementedError

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole weights under the bare model's names, on the CPU of rank 0; empty on the others. All must call."""
        raise NotImplementedError

    def full_copy(self) -> nn.Module | None:
        """A whole, unsharded copy of the model on the CPU of rank 0, e.g. to export; None elsewhere. All must call."""
        raise NotImplementedError


def distribute(
    model: nn.Module,
    config: ShardingConfig,
    *,
    device: torch.device | str,
    mixed_precision: Literal["no", "bf16"] = "no",
    gradient_checkpointing: bool = False,
) -> Distributed:
    """Spreads a model over all ranks, in place. Every rank must call it; the optimizer is built afterwards.

    The weights are those of rank 0. The others may hold the model on the meta device, so that a host needs memory for
    one copy only.

    Every trainable parameter has to get a gradient in the last backward of a step, or `ddp` waits for it: freeze heads
    that no loss uses.

    Args:
        model: with `_no_split_modules`, the class names of its layers, each of which becomes a unit of communication
            and compilation; the rest is one more unit.
        config: see `ShardingConfig`.
        device: where this rank computes.
        mixed_precision: `bf16` computes in bf16; parameters, gradient reduction and optimizer stay fp32.
        gradient_checkpointing: keep only the layers' inputs and compute the rest again in backward.

    Raises:
        ValueError: for impossible settings (`ShardingConfig.check`), or any strategy but `ddp` without a process group.
    """
    raise NotImplementedError
