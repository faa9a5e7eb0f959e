"""One task, one model: read, verify, embed, score."""

from __future__ import annotations

from pathlib import Path

from .data import Source
from .embed import Encoder
from .fine_grained import fine_grained_benchmarks, read_fine_grained
from .results import Benchmark
from .retrieval import Captioned, limited, read_captioned, retrieval_benchmark
from .scenes import score_scenes
from .tasks import Task
from .verify import (
    Finding,
    check_captioned,
    check_fine_grained,
    check_labelled,
    check_scenes,
    require,
)
from .zero_shot import limited_labelled, read_labelled, zero_shot_benchmark


def score_task(
    task: Task, encoder: Encoder, source: Source | None = None, *, limit: int | None = None
) -> list[Benchmark]:
    """The benchmarks of a task.

    Args:
        source: where the data lie (see `eval.data.open_data`); from the Hub if left out.
        limit: use so many rows, evenly spaced. The data are verified whole.

    Raises:
        ValueError: for data that are missing, not what the task says, or damaged.
    """
    if task.kind == "scenes":
        folder = _scenes_folder(task, source)
        require(task, check_scenes(task, folder))
        return score_scenes(encoder, folder, limit=limit)
    if task.kind == "fine-grained":
        built = read_fine_grained(task, source)
        require(task, check_fine_grained(task, built))
        return fine_grained_benchmarks(task, encoder, built, limit)
    if task.kind == "classification":
        labelled = read_labelled(task, source)
        require(task, check_labelled(task, labelled))
        part = limited_labelled(labelled, limit)
        return [zero_shot_benchmark(task.name, encoder, part, protocol=task.protocol, paired=task.paired)]
    data = read_captioned(task, source)
    require(task, check_captioned(task, data))
    return [
        retrieval_benchmark(
            task.name,
            encoder,
            limited(data, limit),
            protocol=task.protocol,
            positives=task.positives,
            paired=task.paired,
        )
    ]


def verify(task: Task, source: Source | None = None) -> tuple[list[Finding], Captioned | None]:
    """What `python -m eval verify` says of a task's data, and the captions of a retrieval task.

    Raises:
        ValueError: for data that cannot be read at all.
    """
    if task.kind == "scenes":
        return check_scenes(task, _scenes_folder(task, source)), None
    if task.kind == "fine-grained":
        return check_fine_grained(task, read_fine_grained(task, source)), None
    if task.kind == "classification":
        return check_labelled(task, read_labelled(task, source)), None
    data = read_captioned(task, source)
    return check_captioned(task, data), data


def _scenes_folder(task: Task, source: Source | None) -> Path:
    if source is None:
        raise ValueError(f"These data are not on the Hub. To get them: {task.data.obtain}.")
    return Path(source if isinstance(source, str | Path) else source[0])
