"""Runs that are killed outright and go on: their logs equal those of runs that nobody killed, line by line."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from accelerate import Accelerator

import training.checkpoint
import training.pretrain
from tests.distributed import run_distributed
from tests.training.samples import write_shards
from training.configs import (
    CheckpointConfig,
    ITCConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    nano_smoke,
)
from training.run_log import TIMED_FIELDS
from training.schedule import ScheduleConfig, SharingConfig
from training.sharding import ShardingConfig

ROOT = Path(__file__).parents[2]
STEPS = 8
PATIENCE = 600  # seconds for what takes a few on a machine that has nothing else to do
# What a rank is forked from has imported all this already.
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.distributed", "training.pretrain"])


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 48 pairs in both layouts, with two rows that cannot be used."""
    folder = tmp_path_factory.mktemp("resume")
    for kind in ("parquet", "tar"):
        write_shards(folder / kind, kind, [12, 11, 13, 12])
    return folder


def settings(data: Path, kind: str, output_dir: Path, **changes: Any) -> PretrainConfig:
    preset = nano_smoke()
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "data": dataclasses.replace(preset.data, files=(str(data / kind),), neighbours=1, shuffle_window=7),
        "steps": STEPS,
        "batch_size": 8,
        "checkpoint": CheckpointConfig(every=3),
        "resume": "auto",
    }
    return dataclasses.replace(preset, **{**values, **changes})


# ---- Killing, from inside


def train(config: PretrainConfig, kill: tuple[str, int] | None) -> None:
    """One rank's run, which is killed on rank 0 at `("step", n)`, before step n is taken, or at `("save", n)`, when all
    of that step's checkpoint is written but for its name. `run_distributed` then kills the other ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    multiprocessing.current_process()._config["daemon"] = False  # or the loader could have no workers
    Accelerator.end_training = lambda self: None  # `run_distributed` ends the process group
    if kill and rank == 0:
        die_at(*kill, Path(config.output_dir + ".killed"))
    training.pretrain.pretrain(config)


def die_at(moment: str, step: int, witness: Path) -> None:
    def die() -> None:
        witness.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "step":
        learning_rate = training.pretrain.learning_rate

        def dying(config: Any, phase: Any, now: int) -> float:
            if now == step:
                die()
            return learning_rate(config, phase, now)

        training.pretrain.learning_rate = dying
    else:
        write_json = training.checkpoint._write_json

        def dying_write(path: Path, content: Any) -> None:
            write_json(path, content)
            if path.name == "run.json" and content["step"] == step:
                die()

        training.checkpoint._write_json = dying_write


def run_and_kill(config: PretrainConfig, processes: int, kill: tuple[str, int]) -> None:
    # The other ranks raise when rank 0 no longer answers, or are killed while they wait.
    with pytest.raises((RuntimeError, TimeoutError)):
        run_distributed(train, processes, config, kill, timeout=PATIENCE)
    witness = Path(config.output_dir + ".killed")
    assert witness.exists()
    witness.unlink()


def run(config: PretrainConfig, processes: int, *kills: tuple[str, int]) -> list[dict[str, Any]]:
    """The lines that a run leaves, after all these kills."""
    for kill in kills:
        run_and_kill(config, processes, kill)
    run_distributed(train, processes, config, None, timeout=PATIENCE)
    return lines_of(config)


def lines_of(config: PretrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED_FIELDS} for line in lines]


KILLS = [("step", 5), ("save", 6)]
VARIANTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "ddp": (2, "parquet", {}),
    "streamed by two workers": (2, "tar", {}),
    "bank": (1, "parquet", {"itc": ITCConfig(bank_steps=2, retain=0), "drop_path_rate": 0.2}),
    "fsdp": (2, "parquet", {"sharding": ShardingConfig("fsdp"), "optimizer": OptimizerConfig(warmup_steps=2)}),
    "phases": (
        1,
        "parquet",
        {
            "schedule": ScheduleConfig(
                until=(0.5, 1.0), image_size=(32, 64), sharing=SharingConfig("layer", until=4), drop_patches=(0.5, 0.0)
            )
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_leaves_the_log_of_one_that_was_not(data: Path, tmp_path: Path, variant: str):
    processes, kind, changes = VARIANTS[variant]
    config = settings(data, kind, tmp_path / "whole")
    streams = dataclasses.replace(config.data, num_workers=2 if kind == "tar" else 0)
    config = dataclasses.replace(config, data=streams, **changes)
    expected = run(config, processes)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    killed = run(dataclasses.replace(config, output_dir=str(tmp_path / "killed")), processes, *KILLS)
    assert killed == expected
    checkpoints = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert checkpoints == ["step_00000006", "step_00000008"]  # the newest two, and nothing half done


def test_the_check_can_fail(data: Path, tmp_path: Path):
    """A run that goes on without its random states is found out."""
    config = settings(data, "parquet", tmp_path / "a", drop_path_rate=0.5, steps=5)
    expected = run(config, 1)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "b"))
    run_and_kill(config, 1, ("step", 5))
    run_distributed(forgetful, 1, config, timeout=PATIENCE)
    seen = lines_of(config)
    assert seen[:3] == expected[:3] and seen[3:] != expected[3:]


def forgetful(config: PretrainConfig) -> None:
    training.checkpoint.set_random_states = lambda states: None
    train(config, None)


# ---- Killing, from outside


def test_torchrun_killed_twice(data: Path, tmp_path: Path):
    """The whole group of torchrun, its two processes and their workers, at no particular moment."""
    config = settings(data, "tar", tmp_path / "whole", steps=24, log_every=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=1))
    expected = run(config, 2)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "killed"))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "training.pretrain"]
    words += ["nano_smoke", "--output-dir", config.output_dir, "--data.files", str(data / "tar")]
    words += ["--data.neighbours", "1", "--data.shuffle-window", "7", "--data.num-workers", "1", "--steps", "24"]
    words += ["--batch-size", "8", "--checkpoint.every", "3", "--resume", "auto", "--log-every", "2"]
    resumed_at = []
    for until in (6, 14, 24):
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if until < 24:
            wait_for_step(Path(config.output_dir) / "log.jsonl", until, process)
            kill_with_all_children(process)
            checkpoints = sorted((Path(config.output_dir) / "checkpoints").glob("step_*"))
            resumed_at.append(int(checkpoints[-1].name[5:]))
            assert resumed_at[-1] >= until - 3  # one interval at most is lost
        else:
            assert process.wait(timeout=300) == 0
    assert lines_of(config) == expected


def test_a_run_that_still_lives_is_left_alone(data: Path, tmp_path: Path):
    config = settings(data, "parquet", tmp_path / "run", steps=2)
    program = f"import fcntl, time; file = open({str(tmp_path / 'run' / '.lock')!r}, 'w'); "
    program += "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(600)"
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        try:
            with pytest.raises(RuntimeError, match="2 of 2 ranks failed[^$]*Another process still writes to"):
                run_distributed(train, 2, config, None, timeout=PATIENCE)
        finally:
            other.kill()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert len(run(config, 2)) == 2  # as soon as that one is gone


def kill_with_all_children(process: subprocess.Popen) -> None:
    """torchrun gives each process a session of its own: no group has them all, and on its own death none dies."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(everyone) >= 5  # torchrun, two ranks, and a worker of each
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone, timeout=60)
    process.wait()


