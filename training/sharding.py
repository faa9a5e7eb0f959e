"""How the model lies on the ranks: torch's DDP and `fully_shard`. Tested by `pytest tests/training/test_sharding.py`.

`accelerate launch` (or torchrun) starts the processes, but the model does not go through `Accelerator.prepare`. Its
FSDP plugin is silently ignored on CPUs (accelerate 1.15 falls back to DDP there, so that nothing here could be tested);
it takes `reshard_after_forward` as a bool only, so that `hpz` cannot be said; and its `no_sync` keeps whole unsharded
gradients where `hsdp` only has to put off the reduction between groups.

Of parameters, gradients and optimizer state every rank of n holds the whole under `ddp`, 1/n under `fsdp` and `hpz`
(under `hpz` also 1/`shard_size` of the layers' parameters, in the dtype of computation, from forward to backward) and
1/`shard_size` under `hsdp`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

_ELEMENTARY = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm)  # one kernel, nothing to fuse
Strategy = Literal["ddp", "fsdp", "hsdp", "hpz"]


@dataclass(frozen=True)
class ShardingConfig:
    """How parameters, gradients and optimizer state are spread over the ranks."""

    strategy: Strategy = "ddp"
    """`ddp`: whole on every rank. `fsdp`: sharded over all ranks. `hsdp`: sharded inside groups of `shard_size` ranks
    and replicated across them; across groups gradients are reduced once per optimizer step (the practical form of PaRO,
    arXiv 2310.06003). `hpz`: sharded over all ranks, and from forward to backward inside groups of `shard_size`
    (ZeRO++, arXiv 2306.10209)."""
    shard_size: int | None = None
    """Consecutive ranks in a group of `hsdp` and `hpz`; a node's ranks (LOCAL_WORLD_SIZE) unless given."""
    compile: bool = False
    """torch.compile for the attentions and feed-forward networks."""

    def check(self, world_size: int) -> int:
        """The number of ranks in a group: `shard_size` for `hsdp` and `hpz`, 1 for `ddp`, all for `fsdp`.

        Raises:
            ValueError: for what `world_size` ranks cannot do, with the nearest legal values.
        """
        if self.strategy in ("ddp", "fsdp"):
            if self.shard_size is not None:
                raise ValueError(
                    f"{self.strategy} has no groups: leave out shard_size {self.shard_size}, which hsdp and hpz have."
                )
            return 1 if self.strategy == "ddp" else world_size
        if self.strategy not in ("hsdp", "hpz"):
            raise ValueError(f"Unknown sharding strategy {self.strategy!r}: choose one of ddp, fsdp, hsdp, hpz.")
        size, source = self.shard_size, ""
        if size is None:
            size, source = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), " (LOCAL_WORLD_SIZE)"
        legal = [d for d in range(2, world_size) if world_size % d == 0]
        if size not in legal:
            nearest = [*[d for d in legal if d < size][-1:], *[d for d in legal if d > size][:1]]
            advice = f"the nearest are {' and '.join(map(str, nearest))}" if legal else f"{world_size} has none"
            raise ValueError(
                f"{self.strategy} makes several equal groups of at least two of the {world_size} ranks, and shard_size "
                f"{size}{source} does not. It must be a divisor of {world_size}, neither 1 nor all; {advice}. "
                "One single group is fsdp, groups of one rank are ddp."
            )
        return size


@dataclass(frozen=True)
class Distributed:
    """A model on its ranks; `distribute` makes it."""

    model: nn.Module
    """What training calls. Under `ddp` with bf16 it opens autocast itself."""
    module: nn.Module
    """The model without wrappers: its parameters (for the optimizer), `logit_scale`, `config`. Under every strategy but
    `ddp` the parameters are DTensors, also between a forward and its backward, and `forward`, `get_text_features` and
    `get_image_features` are calls that all ranks have to make together."""
    strategy: Strategy
    parameters: tuple[nn.Parameter, ...]
    """The trainable ones, as the optimizer holds them: during a step a layer may show others."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Around every forward and backward but the last of an optimizer step, see `training.bank.banked_backward`.

        In it `ddp` reduces no gradients and `hsdp` only inside the groups. The others reduce as ever, because what they
        put off they would have to keep as whole gradients.
        """
        if isinstance(self.module, FSDPModule):
            return _without_all_reduce(self.module) if self.strategy == "hsdp" else nullcontext()
        wrapped = [module for module in self.model.modules() if isinstance(module, DistributedDataParallel)]
        return wrapped[0].no_sync() if wrapped else nullcontext()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales gradients to a global 2-norm of at most `max_norm`; the norm before, 0-d and alike on all ranks."""
        norm = nn.utils.clip_grad_norm_(self.parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole weights under the bare model's names, on the CPU of rank 0; empty elsewhere. All ranks must call.

        Weights are put together one by one: beside its part a rank needs room for one whole parameter.
        """
        if isinstance(self.module, FSDPModule):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return get_model_state_dict(self.module, options=options)
        if dist.is_initialized() and dist.get_rank() > 0:
            return {}
        return {name: tensor.cpu() for name, tensor in self.module.state_dict().items()}

    def full_copy(self) -> nn.Module | None:
        """The whole model without any sharding on the CPU of rank 0, to be exported or evaluated; None elsewhere.

        All ranks must call. On the CPU `ddp`'s copy shares its weights with the model.
        """
        weights = self.full_state_dict()
        if not weights:
            return None
        kind = type(self.module)
        kind = kind.__bases__[1] if isinstance(self.module, FSDPModule) else kind  # FSDPX is made of FSDPModule and X
        with torch.device("meta"):
            copy = kind(self.module.config)
        copy.load_state_dict(weights, assign=True)
        return copy.eval()


