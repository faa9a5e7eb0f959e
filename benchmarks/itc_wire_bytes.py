"""What one step of the contrastive loss sends between two nodes, counted by the kernel, beside the formulas.

    python -m benchmarks.itc_wire_bytes [--output benchmarks/itc_wire_bytes.json]

Two network namespaces are the nodes, two gloo processes on each; needs root and iproute2. The baselines of
`itc_baselines.py` stand in the same table. gloo makes an all-reduce of a reduce-scatter; both formulas are given, NCCL
has a true one. Bytes do not depend on the speed of the machine or of the link; times would, and are not given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.itc_baselines import local_itc_loss, naive_itc_loss
from benchmarks.network_namespaces import nodes, why_not
from training.bank import BankPlan, MicroBatchOutput, banked_backward
from training.losses import grouped_itc_loss

NODES, PER_NODE = 2, 2
WORLD = NODES * PER_NODE
GRADIENTS = 1_000_000  # elements of the gradient that is reduced as DDP does, for the scale of things


@dataclass(frozen=True)
class Case:
    """One step that is counted."""

    name: str
    loss: str = "grouped"
    """grouped (ours), naive, local, or gradients (the all-reduce of DDP)."""
    group_size: int = WORLD
    bank_steps: int = 1

    def formula(self, batch: int, dim: int, itemsize: int) -> float:
        """Bytes that a node sends to the other, by ring collectives."""
        # Here, because it imports transformers, which every rank would wait for.
        from training.cost_model import itc_traffic, parameter_traffic

        bank = BankPlan(WORLD, self.group_size, self.bank_steps, batch)
        if self.loss == "grouped":
            return itc_traffic(bank, dim, PER_NODE, itemsize).per_node_between
        if self.loss == "gradients":
            traffic = parameter_traffic(
                GRADIENTS,
                WORLD,
                PER_NODE,
                strategy="ddp",
                shard_size=1,
                second_shard_size=None,
                bank_steps=1,
                retain=1,
                itemsize=itemsize,
            )
            return traffic[0].per_node_between
        # Baselines: one all-gather of both features, and a reduce-scatter of as much in backward.
        return 2 * 2 * (self.group_size - 1) * batch * dim * itemsize

    def formula_on_gloo(self, batch: int, dim: int, itemsize: int) -> float:
        """The same where a reduce-scatter is an all-reduce, which sends twice as much."""
        return self.formula(batch, dim, itemsize) * (1.5 if self.loss in ("local", "naive") else 1)


CASES = (
    Case("Grouped-ITC, whole world, k = 1"),
    Case("Grouped-ITC, group = node, k = 1", group_size=PER_NODE),
    Case("GBA-ITC, whole world, k = 3", bank_steps=3),
    Case("GBA-ITC, group = node, k = 3", group_size=PER_NODE, bank_steps=3),
    Case("local loss, gather with gradients", loss="local"),
    Case("naive global loss", loss="naive"),
    Case("gradients of DDP, 1 M parameters", loss="gradients"),
)


def measure(batch: int, dim: int, dtypes: Sequence[torch.dtype]) -> list[dict[str, Any]]:
    """Runs all cases in namespaces; for each, the bytes that one node sends to the other and those of the formulas.

    Args:
        batch: B, pairs of one micro-batch on one process.
        dim: E.
        dtypes: of the features, one after the other.

    Raises:
        RuntimeError: where namespaces cannot be made, or a process fails, with what it said.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    with tempfile.TemporaryDirectory() as folder, nodes(NODES) as cluster:
        processes = []
        for rank in range(WORLD):
            arguments = [rank, folder, batch, dim, ",".join(names)]
            command = [sys.executable, "-m", "benchmarks.itc_wire_bytes", "--rank", *map(str, arguments)]
            with open(Path(folder) / f"{rank}.log", "w") as log:
                processes.append(
                    cluster[rank // PER_NODE].start(command, {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
                )
        for process in processes:
            process.wait(timeout=1800)
        if any(process.returncode for process in processes):
            raise RuntimeError("\n".join((Path(folder) / f"{rank}.log").read_text() for rank in range(WORLD)))
        sent = json.loads((Path(folder) / "sent.json").read_text())
    rows = []
    for (dtype, case), measured in zip(itertools.product(dtypes, CASES), sent, strict=True):
        size = (batch, dim, dtype.itemsize)
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                **asdict(case),
                "measured_bytes": measured,
                "formula_bytes": round(case.formula(*size)),
                "formula_bytes_on_gloo": round(case.formula_on_gloo(*size)),
            }
        )
    return rows


# ---- Inside a namespace --------------------------------------------------------------------------------------------


def run_rank(rank: int, folder: Path, batch: int, dim: int, dtypes: Sequence[torch.dtype]) -> list[int]:
    """Bytes that this rank's node sends in each case, for each dtype."""
    torch.set_num_threads(1)
    # The ranks meet in a file: whatever is counted belongs to the steps.
    store = dist.FileStore(str(folder / "store"), WORLD)
    meetings = itertools.count()

    def meet() -> None:
        key = f"meeting{next(meetings)}"
        store.add(key, 1)
        while store.add(key, 0) < WORLD:
            time.sleep(0.005)
        time.sleep(0.2)  # TCP's delayed acknowledgements are on their way for 40 ms

    dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=WORLD)
    node, _ = dist.new_subgroups(PER_NODE)
    sent = []
    for dtype, case in itertools.product(dtypes, CASES):
        step = make_step(case, node if case.group_size < WORLD else dist.group.WORLD, batch, dim, dtype)
        step()  # connections are made at first use
        meet()
        before = sent_bytes()
        meet()
        step()
        meet()
        sent.append(sent_bytes() - before)
        meet()
    return sent


def make_step(case: Case, group: dist.ProcessGroup, batch: int, dim: int, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of one case on random features."""
    torch.manual_seed(dist.get_rank())
    if case.loss == "gradients":
        return partial(dist.all_reduce, torch.randn(GRADIENTS))
    shape = (case.bank_steps, 2, batch, dim)
    features = torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(dtype).requires_grad_()
    scale = torch.tensor([2.0], requires_grad=True)
    if case.bank_steps > 1:

        def model_step(j: int, with_auxiliary: bool) -> MicroBatchOutput:
            return MicroBatchOutput(*(features[j] * 1))

        return lambda: banked_backward(model_step, range(case.bank_steps), scale, retain=1, group=group)
    loss = {"grouped": grouped_itc_loss, "naive": naive_itc_loss, "local": local_itc_loss}[case.loss]
    return lambda: loss(*features[0], scale, group=group).backward()


def sent_bytes() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


# ---- Command line --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank, folder, batch, dim, names = arguments.rank
        dtypes = [getattr(torch, name) for name in names.split(",")]
        sent = run_rank(int(rank), Path(folder), int(batch), int(dim), dtypes)
        if rank == "0":
            (Path(folder) / "sent.json").write_text(json.dumps(sent))
        return
    rows = measure(arguments.batch, arguments.dim, (torch.float32, torch.bfloat16))
    settings = {"nodes": NODES, "processes_per_node": PER_NODE, "batch": arguments.batch, "dim": arguments.dim}
    report = {**settings, "backend": "gloo", "torch": torch.__version__, "rows": rows}
    print(f"{'':<46}{'sent (MB)':>12}{'formula':>12}{'on gloo':>12}")
    for row in rows:
        numbers = [row[key] / 1e6 for key in ("measured_bytes", "formula_bytes", "formula_bytes_on_gloo")]
        print(f"{row['dtype']:<10}{row['name']:<36}" + "".join(f"{number:>12.3f}" for number in numbers))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
