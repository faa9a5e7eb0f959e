"""Peak memory of the contrastive loss, forward and backward, beyond what was there: ours and the two usual ways.

    python -m benchmarks.itc_loss_memory [--output benchmarks/itc_loss_memory.json]

Every case runs in a process of its own on the CPU in fp32, and the kernel tells the highest resident memory from the
moment at which the process's own features exist. Cases of several ranks run on one: torch's "fake" process group
answers every collective at once and hands back N rows, so the memory is that of one rank of a real group, and the value
of the loss is not (simulated ranks). What a real backend would buffer is not in it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.itc_baselines import local_itc_loss, naive_itc_loss
from training.losses import grouped_itc_loss

LOSSES: dict[str, Callable[..., Tensor]] = {
    "grouped": grouped_itc_loss,
    "local": local_itc_loss,
    "naive": naive_itc_loss,
}


@dataclass(frozen=True)
class Case:
    """One measurement: N pairs in the loss, of which b are this rank's, E wide."""

    loss: str
    pairs: int
    batch: int
    dim: int = 1024

    @property
    def simulated_ranks(self) -> int:
        return self.pairs // self.batch


CASES = (
    Case("grouped", 32_768, 1024),
    Case("local", 32_768, 1024),
    Case("grouped", 16_384, 16_384),
    Case("naive", 16_384, 16_384),
    Case("grouped", 16_384, 1024),
    Case("local", 16_384, 1024),
    Case("naive", 16_384, 1024),
)


def measure(case: Case) -> dict[str, Any]:
    """Runs a case in a new process: `peak_bytes` above the start, `gathered_bytes` of them features (None for one rank,
    which gathers nothing).

    Raises:
        RuntimeError: when the process fails, with what it said.
    """
    command = [sys.executable, "-m", "benchmarks.itc_loss_memory", "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    ranks = case.simulated_ranks
    return {
        **asdict(case),
        "simulated_ranks": ranks,
        "peak_bytes": int(done.stdout),
        "gathered_bytes": 2 * case.pairs * case.dim * 4 if ranks > 1 else None,
    }


def peak_bytes(case: Case) -> int:
    """In this process: the highest resident memory of one forward and backward, less that before it."""
    torch.set_num_threads(1)
    if case.simulated_ranks > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.simulated_ranks)
    loss = LOSSES[case.loss]
    # Libraries load and set up what they keep at first use: not the loss's.
    run(loss, *features(4, case.dim))
    image, text = features(case.batch, case.dim)
    # 5 sets the kernel's mark of the highest resident memory to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmHWM")
    run(loss, image, text)
    return resident_bytes("VmHWM") - before


def features(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    for tensor in (image, text):
        tensor /= tensor.norm(dim=1, keepdim=True)  # in place: a copy would be memory that the loss finds free
    return image.requires_grad_(), text.requires_grad_()


def run(loss: Callable[..., Tensor], image: Tensor, text: Tensor) -> None:
    scale = torch.tensor([2.6592], requires_grad=True)
    loss(image, text, scale).backward()
    assert image.grad is not None and image.grad.isfinite().all()


def resident_bytes(mark: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{mark}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {mark}: this needs Linux.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(peak_bytes(Case(**json.loads(arguments.case))))
        return
    rows = []
    for case in CASES:
        rows.append(measure(case))
        row = rows[-1]
        print(
            f"{case.loss:<9}N = {case.pairs:>6,}  b = {case.batch:>6,}  E = {case.dim}  "
            f"{case.simulated_ranks:>3} ranks {row['peak_bytes'] / 1e6:>9,.1f} MB",
            flush=True,
        )
    if arguments.output:
        report = {"dtype": "float32", "device": "cpu", "torch": torch.__version__, "rows": rows}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