@contextmanager
def _without_all_reduce(module: FSDPModule) -> Iterator[None]:
    module.set_requires_all_reduce(False)
    try:
        yield
    finally:
        module.set_requires_all_reduce(True)


class _Autocast(nn.Module):
    """A model whose forward runs in bf16 where that is safe. One context per call: cast weights are kept in it, and
    those of a pass without gradients would serve the next pass with them."""

    def __init__(self, model: nn.Module, device_type: str) -> None:
        super().__init__()
        self.model, self.device_type = model, device_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.model(*args, **kwargs)


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

    Every trainable parameter has to get a gradient in the last backward of a step, or `ddp` waits for it: freeze the
    heads that no loss uses.

    Args:
        model: with `_no_split_modules`, the class names of its layers. Each layer becomes a unit of communication, so
            does what several layers share, and the rest is one more.
        config: see `ShardingConfig`.
        device: where this rank computes.
        mixed_precision: `bf16` computes in bf16; parameters, gradients' reduction and optimizer stay in fp32.
        gradient_checkpointing: keep only the layers' inputs and compute the rest again in backward.

    Raises:
        ValueError: for impossible settings (`ShardingConfig.check`), or any strategy but `ddp` without a process group.
    """
    device = torch.device(device)
    if config.strategy != "ddp" and not dist.is_initialized():
        raise ValueError(f"Strategy {config.strategy} needs processes: start with `accelerate launch` or `torchrun`.")
    shard_size = config.check(dist.get_world_size() if dist.is_initialized() else 1)
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if gradient_checkpointing:
        # Reentrant checkpointing needs an input with a gradient, which no first layer after a frozen embedding has.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        _compile_parts(layers)
    if config.strategy == "ddp":
        wrapped = _replicate(model, device, mixed_precision)
    else:
        wrapped = _shard(model, layers, config.strategy, shard_size, device, mixed_precision)
    return Distributed(wrapped, model, config.strategy, tuple(p for p in model.parameters() if p.requires_grad))


def _compile_parts(layers: list[nn.Module]) -> None:
    """Compiles the attention and the feed-forward network of each layer; layers of a kind share the compiled code.

    Not whole layers: the rate of stochastic depth is an argument of a layer's forward, another float at each depth, for
    each of which torch.compile would compile it anew until its limit of 8 leaves the rest uncompiled.
    """
    for part in dict.fromkeys(part for layer in layers for part in layer.children()):  # layers may share an attention
        if not isinstance(part, _ELEMENTARY):
            part.forward = torch.compile(part.forward)


def shared_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that stand at several places of the model, outermost only."""
    places: dict[nn.Module | None, int] = defaultdict(int)
    for module in model.modules():
        for child in module._modules.values():  # `children()` would list a module once per parent
            places[child] += 1
    return [module for module in model.modules() if places[module] > 1]


def _replicate(model: nn.Module, device: torch.device, mixed_precision: str) -> nn.Module:
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    wrapped = model.to_empty(device=device) if on_meta else model.to(device)
    if dist.is_initialized():
        # Which also sends rank 0's weights round. As views of the buckets gradients exist only once.
        device_ids = None if device.type == "cpu" else [device]
        wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    return _Autocast(wrapped, device.type) if mixed_precision == "bf16" else wrapped


def _shard(
    model: nn.Module,
    layers: list[nn.Module],
    strategy: Strategy,
    shard_size: int,
    device: torch.device,
    mixed_precision: str,
) -> nn.Module:
    world_size = dist.get_world_size()
    if strategy == "hsdp":
        shape, names = (world_size // shard_size, shard_size), ("dp_replicate", "dp_shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy()
    if mixed_precision == "bf16":
        # Reduced in fp32: hsdp's sums over micro-batches are kept in this dtype, and bf16 would cost 3e-3 of them.
        # Inputs stay as they are, for the pixels are also what CMIM predicts; the first layers cast them.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    weights = {name: tensor.detach() for name, tensor in _named_tensors(model)} if dist.get_rank() == 0 else {}
    model.to("meta")
    settings = {"mesh": mesh, "mp_policy": policy}
    # What several layers share comes first, as a unit of its own: as a part of each of them it would be sharded twice.
    for unit in dict.fromkeys([*shared_modules(model), *layers]):
        fully_shard(unit, **settings, reshard_after_forward=shard_size if strategy == "hpz" else True)
    # The rest also gives its whole parameters back after forward (by default it would not): `logit_scale` would
    # otherwise be another tensor after an evaluation than before, and its gradient lost. So do shared units, although
    # each use gathers them anew, just as often as layers that are not shared: checkpoints take the parameters by name.
    fully_shard(model, **settings, reshard_after_forward=True)
    model.to_empty(device=device)
    _send_weights(model, weights, device)
    for name in ("get_text_features", "get_image_features"):
        if hasattr(model, name):
            _gather_for(model, name)
    return model


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, each under the first of its names."""
    return [*model.named_parameters(), *model.named_buffers()]


@torch.no_grad()
def _send_weights(model: nn.Module, weights: dict[str, Tensor], device: torch.device) -> None:
    """Gives every rank its part of rank 0's `weights`, one tensor at a time.

    Not torch's `set_model_state_dict`, for which each further name of a layer that serves several depths is missing.
    """
    for name, tensor in _named_tensors(model):
        whole = weights[name].to(device) if weights else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, DTensor):
            tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements))
        else:
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


def _gather_for(model: nn.Module, name: str) -> None:
    """Has the parameters gathered for a call of this method, as they are for `forward`, but not once more inside it."""
    inside = getattr(model, name)
    register_fsdp_forward_method(model, name)
    outside = getattr(model, name)

    @wraps(inside)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (outside if isinstance(model.logit_scale, DTensor) else inside)(*args, **kwargs)

    setattr(model, name, method)
