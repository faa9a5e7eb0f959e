"""What a run says about itself: `log.jsonl`, a progress bar and optional Accelerate trackers, all from the main
process. Tested by `pytest tests/training/test_run_log.py`."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .flops import peak_flops

# The fields of a line that the clock and the machine decide. All others are the same in every run with these settings.
TIMED_FIELDS = ("samples_per_second", "performance")


class RunLog:
    """Appends one JSON object per logged step to `output_dir/log.jsonl`. Every process makes one and calls every
    method.

    Args:
        steps: those of the whole run.
        batch_size: pairs of one step over all processes.
        start_step: what a resumed run has done; later lines of the file are cut off, so that no step comes twice.
        skipped: this process's unusable samples until then.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        steps: int,
        batch_size: int,
        start_step: int = 0,
        skipped: Mapping[str, int] | None = None,
    ):
        self._accelerator = accelerator
        self._batch_size = batch_size
        self._peak_flops = peak_flops(accelerator.device)
        self.skipped: collections.Counter[str] = collections.Counter(skipped)
        """This process's unusable samples so far, by reason."""
        main = accelerator.is_main_process
        path = output_dir / "log.jsonl"
        if main:
            truncate_log(path, start_step)
        self._bar = tqdm(total=steps, initial=start_step, unit="step", disable=not main, mininterval=1.0)
        self._file = path.open("a", encoding="utf-8") if main else None
        self._begin_interval(start_step)

    # ---- While the step runs

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around fetching a batch."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: its time does not count."""
        start = time.perf_counter()
        yield
        self._begin += time.perf_counter() - start

    def count(self, skipped: dict[str, int], flops: float) -> None:
        """Adds this process's unusable samples, by reason, and the FLOPs of its share of the step."""
        self.skipped.update(skipped)
        self._flops += flops

    # ---- At its end

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs one step. Tensors are averaged over the processes; the loss of the global batch is such an average.

        Raises:
            FloatingPointError: when the loss is not finite; going on would only waste time.
        """
        tensors = {name: value for name, value in metrics.items() if isinstance(value, torch.Tensor)}
        skips = torch.tensor(float(sum(self.skipped.values())), device=self._accelerator.device)
        *means, mean_skips = self._mean([*tensors.values(), skips])
        values = {**metrics, **dict(zip(tensors, means, strict=True))}
        line = {
            "step": step,
            "samples": step * self._batch_size,
            "processes": self._accelerator.num_processes,
            **values,
            **self._performance(step),
        }
        if mean_skips:
            line["skipped"] = self._all_skipped()
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(loss=f"{line['loss']:.3f}", samples_per_second=line["samples_per_second"])
        flat = {**line, **line["performance"]}
        self._accelerator.log({k: v for k, v in flat.items() if isinstance(v, (int, float))}, step=step)
        self._begin_interval(step)
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(
                f"The loss is {line['loss']} at step {step}: lower optimizer.lr or lengthen optimizer.warmup_steps."
            )

    def sync(self) -> None:
        """Puts all lines on the disk, so that a checkpoint never knows of steps that the log has lost."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the bar, tells what was skipped, and closes the file."""
        self._bar.close()
        skipped = self._all_skipped()
        if skipped:
            self._accelerator.print("Skipped samples:", skipped)
        if self._file is not None:
            self._file.close()

    # ---- Parts

    def _begin_interval(self, step: int) -> None:
        self._step, self._begin = step, time.perf_counter()
        self._data_wait = self._flops = 0.0
        if self._accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _mean(self, values: list[torch.Tensor]) -> list[float]:
        """Over the processes, in one reduction."""
        stacked = torch.stack([value.detach().float().reshape(()) for value in values])
        return self._accelerator.reduce(stacked, "mean").tolist()

    def _performance(self, step: int) -> dict[str, Any]:
        """The `TIMED_FIELDS` of the steps since the last line; waiting, FLOPs and memory are the main process's."""
        seconds, steps = time.perf_counter() - self._begin, step - self._step
        mfu = None if self._peak_flops is None else round(self._flops / seconds / self._peak_flops, 4)
        return {
            "samples_per_second": round(steps * self._batch_size / seconds, 1),
            "performance": {
                "data_wait": round(self._data_wait / steps, 4),
                "mfu": mfu,
                "memory_gb": round(_peak_memory(self._accelerator.device) / 1e9, 3),
            },
        }

    def _all_skipped(self) -> dict[str, int]:
        """Of all processes together, the reasons in alphabetical order."""
        total: collections.Counter[str] = collections.Counter()
        for reason, count in sorted(gather_object(list(self.skipped.items()))):
            total[reason] += count
        return dict(total)


def truncate_log(path: Path, step: int) -> None:
    """Leaves the lines up to this step; a line that a killed process wrote in part goes too."""
    if not path.exists():
        return
    kept = [f"{json.dumps(line, ensure_ascii=False)}\n" for line in read_log(path) if line["step"] <= step]
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, without a last one that is still being written or never was finished.

    Raises:
        ValueError: for a line in the middle that is no JSON object with a step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, text in enumerate(lines, start=1):
        try:
            record = json.loads(text)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("it is no object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"Line {number} of {path} is not a log line: {error}") from error
        records.append(record)
    return records


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on an accelerator since the last line, or ever in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
