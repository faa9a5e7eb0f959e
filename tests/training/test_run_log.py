"""What a run says about itself: lines, truncation, counts over processes, timed fields that can be told apart."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from tests.distributed import run_distributed
from training.run_log import TIMED_FIELDS, RunLog, read_log, truncate_log


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(Accelerator(cpu=True), tmp_path, steps=10, batch_size=4)


def test_a_line(log: RunLog, tmp_path: Path):
    log.count({"broken_image": 2}, flops=1e6)
    log.count({"no_caption": 1, "broken_image": 1}, flops=1e6)
    log.write(2, {"loss": torch.tensor(1.5), "logit_scale": torch.tensor([2.0]), "lr": 0.1, "score": 0.25})
    log.close()
    (line,) = lines_of(tmp_path)
    timed = {name: line.pop(name) for name in TIMED_FIELDS}
    assert line == {
        "step": 2,
        "samples": 8,
        "processes": 1,
        "loss": 1.5,
        "logit_scale": 2.0,
        "lr": 0.1,
        "score": 0.25,
        "skipped": {"broken_image": 3, "no_caption": 1},
    }
    assert timed["samples_per_second"] > 0
    assert timed["performance"]["mfu"] is None  # no peak is known of a CPU
    assert 0.01 < timed["performance"]["memory_gb"] < 1000


def test_what_counts_as_time(log: RunLog, tmp_path: Path):
    """Waiting for data is told apart; an evaluation or a checkpoint is no training."""
    with log.waiting_for_data():
        time.sleep(0.2)
    with log.paused():
        time.sleep(1.0)
    log.write(1, {"loss": torch.tensor(1.0)})
    (line,) = lines_of(tmp_path)
    assert line["performance"]["data_wait"] >= 0.2
    assert line["samples_per_second"] <= 4 / 0.2
    # Were the pause counted, this would be 4 / 1.2 at most; what a busy machine adds is in both.
    log.write(2, {"loss": torch.tensor(1.0)})
    assert lines_of(tmp_path)[1]["performance"]["data_wait"] == 0


def test_mfu_is_flops_per_second_of_the_peak(log: RunLog, tmp_path: Path):
    log._peak_flops = 1e9
    log.count({}, flops=5e8)
    log.write(1, {"loss": torch.tensor(1.0)})
    (line,) = lines_of(tmp_path)
    # 5e8 FLOPs in t seconds are 0.5 / t of the peak, and 4 samples in t seconds are 4 / t.
    assert line["performance"]["mfu"] == pytest.approx(line["samples_per_second"] / 8, rel=0.01)


def test_a_loss_that_is_not_finite_ends_the_run(log: RunLog, tmp_path: Path):
    with pytest.raises(FloatingPointError, match="The loss is nan at step 3"):
        log.write(3, {"loss": torch.tensor(math.nan)})
    assert [line["step"] for line in lines_of(tmp_path)] == [3]


def of_two_processes(folder: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    log = RunLog(Accelerator(cpu=True), Path(folder), steps=10, batch_size=4)
    log.count({"broken_image": 1} if rank else {}, flops=0)
    log.write(1, {"loss": torch.tensor(1.0 + rank), "lr": 0.1})
    log.close()


def test_two_processes_write_one_line(tmp_path: Path):
    """Losses are their mean, skipped samples their sum: also those that only the second one had."""
    run_distributed(of_two_processes, 2, str(tmp_path))
    (line,) = lines_of(tmp_path)
    assert (line["processes"], line["loss"], line["skipped"]) == (2, 1.5, {"broken_image": 1})


# ---- Going on


def test_going_on_cuts_off_what_comes_again(tmp_path: Path):
    log = RunLog(Accelerator(cpu=True), tmp_path, steps=10, batch_size=4)
    for step in range(1, 6):
        log.write(step, {"loss": torch.tensor(0.1 * step), "名": "红"})
    log.close()
    before = (tmp_path / "log.jsonl").read_text()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')  # killed in the middle of a line
    log = RunLog(Accelerator(cpu=True), tmp_path, 10, 4, start_step=3, skipped={"no_caption": 2})
    assert (tmp_path / "log.jsonl").read_text() == "".join(before.splitlines(keepends=True)[:3])  # byte for byte
    log.write(4, {"loss": torch.tensor(0.4)})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    assert lines_of(tmp_path)[-1]["skipped"] == {"no_caption": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_run_from_the_start_has_an_empty_log(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    truncate_log(tmp_path / "log.jsonl", 0)
    assert (tmp_path / "log.jsonl").read_text() == ""
    truncate_log(tmp_path / "other.jsonl", 5)
    assert not (tmp_path / "other.jsonl").exists()


def test_a_damaged_log_is_not_silently_shortened(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 3}\n')
    with pytest.raises(ValueError, match="Line 2 of .*log.jsonl is not a log line"):
        read_log(tmp_path / "log.jsonl")
