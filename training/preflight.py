"""The plan of a run before its first step: which GPUs do what, what it needs and sends, and whether it can work.

    python -m training.preflight base_0_4b --world-size 256 --gpus-per-node 8 --gpu-memory 80 [--any.setting VALUE ...]

needs neither a GPU nor data. Tested by `pytest tests/training/test_preflight.py`. Letters as in `cost_model.py`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
import tyro
from torch import nn
from transformers import AutoTokenizer

from modeling_m2encoder import M2EncoderForPreTraining, M2EncoderModel

from .bank import BankPlan
from .configs import PAPER_SAMPLES, PRESETS, PretrainConfig
from .cost_model import Traffic, itc_traffic, memory_estimate, parameter_traffic
from .schedule import Phase
from .sharding import ShardingConfig, Strategy

_GB = 1e9


@dataclass(frozen=True)
class Plan:
    """What `plan` works out; `str(plan)` is the printed form."""

    size: str
    parameters: int
    phases: tuple[Phase, ...]
    banks: tuple[BankPlan, ...]
    """Of each phase; they share the batch and N."""
    fullest: int
    """Index of the phase that needs the most memory: `memory` and `traffic` are those of its steps."""
    gpus_per_node: int
    strategy: str
    shard_size: int
    """s, GPUs that share one copy of the parameters; 1 for ddp."""
    retain: int
    steps: int
    memory: dict[str, float]
    """Estimated bytes per GPU, part by part."""
    traffic: tuple[Traffic, ...]
    notes: tuple[str, ...]

    @property
    def bank(self) -> BankPlan:
        return self.banks[self.fullest]

    @property
    def nodes(self) -> int:
        return -(-self.bank.world_size // self.gpus_per_node)

    @property
    def global_batch(self) -> int:
        """Pairs per optimizer step over all GPUs, n * B * k."""
        return self.bank.world_size * self.bank.batch_per_gpu * self.bank.bank_steps

    @property
    def steps_for_paper(self) -> int:
        """Optimizer steps in which `PAPER_SAMPLES` pairs are seen."""
        return -(-PAPER_SAMPLES // self.global_batch)

    @property
    def memory_per_gpu(self) -> float:
        return sum(self.memory.values())

    def __str__(self) -> str:
        bank = self.bank
        copies = bank.world_size // self.shard_size
        lines = [
            f"Plan for {self.size}, {self.parameters / 1e6:,.1f} M parameters",
            f"  world          {bank.world_size} GPUs on {self.nodes} node(s) of up to {self.gpus_per_node}",
            f"  sharding       {self.strategy}: {copies} copies of the parameters, each on {self.shard_size} GPU(s)",
            f"  ITC            {bank.num_groups} group(s) of g = {bank.group_size} GPUs, B = {bank.batch_per_gpu}, "
            f"k = {bank.bank_steps}, retain = {self.retain}: N = {bank.bank_size:,} pairs in one loss",
            f"  global batch   {self.global_batch:,} pairs per optimizer step",
            f"  this run       {self.steps:,} steps, {self.steps * self.global_batch:,} pairs",
            *self._phase_lines(),
            f"  9 B pairs      {self.steps_for_paper:,} steps",
            "  estimated memory per GPU (GB)",
            *(f"    {name:<34}{size / _GB:>9.3f}" for name, size in self.memory.items()),
            f"    {'in all, before fragmentation':<34}{self.memory_per_gpu / _GB:>9.3f}",
            "  sent per optimizer step (MB)        by a GPU inside its node   by a node to others",
            *(
                f"    {t.name:<34}{t.per_gpu_inside / 1e6:>22,.1f}{t.per_node_between / 1e6:>22,.1f}"
                for t in self.traffic
            ),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _phase_lines(self) -> list[str]:
        if len(self.phases) == 1:
            return []
        lines = []
        for i, (phase, bank) in enumerate(zip(self.phases, self.banks, strict=True)):
            lines.append(
                f"    {phase.first_step:,} to {phase.last_step:,}: {phase.image_size} pixels, "
                f"{phase.drop_patches:.0%} of patches dropped, B = {bank.batch_per_gpu}, k = {bank.bank_steps}"
                + (" (estimated below)" if i == self.fullest else "")
            )
        return lines


def plan(
    config: PretrainConfig,
    *,
    world_size: int,
    gpus_per_node: int,
    model: nn.Module | None = None,
    gpu_memory: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Plan:
    """Works out a run, and refuses what cannot work. Communicates nothing; the same on every process.

    Args:
        config: the run.
        world_size: n, processes in all, one GPU each.
        gpus_per_node: m; consecutive ranks share a node. A world smaller than one node is one node.
        model: the model that will be trained, before it is wrapped, with its frozen parameters frozen; on any device,
            `meta` included. `None`: it is built on `meta` from `config`.
        gpu_memory: bytes of one GPU, to refuse what does not fit; `None`: not compared.
        compute_dtype: of activations and features; `None`: `config.mixed_precision`, where "auto" means bf16.

    Raises:
        ValueError: for GPUs that are not whole nodes, groups, banks or shards that do not divide (with the nearest that
            do), a `retain` outside [0, k], or more memory than a GPU has; it says what to change.
    """
    if world_size < 1 or gpus_per_node < 1:
        raise ValueError(f"world_size and gpus_per_node must be at least 1, got {world_size} and {gpus_per_node}.")
    gpus_per_node = min(gpus_per_node, world_size)
    if world_size % gpus_per_node:
        raise ValueError(
            f"{world_size} processes are not whole nodes of {gpus_per_node}: start as many on every node, or give the "
            "right gpus_per_node."
        )
    itc, sharding = config.itc, config.sharding
    phases, banks = config._check_phases(world_size, gpus_per_node)
    shard_size, second_shard_size = _shard_sizes(sharding.strategy, sharding.shard_size, world_size, gpus_per_node)
    model = model if model is not None else build_on_meta(config)
    if compute_dtype is None:
        compute_dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    layout = {"strategy": sharding.strategy, "shard_size": shard_size, "second_shard_size": second_shard_size}
    layout |= {"retain": itc.retain, "itemsize": compute_dtype.itemsize}
    estimates = [
        memory_estimate(
            model,
            config.objective,
            bank,
            image_size=phase.image_size,
            drop_patches=phase.drop_patches,
            tile=itc.tile,
            gradient_checkpointing=config.gradient_checkpointing,
            **layout,
        )
        for phase, bank in zip(phases, banks, strict=True)
    ]
    fullest = max(range(len(phases)), key=lambda i: sum(estimates[i].values()))
    bank, memory = banks[fullest], estimates[fullest]
    parameters = sum(p.numel() for p in model.parameters())
    itc_sent = itc_traffic(bank, model.config.projection_dim, gpus_per_node, compute_dtype.itemsize)
    result = Plan(
        size=config.size,
        parameters=parameters,
        phases=phases,
        banks=banks,
        fullest=fullest,
        gpus_per_node=gpus_per_node,
        strategy=sharding.strategy,
        shard_size=shard_size,
        retain=itc.retain,
        steps=config.steps,
        memory=memory,
        traffic=(
            itc_sent,
            *parameter_traffic(parameters, world_size, gpus_per_node, bank_steps=bank.bank_steps, **layout),
        ),
        notes=_notes(bank, gpus_per_node, shard_size, memory, gpu_memory),
    )
    if gpu_memory is not None and result.memory_per_gpu > gpu_memory:
        raise ValueError(f"{_does_not_fit(result, gpu_memory)}\n{result}")
    return result


def build_on_meta(config: PretrainConfig) -> M2EncoderModel:
    """The model of a run without its weights: shapes only, in milliseconds for any size. All of it is trained: of the
    decoders, one that no loss uses counts too."""
    if config.init_from:
        model_config = config.model_config()
    else:
        vocab_size = len(AutoTokenizer.from_pretrained(config.tokenizer)) if config.tokenizer else config.vocab_size
        model_config = config.model_config(vocab_size=vocab_size)
    with torch.device("meta"):
        return (M2EncoderForPreTraining if config.objective.masks else M2EncoderModel)(model_config)


# ---- Checks --------------------------------------------------------------------------------------------------------


def _shard_sizes(strategy: Strategy, given: int | None, world_size: int, gpus_per_node: int) -> tuple[int, int | None]:
    """s, and for hpz the GPUs that share the parameters between forward and backward; a node unless given."""
    if given is None and strategy in ("hsdp", "hpz"):
        given = gpus_per_node  # LOCAL_WORLD_SIZE of the run, which need not be that of this process
    size = ShardingConfig(strategy, given).check(world_size)
    return (world_size, size) if strategy == "hpz" else (size, None)


def _notes(
    bank: BankPlan, gpus_per_node: int, shard_size: int, memory: dict[str, float], gpu_memory: float | None
) -> tuple[str, ...]:
    """What works but may not be meant."""
    notes = []
    for name, size in (("itc group", bank.group_size), ("shard", shard_size)):
        if size % gpus_per_node and gpus_per_node % size:
            notes.append(f"an {name} of {size} GPUs does not lie along nodes of {gpus_per_node}: it crosses them.")
    total = sum(memory.values())
    if gpu_memory is not None and 0.9 * gpu_memory < total <= gpu_memory:
        notes.append(
            f"{total / _GB:.1f} of {gpu_memory / _GB:.1f} GB are more than nine tenths, and not all is estimated: "
            "it may run out of memory."
        )
    return tuple(notes)


def _does_not_fit(result: Plan, gpu_memory: float) -> str:
    largest = max(result.memory, key=lambda name: result.memory[name])
    fewer = {
        "activations": "lower itc.retain, set gradient_checkpointing, or raise itc.bank_steps at the same batch_size",
        "features, gathered and own": "use a smaller itc group",
    }
    advice = fewer.get(largest, "shard over more GPUs: sharding.strategy hsdp with a larger shard_size, or fsdp")
    return (
        f"The run needs an estimated {result.memory_per_gpu / _GB:.1f} GB per GPU; a GPU has {gpu_memory / _GB:.1f}. "
        f"Most of it is {largest} ({result.memory[largest] / _GB:.1f} GB): {advice}."
    )


# ---- Command line --------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Prints the plan of a preset with settings, or says why there is none."""
    parser = argparse.ArgumentParser(
        prog="training.preflight",
        allow_abbrev=False,
        description="All further settings are those of training.pretrain.",
    )
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--world-size", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, help="GB of one GPU, to refuse what does not fit")
    own, settings = parser.parse_known_args(arguments)
    config = tyro.cli(
        PretrainConfig, default=PRESETS[own.preset](), args=settings, prog=f"training.preflight {own.preset}"
    )
    memory = None if own.gpu_memory is None else own.gpu_memory * _GB
    try:
        result = plan(config, world_size=own.world_size, gpus_per_node=own.gpus_per_node, gpu_memory=memory)
    except ValueError as error:
        raise SystemExit(f"This cannot work: {error}") from None
    print(result)


if __name__ == "__main__":
    main(sys.argv[1:])