def wait_for_step(log: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and any(f'"step": {step},' in line for line in log.read_text().splitlines()):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached, exit code {process.poll()}")


# ---- Going on with other ranks


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "ddp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (1, "ddp"))],
)
def test_other_ranks_go_on_with_the_same_pairs(
    data: Path, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
):
    """Model and optimizer are sharded anew, and no pair comes twice: the losses are those of one process throughout."""
    one = settings(data, "parquet", tmp_path / "one", steps=6, objective=ObjectiveConfig())
    expected = run(one, 1)
    config = dataclasses.replace(one, output_dir=str(tmp_path / "other"))
    run_and_kill(dataclasses.replace(config, sharding=ShardingConfig(before[1])), before[0], ("step", 4))
    seen = run(dataclasses.replace(config, sharding=ShardingConfig(after[1])), after[0])
    assert [line["processes"] for line in seen] == [before[0]] * 3 + [after[0]] * 3
    for line, other in zip(expected, seen, strict=True):
        for name in ("loss", "loss_cmlm", "loss_cmim", "grad_norm", "param_norm", "update_norm"):
            assert other[name] == pytest.approx(line[name], rel=2e-4, abs=1e-6), (line["step"], name)


def test_streamed_data_refuse_other_ranks(data: Path, tmp_path: Path):
    config = settings(data, "tar", tmp_path / "run", steps=4)
    run_and_kill(config, 2, ("step", 4))
    with pytest.raises(RuntimeError, match="saved data position belongs to another stream.*world_size"):
        run_distributed(train, 1, config, None, timeout=PATIENCE)
