"""Stages: totals from disk, resume after failures and kills, refusal of other settings, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from training.corpus.config import CorpusConfig, ExecutorSettings
from training.corpus.engine import KEPT, Counts, read_report, run_stage, write_report
from training.corpus.rows import part_path, write_rows

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Marking:
    """Counts `number` rows, writes a part, and leaves a mark for each time it is called."""

    folder: Path
    failing: tuple[int, ...] = ()

    def __call__(self, number: int) -> Counts:
        marks = self.folder / "marks"
        marks.mkdir(parents=True, exist_ok=True)
        with (marks / str(number)).open("a") as file:
            file.write("x")
        if number in self.failing and not (self.folder / "repaired").exists():
            raise OSError(f"no luck with {number}")
        write_rows(part_path(self.folder / "stage" / "rows", number), [{"id": str(number)}])
        counts = Counts()
        counts.add("a", "en", KEPT, number)
        counts.add("b", "zh", "short_text", 1)
        return counts


def config(tmp_path: Path, workers: int = 1, seed: int = 0) -> CorpusConfig:
    return CorpusConfig(tmp_path / "out", seed, ExecutorSettings("local", workers), {})


def calls(folder: Path) -> dict[str, int]:
    return {mark.name: len(mark.read_text()) for mark in sorted((folder / "marks").iterdir())}


def test_counts_add_up() -> None:
    counts = Counts({"a": {"en": {KEPT: 3, "short_text": 1}}, "b": {"zh": {KEPT: 5}}})
    more = Counts()
    more.add("a", "en", KEPT, 2)
    counts.update(more)
    assert (counts.total(), counts.total(KEPT), counts.total(source="a"), counts.total(language="zh")) == (11, 10, 6, 5)
    assert counts.outcomes() == {KEPT: 10, "short_text": 1}
    assert Counts(counts.as_dict()).as_dict() == counts.as_dict()


@pytest.mark.parametrize("workers", [1, 2])
def test_totals_and_a_second_run(tmp_path: Path, workers: int) -> None:
    output = tmp_path / "out"
    report = run_stage(config(tmp_path, workers), "stage", 5, Marking(output), {"size": 1})
    assert report.counts.as_dict() == {"a": {"en": {KEPT: 10}}, "b": {"zh": {"short_text": 5}}}
    assert read_report(output / "stage") == report
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    again = run_stage(config(tmp_path, workers), "stage", 5, Marking(output), {"size": 1})
    assert again == report
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    assert set(calls(output).values()) == {1}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_task_is_repeated_and_no_other(tmp_path: Path, workers: int) -> None:
    output = tmp_path / "out"
    with pytest.raises(RuntimeError, match="no luck with 2"):
        run_stage(config(tmp_path, workers), "stage", 5, Marking(output, (2,)), {})
    assert not (output / "stage" / "report.json").exists()
    done = {path.stem for path in (output / "stage" / "counts").iterdir()}
    assert "00002" not in done and {"00000", "00001"} & done
    (output / "repaired").touch()
    report = run_stage(config(tmp_path), "stage", 5, Marking(output, (2,)), {})
    # The known trap: totals of all tasks, not of those that the last run did (huggingface/datatrove#360).
    assert report.counts.total(KEPT) == 0 + 1 + 2 + 3 + 4
    assert all(number == 1 for name, number in calls(output).items() if f"{int(name):05d}" in done)


@dataclass(frozen=True)
class Dying(Marking):
    """Kills its process, as the kernel does when memory is short."""

    def __call__(self, number: int) -> Counts:
        if number in self.failing and not (self.folder / "repaired").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(number)


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    """multiprocessing.Pool would wait for it for ever."""
    output = tmp_path / "out"
    (output / "repaired").parent.mkdir()
    with pytest.raises(RuntimeError, match="a worker was killed"):
        run_stage(config(tmp_path, 2), "stage", 5, Dying(output, (2,)), {})
    (output / "repaired").touch()
    assert run_stage(config(tmp_path, 2), "stage", 5, Dying(output, (2,)), {}).counts.total(KEPT) == 10


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.training.corpus.test_engine import Marking, config
from training.corpus.engine import run_stage
import training.corpus.engine as engine

write = engine.write_json
def kill(path, document):
    if path.name == "00002.json":  # after the parts of task 2, before its counts
        (path.parent / ".999.00002.json").write_text("half")
        (path.parent.parent / "rows" / ".part-00002.parquet.0123").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, document)
engine.write_json = kill
run_stage(config(Path({tmp!r})), "stage", 4, Marking(Path({tmp!r}) / "out"), {{}})
"""


def test_killed_between_parts_and_counts(tmp_path: Path) -> None:
    undisturbed = tmp_path / "other"
    run_stage(config(undisturbed), "stage", 4, Marking(undisturbed / "out"), {})
    script = KILLED.format(root=str(ROOT), tmp=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == -9
    run_stage(config(tmp_path), "stage", 4, Marking(tmp_path / "out"), {})
    assert calls(tmp_path / "out") == {"0": 1, "1": 1, "2": 2, "3": 1}

    def contents(output: Path) -> dict[str, bytes]:
        files = [path for path in (output / "stage").rglob("*") if path.is_file() and ".tasks" not in path.parts]
        return {str(path.relative_to(output)): path.read_bytes() for path in files}

    assert contents(tmp_path / "out") == contents(undisturbed / "out")  # and no half-written file is left


def test_what_two_runs_wrote_is_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run_stage(config(tmp_path), "stage", 2, Marking(output), {"clean": {"size": 1, "kind": "a"}})
    for changed, said in [
        (
            lambda: run_stage(config(tmp_path), "stage", 2, Marking(output), {"clean": {"size": 2}}),
            "clean.size was 1, is 2",
        ),
        (lambda: run_stage(config(tmp_path), "stage", 3, Marking(output), {"clean": {"size": 1}}), "tasks was 2, is 3"),
        (lambda: run_stage(config(tmp_path, seed=1), "stage", 2, Marking(output), {}), "seed was 0, is 1"),
    ]:
        with pytest.raises(ValueError) as failure:
            changed()
        assert said in str(failure.value)
    assert set(calls(output).values()) == {1}
    # The next stage knows which one it follows.
    settings = {"threshold": 0.25}
    run_stage(config(tmp_path), "next", 1, Marking(output), settings, after=["stage"])
    write_report(output / "stage", replace(first, fingerprint="of another run"))
    with pytest.raises(ValueError, match="inputs.stage was"):
        run_stage(config(tmp_path), "next", 1, Marking(output), settings, after=["stage"])
    with pytest.raises(ValueError, match="no report.json"):
        run_stage(config(tmp_path), "last", 1, Marking(output), settings, after=["never run"])


def test_the_executor_is_no_part_of_the_result(tmp_path: Path) -> None:
    reports = [
        run_stage(config(tmp_path / str(workers), workers), "stage", 3, Marking(tmp_path / str(workers) / "out"), {})
        for workers in (1, 3)
    ]
    assert reports[0].fingerprint == reports[1].fingerprint
    written = [json.loads((tmp_path / name / "out/stage/report.json").read_text()) for name in ("1", "3")]
    assert written[0] == written[1]


def test_what_all_tasks_read_is_prepared_once(tmp_path: Path) -> None:
    prepared = []
    for _ in range(2):
        run_stage(config(tmp_path), "stage", 1, Marking(tmp_path / "out"), {}, prepare=lambda: prepared.append(1))
    assert prepared == [1]


HOLDING = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""


def test_two_runs_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "out" / "stage" / ".tasks" / "lock"
    lock.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="Another run is at work"):
            run_stage(config(tmp_path), "stage", 1, Marking(tmp_path / "out"), {})
        other.kill()
    assert run_stage(config(tmp_path), "stage", 1, Marking(tmp_path / "out"), {}).tasks == 1


SBATCH = """#!{python}
import os, re, subprocess, sys
script = [argument for argument in sys.argv[1:] if not argument.startswith("-")][-1]
text = open(script).read()
first, last = re.search(r"--array=(\\d+)-(\\d+)", text).groups()
output = re.search(r"--output=(.*)%A_%a.out", text)[1]
environment = {{"PATH": os.environ["PATH"], "SLURM_ARRAY_JOB_ID": "7", "SLURM_NODELIST": "localhost"}}
for number in range(int(first), int(last) + 1):
    with open(f"{{output}}{{number}}.out", "w") as log:
        job = environment | {{"SLURM_ARRAY_TASK_ID": str(number)}}
        subprocess.run(["bash", script], env=job, stdout=log, stderr=log, cwd="/")
print("Submitted batch job 7")
"""
SRUN = '#!/bin/sh\nshift 3  # -l -n 1\nexec "$@"\n'
SQUEUE = "#!/bin/sh\nif [ -e {seen} ]; then exit 0; fi\ntouch {seen}\necho 7 RUNNING\n"


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Slurm's commands played by scripts, each job in a shell that knows nothing of this process."""
    commands = tmp_path / "bin"
    commands.mkdir()
    seen = tmp_path / "asked"
    scripts = {
        **{"sbatch": SBATCH.format(python=sys.executable), "srun": SRUN, "squeue": SQUEUE.format(seen=seen)},
        "scontrol": "#!/bin/sh\necho localhost\n",
    }
    for name, script in scripts.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    monkeypatch.setattr("training.corpus.slurm._SECONDS", 0.01)
    options = {"time": "1:00:00", "partition": "cpu"}
    slurm = replace(config(tmp_path), executor=ExecutorSettings("slurm", 1, options))
    report = run_stage(slurm, "stage", 5, Marking(tmp_path / "out"), {})
    assert seen.exists()  # it waited for the job
    assert report == run_stage(config(tmp_path / "local"), "stage", 5, Marking(tmp_path / "local" / "out"), {})
    assert set(calls(tmp_path / "out").values()) == {1}
