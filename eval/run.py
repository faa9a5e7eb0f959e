"""Models x tasks: each pair is one piece of work, written when it is done and not done again.

    OUTPUT/scores/MODEL/TASK.json          the scores; TASK.npz the hits per image and the ranks behind them
    OUTPUT/scores/MODEL/TASK.failed.json   why there are none, until they are there
    OUTPUT/embeddings/                     the cache, unless --cache names another folder
    OUTPUT/results.json                    all of the scores

A piece of work is done if its stamp is that of now (see stamps.py), so that a run with nothing to do reads no weights
and imports no torch. A folder given with --cache keeps the finished scores too: a run into a new output finds them.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_json, replaced, slug, write_json
from .stamps import KeptScores, is_done, model_stamp, stamp
from .systems import systems
from .tasks import Task

if TYPE_CHECKING:
    import torch.distributed as dist

    from .embed import Encoder
    from .models import Adapter


@dataclass(frozen=True)
class Settings:
    """How models are run."""

    sources: Mapping[str, Any] = field(default_factory=dict)
    """task -> a file, glob pattern or folder, or several."""
    data_dir: str | None = None
    """A folder of folders (or of single files) called as the tasks."""
    limit: int | None = None
    batch_size: int = 128
    cache: str | None = None
    dtype: str = "float32"
    autocast: str | None = None
    text_rule: str | None = None
    trust_remote_code: bool = False

    def source(self, task: Task) -> Any:
        """Where a task's data lie; None for the Hub."""
        if task.name in self.sources:
            return self.sources[task.name]
        if self.data_dir is not None:
            for path in (Path(self.data_dir) / task.name, *sorted(Path(self.data_dir).glob(f"{task.name}.*"))):
                if path.exists():
                    return str(path)
        return None


@dataclass(frozen=True)
class Failure:
    """A piece of work that could not be done."""

    model: str
    task: str
    error: str


def run(
    models: Sequence[str],
    tasks: Sequence[Task],
    output: Path,
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    group: dist.ProcessGroup | None = None,
) -> list[Failure]:
    """Score every model on every task. What fails is reported and the others go on.

    Args:
        models: systems of systems.yaml, folders, Hub ids or `open_clip:` names; or NAME=one of these, to be called NAME
            in the results.
        say: called with a line for each piece of work.
        group: the processes that share the embedding; each makes this call, the first writes.

    Raises:
        ValueError: for an output folder that cannot be written, found out before anything is computed; two models whose
            names make one folder; `--data` for a task that is not run.
    """
    named = _named(models, output)
    _check(tasks, output, settings)
    lead = group is None or _rank(group) == 0
    shared = KeptScores(Path(settings.cache).expanduser() / "scores") if settings.cache else None
    failures: list[Failure] = []
    for model, (place, revision) in named.items():
        stamps = {task.name: stamp(place, task, settings, revision) for task in tasks}
        folder = output / "scores" / slug(model)
        kept = {
            name
            for name, now in (stamps.items() if lead else ())
            if is_done(folder, name, now) or (shared is not None and shared.take(folder, name, model, now))
        }
        kept = _agreed(kept, group)
        open_tasks = [task for task in tasks if task.name not in kept]
        for name in sorted(kept) if lead else ():
            say(f"kept: {name} with {model}")
        encoder: Encoder | str = "" if not open_tasks else _encoder(place, revision, output, settings, group)
        if isinstance(encoder, str) and open_tasks and lead:
            say(f"error: {model}: {encoder}")
        for task in open_tasks:
            started = time.perf_counter()
            error = encoder if isinstance(encoder, str) else _work(encoder, task, output, model, stamps, settings, lead)
            if error is None and shared is not None and lead:
                shared.keep(folder, task.name, stamps[task.name])
            took = time.perf_counter() - started
            if lead and not isinstance(encoder, str):
                say(
                    f"error: {task.name} with {model}: {error}"
                    if error
                    else f"done: {task.name} with {model} ({took:.1f} s)"
                )
            if error is None:
                continue
            failures.append(Failure(model, task.name, error))
            if lead:
                write_json(
                    _path(output, model, task, "failed.json"), {"model": model, "task": task.name, "error": error}
                )
    return failures


def collect(output: Path) -> dict[str, Any]:
    """All scores of an output folder: {"models": [{"name", "about", "tasks": [...]}], "failures": [...]}.

    Raises:
        ValueError: for a folder without any, or a damaged file.
    """
    models: dict[str, dict[str, Any]] = {}
    failures = []
    for path in sorted((output / "scores").glob("*/*.json")):
        document = read_json(path)
        if not isinstance(document, dict):
            raise ValueError(f"{path} is not a file of scores. Delete it and run again.")
        if path.name.endswith(".failed.json"):
            failures.append(document)
            continue
        model = models.setdefault(document["name"], {"name": document["name"], "about": document["model"], "tasks": []})
        model["tasks"].append({key: value for key, value in document.items() if key not in ("name", "model", "stamp")})
    if not models and not failures:
        raise ValueError(f"No scores in {output}: run `python -m eval run --output {output}` first.")
    return {"models": list(models.values()), "failures": failures}


def _work(
    encoder: Encoder, task: Task, output: Path, model: str, stamps: Mapping[str, Any], settings: Settings, lead: bool
) -> str | None:
    """Do one piece of work; what went wrong, or None."""
    from .results import environment, write_counts
    from .score import score_task

    try:
        started = time.perf_counter()
        benchmarks = score_task(task, encoder, settings.source(task), limit=settings.limit)
        if not lead:
            return None
        document = {
            "name": model,
            "model": encoder.adapter.describe(),
            "task": {"name": task.name, "title": task.title, "kind": task.kind, "protocol": task.protocol,
                     "data": task.data.id, "split": task.data.split, "notes": list(task.notes)},
            "revision": benchmarks[0].revision,
            "limit": settings.limit,
            "benchmarks": [benchmark.as_json() for benchmark in benchmarks],
            "seconds": round(time.perf_counter() - started, 2),
            **environment(),
            "stamp": stamps[task.name],
        }  # fmt: skip
        # The scores last: they say that the work is done.
        write_counts(_path(output, model, task, "npz"), benchmarks)
        write_json(_path(output, model, task, "json"), document)
        _path(output, model, task, "failed.json").unlink(missing_ok=True)
        return None
    except (ValueError, OSError) as error:
        return str(error)
    except Exception as error:  # a fault of ours or of a library, or no memory: the other work goes on
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def _encoder(
    model: str, revision: str | None, output: Path, settings: Settings, group: dist.ProcessGroup | None
) -> Encoder | str:
    """The model, ready or to be loaded when it is needed; or why it is not there."""
    import datasets
    import torch

    from .cache import Cache
    from .embed import Encoder
    from .known_model import known_model

    datasets.disable_progress_bars()
    cache = Cache(settings.cache or output / "embeddings")

    def fresh() -> Adapter:
        from .models import load

        quiet()
        return load(
            model,
            revision=revision,
            dtype=settings.dtype,
            autocast=settings.autocast,
            text_rule=settings.text_rule,
            trust_remote_code=settings.trust_remote_code,
        )

    device = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        adapter = known_model(cache, model_stamp(model, settings, revision, device), fresh)
    except ValueError as error:
        return str(error)
    return Encoder(adapter, batch_size=settings.batch_size, progress=sys.stderr.isatty(), cache=cache, group=group)


def quiet() -> None:
    """One progress bar, ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def _named(models: Sequence[str], output: Path) -> dict[str, tuple[str, str | None]]:
    """name -> what to load, and its revision."""
    if not models:
        raise ValueError("Name at least one model: a folder, a Hub id, or open_clip:ARCHITECTURE/WEIGHTS.")
    named: dict[str, tuple[str, str | None]] = {}
    for model in models:
        name, equals, place = model.partition("=")
        if not equals or Path(model).exists():
            name, place = model, model
        taken = next((other for other in named if slug(other) == slug(name)), None)
        if taken is not None:
            raise ValueError(
                f"{taken} and {name} would both be called {slug(name)} in {output}: give them names, A=PATH."
            )
        known = place in systems() and not Path(place).exists()
        # An id of the Hub has one slash at most, so that this is a folder; and if it is missing, that is what to say.
        if place.count("/") > 1 and not place.startswith((".", "/", "~", "open_clip:")):
            place = f"./{place}"
        named[name] = systems()[place].loadable() if known else (place, None)
    return named


def _check(tasks: Sequence[Task], output: Path, settings: Settings) -> None:
    unused = sorted(set(settings.sources) - {task.name for task in tasks})
    if unused:
        raise ValueError(f"--data names {', '.join(unused)}, but the tasks are {', '.join(t.name for t in tasks)}.")
    if settings.data_dir is not None and not Path(settings.data_dir).is_dir():
        raise ValueError(f"--data-dir {settings.data_dir} is no folder.")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {settings.batch_size}.")
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"limit must be at least 1, not {settings.limit}.")
    with replaced(output / "scores" / ".writable") as beside:
        beside.write_text("")
    (output / "scores" / ".writable").unlink(missing_ok=True)  # another process of this run may have been quicker


def _path(output: Path, model: str, task: Task, suffix: str) -> Path:
    return output / "scores" / slug(model) / f"{task.name}.{suffix}"


def _rank(group: dist.ProcessGroup) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def _agreed(kept: set[str], group: dist.ProcessGroup | None) -> set[str]:
    """What the first process found to be done: it writes, and the others may see its files late."""
    if group is None:
        return kept
    import torch.distributed as dist

    told = [kept]
    dist.broadcast_object_list(told, group=group, group_src=0)
    return told[0]
