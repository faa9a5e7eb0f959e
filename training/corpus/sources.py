"""The stage "sources": every source's rows in the one schema of `training/corpus/rows.py`.

    <output>/sources/rows/part-<task>-<k>.parquet     the rows, sources of high priority first
    <output>/sources/dropped/part-<task>.parquet      what could not be read, with its reason

The order of the parts is the rank of their rows among duplicates: the stage "clean" keeps the first.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from eval.files import read_json, write_json

from . import downloads
from .config import CorpusConfig
from .engine import KEPT, Counts, Report, run_stage
from .entries import REASONS, SourceSettings, rows_of
from .reading import Slice
from .rows import DROPPED, PartWriter, RowsWriter, part_path

__all__ = ["REASONS", "ReadTask", "SourceSettings", "SourcesSettings", "run"]


@dataclass(frozen=True)
class SourcesSettings:
    """The section `sources`."""

    list: tuple[SourceSettings, ...]
    rows_per_part: int = 10_000
    """Bounds the parts, which are the tasks of the next stages."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.list]
        if not names:
            raise ValueError("sources.list is empty; name at least one source.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources.list names {twice} more than once.")
        if self.rows_per_part < 1:
            raise ValueError(f"sources.rows_per_part is {self.rows_per_part}; at least 1.")


def run(config: CorpusConfig) -> Report:
    """Reads all sources. If some have only addresses yet, writes their lists, says how to download them, and stops.

    Raises:
        ValueError: for settings that cannot be meant, files that are not there, or a folder with other sources.
        RuntimeError: if tasks failed.
    """
    settings = config.section("sources", SourcesSettings)
    ranked = sorted(settings.list, key=lambda source: -source.priority)  # stable: then as in the file
    planned = [(source, source.slices(settings.rows_per_part)) for source in ranked]
    addresses = [(source, found) for source, found in planned if source.is_addresses]
    if addresses:
        return downloads.run(config, addresses)
    folder = config.output / "sources"
    tasks = [(number, part) for number, (_, found) in enumerate(planned) for part in found]
    contents = {source.name: source.fingerprint() for source in ranked}
    known = {"sources": ranked, "rows_per_part": settings.rows_per_part, "contents": contents}
    task = ReadTask(folder, tuple(ranked), settings.rows_per_part)

    def prepare() -> None:
        write_json(folder / "plan.json", [[number, *astuple(part)] for number, part in tasks])

    return run_stage(config, "sources", len(tasks), task, known, prepare=prepare)


@lru_cache(maxsize=1)
def _tasks(plan: Path, changed: int) -> list[list[Any]]:
    """The plan, read once per process; `changed` tells it from an older one."""
    return read_json(plan)


@dataclass(frozen=True)
class ReadTask:
    """Reads one slice of one source."""

    folder: Path
    sources: tuple[SourceSettings, ...]
    rows_per_part: int

    def __call__(self, number: int) -> Counts:
        plan = self.folder / "plan.json"
        place, *part = _tasks(plan, plan.stat().st_mtime_ns)[number]
        source, counts = self.sources[place], Counts()
        with (
            RowsWriter(self.folder / "rows", number, self.rows_per_part) as kept,
            PartWriter(part_path(self.folder / "dropped", number), DROPPED) as dropped,
        ):
            for row, reason in rows_of(source, Slice(*part)):
                counts.add(source.name, row["language"], reason or KEPT)
                if reason is None:
                    kept.write(row)
                else:
                    dropped.write({**row, "reason": reason})
        return counts
