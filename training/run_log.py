"""What a run says about itself: `log.jsonl`, a progress bar and optional Accelerate trackers, all from the main
process."""

from __future__ import annotations

import collections
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm


class RunLog:
    """Appends one JSON object per logged step to `output_dir/log.jsonl`. Every process makes one and calls every
    method."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, *, steps: int, batch_size: int):
        self._accelerator = accelerator
        self._batch_size = batch_size
        self._skipped: collections.Counter[str] = collections.Counter()
        self._last = (0, time.perf_counter())
        self._bar = tqdm(total=steps, unit="step", disable=not accelerator.is_main_process, mininterval=1.0)
        self._file = (output_dir / "log.jsonl").open("a", encoding="utf-8") if accelerator.is_main_process else None

    def count_skipped(self, skipped: dict[str, int]) -> None:
        """Adds this rank's unusable samples, by reason."""
        self._skipped.update(skipped)

    def samples_per_second(self, step: int) -> float:
        """Over all processes, since the last `write`; ask before an evaluation, whose time is not to count."""
        last_step, last_time = self._last
        return round((step - last_step) * self._batch_size / (time.perf_counter() - last_time), 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs one step. Tensors are averaged over the processes; the loss of the global batch is such an average.

        Raises:
            FloatingPointError: when the loss is not finite; going on would only waste time.
        """
        mean = {
            name: self._accelerator.reduce(value.float().reshape(()), "mean").item()
            if isinstance(value, torch.Tensor)
            else value
            for name, value in metrics.items()
        }
        line = {"step": step, "samples": step * self._batch_size, "processes": self._accelerator.num_processes, **mean}
        if self._skipped:
            line["skipped"] = dict(self._skipped)
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(loss=f"{mean['loss']:.3f}", samples_per_second=mean["samples_per_second"])
        self._accelerator.log({k: v for k, v in line.items() if isinstance(v, (int, float))}, step=step)
        self._last = (step, time.perf_counter())
        if not math.isfinite(mean["loss"]):
            raise FloatingPointError(
                f"The loss is {mean['loss']} at step {step}: lower optimizer.lr or lengthen optimizer.warmup_steps."
            )

    def close(self) -> None:
        """Ends the bar, tells what was skipped, and closes the file."""
        self._bar.close()
        if self._skipped:
            self._accelerator.print("Skipped samples:", dict(self._skipped))
        if self._file is not None:
            self._file.close()
