"""Launching on several nodes: what each command starts, and a run over two nodes of which one dies and comes back.

Namespaces of the kernel's network stand in for nodes (`benchmarks/network_namespaces.py`), scripts for SLURM's
`scontrol` and `srun`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run as torchrun
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env

from benchmarks.network_namespaces import nodes, why_not
from training.preflight import plan
from training.pretrain import parse
from training.scenes import ScenesConfig, write_scenes

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "training" / "launch"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """An interpreter that writes down what it is to run, and runs only the program that it is given on stdin."""
    record = f'printf "%s\\n" "$@" >>{tmp_path}/record'
    return script(tmp_path / "python", f'if [ "$1" = - ]; then exec {sys.executable} "$@"; fi\n{record}')


def node_sh(recorder: Path, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs node.sh; what it said, and the words that it would run."""
    done = subprocess.run(
        ["bash", str(LAUNCH / "node.sh"), *words],
        env={"PATH": os.environ["PATH"], "PYTHON": str(recorder), **environment},
        capture_output=True,
        text=True,
    )
    record = recorder.parent / "record"
    return done, record.read_text().splitlines() if record.exists() else []


# ---- What each command starts


def test_node_sh_alone(recorder: Path):
    done, words = node_sh(recorder, "nano", "--output-dir", "a dir", GPUS_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert words == shlex.split(
        "-m torch.distributed.run --standalone --nproc_per_node 2 --max_restarts 3 -m training.pretrain nano "
        "--resume auto --output-dir 'a dir'"
    )


def test_node_sh_on_the_head_and_elsewhere(recorder: Path):
    """torchrun is told whether this host is HEAD, which it guesses wrongly in containers."""
    file = recorder.parent / "some.args"
    file.write_text("--itc.bank-steps 2\n  --seed 7\n")
    somewhere = {"HEAD": "127.0.0.1", "NODES": "2:4", "PORT": "1234", "RDZV_CONF": "timeout=60"}
    done, words = node_sh(recorder, "nano", f"@{file}", "--resume", "none", **somewhere)
    assert done.returncode == 0, done.stderr
    arguments = torchrun.parse_args(words[2:])
    assert (arguments.nnodes, arguments.rdzv_backend, arguments.rdzv_endpoint) == ("2:4", "c10d", "127.0.0.1:1234")
    assert arguments.rdzv_conf == "is_host=1,timeout=60" and arguments.local_addr == "127.0.0.1"
    assert arguments.training_script == "training.pretrain" and arguments.module
    given = ["nano", "--resume", "auto", "--itc.bank-steps", "2", "--seed", "7", "--resume", "none"]
    assert arguments.training_script_args == given
    config = parse([*given, "--output-dir", "x"])
    assert (config.itc.bank_steps, config.seed, config.resume) == (2, 7, "none")
    (recorder.parent / "record").unlink()
    done, words = node_sh(recorder, "nano", HEAD="127.0.0.2", NODES="2")  # bound to loopback too, so ours
    assert torchrun.parse_args(words[2:]).rdzv_conf == "is_host=1"
    (recorder.parent / "record").unlink()
    done, words = node_sh(recorder, "nano", HEAD="203.0.113.7", NODES="2")  # of a range kept for documentation
    if done.returncode == 0:  # on a machine without any route it is refused
        assert torchrun.parse_args(words[2:]).rdzv_conf == "is_host=0"
    else:
        assert "cannot be resolved or reached" in done.stderr


@pytest.mark.parametrize(
    ("words", "environment", "named"),
    [
        ((), {}, "usage"),
        (("--output-dir", "x"), {}, "usage"),
        (("nano",), {"NODES": "2"}, "HEAD is not set"),
        (("nano",), {"NODES": "2", "HEAD": "no-such-host.invalid"}, "cannot be resolved"),
        (("nano", "@/nowhere.args"), {}, "nowhere.args"),
    ],
)
def test_node_sh_refuses(recorder: Path, words: tuple[str, ...], environment: dict[str, str], named: str):
    done, ran = node_sh(recorder, *words, **environment)
    assert done.returncode != 0 and named in done.stderr and not ran


def test_slurm_sh(recorder: Path):
    """It meets at the first node of the job, under a name of this start of the job, one torchrun on each node."""
    folder = recorder.parent
    script(folder / "scontrol", '[ "$*" = "show hostnames n[1-2]" ] && printf "localhost\\nnode-b\\n"')
    script(folder / "srun", f'echo "$@" >{folder}/srun.txt\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"')
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77012"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), "large_1b", f"@{LAUNCH}/32_nodes.args", "--output-dir", "x"],
        env={**slurm, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(recorder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--ntasks-per-node=1 --kill-on-bad-exit=1" in (folder / "srun.txt").read_text()
    arguments = torchrun.parse_args((folder / "record").read_text().splitlines()[2:])
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert (arguments.rdzv_endpoint, arguments.rdzv_id) == ("localhost:29512", "77012-1")
    assert "--itc.group-nodes" in arguments.training_script_args


@pytest.mark.parametrize(("name", "hosts"), [("1_node", 1), ("4_nodes", 4), ("32_nodes", 32)])
def test_configurations_for_accelerate(name: str, hosts: int, monkeypatch: pytest.MonkeyPatch):
    """Through accelerate's own parser to what torchrun is asked for: the command that stands in the file."""
    monkeypatch.chdir(ROOT)
    header = re.match(r"(#.*\n)+", (LAUNCH / f"{name}.yaml").read_text())
    command = re.search(r"accelerate launch (.*?[^\\])$", re.sub(r"\\\n#\s+", "", header[0]), re.M)[1]
    command = command.replace("$HEAD", "10.0.0.1").replace("$RANK", "1")
    command = re.sub(r"\$\(cat (\S+)\)", lambda found: Path(found[1]).read_text(), command)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(command)))
    assert arguments.multi_gpu
    prepare_multi_gpu_env(arguments)
    words = ["--training_script", arguments.training_script, "--training_script_args", *arguments.training_script_args]
    asked, _, _ = torchrun.config_from_args(_filter_args(arguments, torchrun.get_args_parser(), words))
    assert (asked.min_nodes, asked.max_nodes, asked.nproc_per_node) == (hosts, hosts, 8)
    if hosts > 1:
        assert (asked.rdzv_backend, asked.rdzv_endpoint, asked.max_restarts) == ("c10d", "10.0.0.1:29500", 3)
    config = parse(arguments.training_script_args)
    seen = plan(config, world_size=8 * hosts, gpus_per_node=8, gpu_memory=80e9)
    # Table 10's batch and bank on any number of nodes; on 32 with the paper's groups of 8 nodes.
    assert (seen.global_batch, seen.bank.bank_size, seen.bank.group_size) == (131_072, 32_768, 2 * hosts)
    assert config.itc.group_nodes == (8 if hosts == 32 else None)


# ---- Two nodes


def wait_until(condition: Callable[[], Any], seconds: float, what: str, logs: list[Path]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}:\n" + "\n".join(f"--- {log}\n{log.read_text()[-4000:]}" for log in logs))
        time.sleep(0.1)


def test_a_node_dies_and_comes_back(tmp_path: Path):
    """Two nodes with two processes each; one node loses all its processes in mid-run and is started anew."""
    if reason := why_not():
        pytest.skip(reason)
    write_scenes(tmp_path / "scenes", ScenesConfig(twins=2, train=64, validation=16, test=48, task_size=4, workers=1))
    run, steps = tmp_path / "run", 20
    words = ["nano_smoke", "--output-dir", str(run), "--data.files", f"{tmp_path}/scenes/train-*.parquet"]
    words += ["--steps", str(steps), "--checkpoint.every", "3", "--itc.group-nodes", "1"]
    log, checkpoints = run / "log.jsonl", run / "checkpoints"
    outputs = [tmp_path / "node0.txt", tmp_path / "node1.txt", tmp_path / "node1_again.txt"]

    with nodes(2) as cluster:
        environment = {"NODES": "2", "HEAD": cluster[0].address, "GPUS_PER_NODE": "2", "PYTHON": sys.executable}
        environment["RDZV_CONF"] = "keep_alive_interval=1"  # a silent node is given up after 3 seconds instead of 15

        def start(i: int, output: Path) -> subprocess.Popen:
            with output.open("w") as file:
                command = ["bash", str(LAUNCH / "node.sh"), *words]
                return cluster[i].start(command, environment, stdout=file, stderr=file, cwd=ROOT)

        head = start(0, outputs[0])
        start(1, outputs[1])
        wait_until(lambda: checkpoints.exists() and any(checkpoints.iterdir()), 300, "no checkpoint", outputs[:2])
        cluster[1].kill()
        done_before = len(log.read_text().splitlines())
        again = start(1, outputs[2])
        wait_until(lambda: head.poll() is not None and again.poll() is not None, 300, "did not end", outputs)
    said = [output.read_text() for output in outputs]
    assert (head.returncode, again.returncode) == (0, 0), said
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1)) and done_before < steps
    assert {line["processes"] for line in lines} == {4}
    # The node that stayed has seen two starts of the run, in the groups that were asked for.
    plans = re.findall(r"Plan for.*\n.*4 GPUs on 2 node\(s\)[^N]*g = 2 GPUs", "".join(said))
    assert len(plans) >= 2
    assert (run / "model" / "config.json").exists()
