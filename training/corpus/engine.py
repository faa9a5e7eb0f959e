"""Runs a stage: one task per part on datatrove's executors, going on after a kill, with totals that add up.

Each task writes its parts, then its counts, each by a rename, and is complete. A kill before that repeats it, which
gives the same bytes. Totals are sums of the counts on disk, never of what one process saw: datatrove's own stats.json
covers only the tasks of the last run (huggingface/datatrove#360).
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before loguru is imported: the log of a failed task would have the values of all variables, rows and keys among them.
os.environ.setdefault("LOGURU_DIAGNOSE", "NO")

from loguru import logger
from tqdm import tqdm

from eval.files import read_json, write_json

from .config import CorpusConfig, ExecutorSettings

# datatrove logs each step of each task to the terminal, from the workers too. They import this module with their first
# task; what fails is logged here, to the terminal and to the file of the task.
logger.disable("datatrove")

KEPT = "kept"
"""The outcome of a row that goes on. Every other outcome is the reason of a loss, or the name of another stream."""


class Counts:
    """How many rows of each source and language had each outcome."""

    def __init__(self, values: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None):
        self._counter: Counter[tuple[str, str, str]] = Counter()
        for source, languages in (values or {}).items():
            for language, outcomes in languages.items():
                for outcome, number in outcomes.items():
                    self.add(source, language, outcome, number)

    def add(self, source: str, language: str, outcome: str, number: int = 1) -> None:
        """Counts rows; every row that a stage read has exactly one outcome."""
        self._counter[source, language, outcome] += number

    def update(self, other: Counts) -> None:
        """Adds the counts of another task."""
        self._counter.update(other._counter)

    def total(self, outcome: str | None = None, source: str | None = None, language: str | None = None) -> int:
        """The rows with this outcome (all, if None) of this source and language."""
        return sum(
            number
            for (its_source, its_language, its_outcome), number in self._counter.items()
            if outcome in (None, its_outcome) and source in (None, its_source) and language in (None, its_language)
        )

    def outcomes(self) -> dict[str, int]:
        """outcome -> rows, most frequent first."""
        totals: Counter[str] = Counter()
        for (_, _, outcome), number in self._counter.items():
            totals[outcome] += number
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counts) and self.as_dict() == other.as_dict()

    def as_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        """source -> language -> outcome -> rows, sorted."""
        nested: dict[str, dict[str, dict[str, int]]] = {}
        for (source, language, outcome), number in sorted(self._counter.items()):
            nested.setdefault(source, {}).setdefault(language, {})[outcome] = number
        return nested


Task = Callable[[int], Counts]
"""Given the number of a task, reads that task's part, writes its own parts and counts what it read. Picklable, and a
function of its inputs alone: the same bytes from whoever runs it."""


@dataclass(frozen=True)
class Report:
    """What a finished stage made; `<folder>/report.json`."""

    stage: str
    tasks: int
    counts: Counts
    settings: Mapping[str, Any]
    fingerprint: str
    """Of the settings and of everything before; the next stage's settings hold it."""
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_report(folder: Path) -> Report:
    """Raises ValueError if the stage of this folder did not finish."""
    if not (folder / "report.json").is_file():
        raise ValueError(f"{folder} has no report.json: the stage did not run or was stopped. Run it (again) first.")
    values = read_json(folder / "report.json")
    return Report(**{**values, "counts": Counts(values["counts"])})


def run_stage(
    config: CorpusConfig,
    stage: str,
    tasks: int,
    task: Task,
    settings: Mapping[str, Any],
    after: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
) -> Report:
    """Runs tasks 0 .. `tasks` - 1 that are not yet complete, then writes the report of the stage.

    A finished stage is not run again: its report is read.

    Args:
        stage: its folder in `config.output`; a stage of several phases names them "clean/measure", ...
        settings: everything beside the inputs that decides what is written (JSON values, dataclasses and paths).
        after: the stages whose parts are read; their fingerprints become part of this one's.
        prepare: called before the tasks, if there are some to run: writes what they all read.

    Raises:
        ValueError: if the folder holds the work of other settings or another run is at work in it, or a stage in
            `after` has no report.
        RuntimeError: if tasks failed; the complete ones stay, and a second run repeats only the others.
    """
    folder = config.output / stage
    settings = _plain(settings)
    inputs = {name: read_report(config.output / name).fingerprint for name in after}
    document = {"stage": stage, "tasks": tasks, "seed": config.seed, "settings": settings, "inputs": inputs}
    fingerprint = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
    claim(folder, {**document, "fingerprint": fingerprint})
    if (folder / "report.json").is_file():
        return read_report(folder)
    with _alone_in(folder):
        if prepare is not None:
            prepare()
        if tasks:
            _execute(config.executor, folder, tasks, _Counted(task, folder, tasks), stage)
        counts = Counts()
        for number in range(tasks):
            if not _counts_file(folder, number).is_file():
                raise RuntimeError(f"Task {number} of {stage} failed: see {folder / '.tasks'}. Then run this again.")
            counts.update(Counts(read_json(_counts_file(folder, number))))
        _remove_leftovers(folder)
        report = Report(stage, tasks, counts, settings, fingerprint)
        write_report(folder, report)
    return report


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two runs at once would sweep each other's files away. The lock ends with its process, however that ends.

    Raises:
        ValueError: if another run of this host works in the folder.
    """
    path = folder / ".tasks" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"Another run is at work in {folder}: wait for its end, or end it.") from error
        except OSError:
            pass  # a file system without locks
        yield


def _remove_leftovers(folder: Path) -> None:
    """Half-written files of runs that were killed; all tasks are complete, so that nobody needs them."""
    for inside, folders, files in os.walk(folder):
        if ".tasks" in folders:
            folders.remove(".tasks")
        for name in files:
            if name.startswith("."):
                (Path(inside) / name).unlink(missing_ok=True)


def write_report(folder: Path, report: Report) -> None:
    """Writes `report.json`; stages call it again to add `extra` facts."""
    write_json(folder / "report.json", {**vars(report), "counts": report.counts.as_dict()})


def claim(folder: Path, document: Mapping[str, Any]) -> None:
    """Marks a folder as the work of these settings.

    Raises:
        ValueError: if it is the work of others, naming what differs.
    """
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, document)
        return
    was = _flat(read_json(path))
    now = _flat(json.loads(json.dumps(document)))
    different = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key) and key != "fingerprint"]
    if different:
        shown = "; ".join(f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in different[:3])
        raise ValueError(f"{folder} holds the work of other settings ({shown}). Choose another output, or delete it.")


@dataclass(frozen=True)
class _Counted:
    """A pipeline step of datatrove that is a whole task of its: ours of the numbers rank, rank + world_size, ...."""

    task: Task
    folder: Path
    tasks: int

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        for number in range(rank, self.tasks, world_size):
            if _counts_file(self.folder, number).is_file():
                continue
            try:
                counts = self.task(number)
            except Exception:
                logger.exception(f"Task {number} in {self.folder} failed.")
                raise
            write_json(_counts_file(self.folder, number), counts.as_dict())


def _counts_file(folder: Path, task: int) -> Path:
    return folder / "counts" / f"{task:05d}.json"


def _execute(settings: ExecutorSettings, folder: Path, tasks: int, step: _Counted, stage: str) -> None:
    from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

    from . import slurm
    from .workers import LocalExecutor

    kinds = {"local": LocalExecutor, "ray": RayPipelineExecutor, "slurm": SlurmPipelineExecutor}
    # Ray and Slurm start a process for each of their tasks, which costs as much as a thousand images.
    ranks = tasks if settings.kind == "local" else min(tasks, 2 * settings.workers)
    log = str(folder / ".tasks" / f"of-{ranks}")
    options = {"logging_dir": log, "tasks": ranks, "workers": min(settings.workers, ranks)}
    if settings.kind == "slurm":
        options["job_name"] = f"corpus-{stage.replace('/', '-')}"
        options["env_command"] = slurm.environment()
    executor = kinds[settings.kind]([step], **{**options, **settings.options})
    with _progress(folder, tasks, stage):
        try:
            executor.run()
        except Exception as error:  # of a task: any
            raise RuntimeError(f"A task of {stage} failed: {type(error).__name__}: {error}") from error
        if settings.kind == "slurm":
            slurm.wait_for(executor.job_id)


class _progress:
    """A bar that follows the counts on disk, whichever process or host writes them."""

    def __init__(self, folder: Path, tasks: int, stage: str):
        self._folder, self._stop = folder / "counts", threading.Event()
        self._bar = tqdm(total=tasks, desc=stage, unit="part", disable=None)
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _show(self) -> None:
        self._bar.n = sum(1 for _ in self._folder.glob("*.json"))
        self._bar.refresh()

    def _follow(self) -> None:
        while not self._stop.wait(max(1.0, self._bar.total / 1000)):  # each look lists a folder
            self._show()

    def __enter__(self) -> None:
        if not self._bar.disable:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if not self._bar.disable:
            self._thread.join()
            self._show()
        self._bar.close()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: item for name, inner in value.items() for key, item in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }
