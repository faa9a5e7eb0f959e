"""The stage "clean": the paper's rules, duplicates and evaluation images out; every loss with its reason.

    <output>/clean/kept/part-*.parquet       rows, with width, height and (if relabelled) language
    <output>/clean/dropped/part-*.parquet    id, source, language, reason, and for duplicates the row kept instead

In four phases: "guard" takes the signatures of the evaluation images, "measure" applies the rules to each row and
writes the signatures of the good ones, "match" and "resolve" find duplicates among these (`duplicates.py`), and the
stage itself copies the rows that stay. Images are decoded once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import perceptual
from .config import CorpusConfig
from .duplicates import PAIRS, Signatures, find_pairs, read_dropped, resolve
from .engine import KEPT, Counts, Report, read_report, run_stage
from .guard import GuardTask, guard_files, load_guard
from .language import is_broken, languages_of
from .pictures import Measured, measure
from .rows import DROPPED, PartWriter, Row, part_path, parts, parts_once, read_rows, write_rows

REASONS = (
    # Of the text:
    "broken_text",  # control characters, or U+FFFD, which something before us wrote for bytes that were no UTF-8
    "short_text",  # fewer characters than `min_characters`, blanks at the ends not counted; also the empty text
    "wrong_language",  # the text is in another language than its row says
    # Of the image, in this order; known from its header, before anything is decoded:
    "too_many_bytes",
    "not_an_image",  # none of `pictures.FORMATS`
    "too_many_pixels",
    "too_many_frames",
    "aspect_ratio",
    # ... and from decoding it:
    "broken_image",  # truncated or damaged
    # Of the image among others:
    "evaluation_image",  # equal to, or nearly, an image of the guard list
    "duplicate",  # the same bytes as a row of higher rank in the same language
    "near_duplicate",  # nearly the same pixels as a row of higher rank in the same language
)
"""Why a row is dropped; the first that applies."""
_MEASURED = pa.schema(
    [("reason", pa.string()), ("language", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
)


@dataclass(frozen=True)
class CleanSettings:
    """The section `clean`."""

    min_characters: dict[str, int] = field(default_factory=dict)
    """language -> texts with fewer characters are dropped; 5 for a language that is not named (paper, section 2.2: 5,
    for both). Read literally this drops 77 % of the Chinese names of things ("自行车" has 3), which say as much as
    "bicycle": a setting per language."""
    max_aspect_ratio: float = 3.0
    """Of the longer to the shorter side; more is dropped (paper, section 2.2)."""
    max_pixels: int = 50_000_000
    """Width times height, by the header."""
    max_bytes: int = 50_000_000
    max_frames: int = 1000
    """Of an animation, of which the first picture counts."""
    guard: tuple[str, ...] = ()
    """Evaluation images that must not be trained on: parquet files (of images, or of `guard.SIGNATURES`), tars, image
    files, globs, or folders of these."""
    wrong_language: Literal["drop", "relabel"] = "drop"
    """A text whose language is not its row's: dropped, or given its own label if that is "en" or "zh"."""
    rows_per_match: int = 10_000
    """Bounds the memory of a task that compares signatures: 3 kB a row."""

    def __post_init__(self) -> None:
        for name in ("max_aspect_ratio", "max_pixels", "max_bytes", "max_frames", "rows_per_match"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"clean.{name} is {getattr(self, name)}; at least 1.")
        if unknown := sorted({*self.min_characters} - {"en", "zh"}):
            raise ValueError(f"clean.min_characters has {unknown}; the languages are en and zh.")


def run(config: CorpusConfig) -> Report:
    """Cleans the rows of "sources".

    Raises:
        ValueError: if "sources" has no report, the guard list is not there, or the folder holds the work of others.
        RuntimeError: if tasks failed.
    """
    settings = config.section("clean", CleanSettings)
    folder = config.output / "clean"
    source = config.output / "sources" / "rows"
    sources = read_report(config.output / "sources")
    number = len(parts(source))
    buckets = max(1, -(-sources.counts.total(KEPT) // settings.rows_per_match))
    guard = _run_guard(config, settings, folder / "guard")
    measured = MeasureTask(source, folder / "measure", settings, number, buckets, *guard)
    after = ["sources", "clean/guard"]
    run_stage(config, "clean/measure", number, measured, {"clean": settings, "buckets": buckets}, after)
    run_stage(config, "clean/match", buckets, MatchTask(folder, number), {}, ["clean/measure"])
    run_stage(config, "clean/resolve", 1, ResolveTask(folder, number, buckets), {}, ["clean/match"])
    task = FilterTask(source, folder, number)
    report = run_stage(config, "clean", number, task, {"clean": settings}, ["sources", "clean/resolve"])
    for scratch in ("measure/signatures", "match/pairs"):  # nobody reads them again
        shutil.rmtree(folder / scratch, ignore_errors=True)
    return report


def _run_guard(config: CorpusConfig, settings: CleanSettings, folder: Path) -> tuple[int, str]:
    """How many tasks wrote signatures of evaluation images, and the fingerprint of the phase."""
    files = guard_files(settings.guard)
    tasks = min(len(files), 64)
    limits = (settings.max_pixels, settings.max_bytes, settings.max_frames)
    known = {"guard": [(str(file), file.stat().st_size) for file in files], "limits": limits}
    task = GuardTask(folder, tuple(tuple(files[start::tasks]) for start in range(tasks)), settings)
    return tasks, run_stage(config, "clean/guard", tasks, task, known).fingerprint


@dataclass
class _Judged:
    """What "measure" finds out about a row."""

    row: Row
    """Without its image."""
    language: str
    reason: str | None
    picture: Measured

    def fields(self) -> dict[str, Any]:
        return {
            "reason": self.reason,
            "language": self.language,
            "width": self.picture.width,
            "height": self.picture.height,
        }


@dataclass(frozen=True)
class MeasureTask:
    """Applies the rules to the rows of a part; writes what it found, and the signatures of the good rows."""

    source: Path
    folder: Path
    settings: CleanSettings
    parts: int
    buckets: int
    guards: int
    guard: str
    """Fingerprint of the guard list."""

    def __call__(self, number: int) -> Counts:
        judged = list(self._judge(read_rows(parts_once(self.source, self.parts)[number], _READ)))
        good = [at for at, row in enumerate(judged) if row.reason is None]
        thumbs = _thumbnails([judged[at].picture for at in good])
        guard = load_guard(self.folder.parent / "guard", self.guards, self.guard)
        guarded = guard.finds([judged[at].row["image_hash"] for at in good], thumbs)
        signatures = Signatures()
        for at, is_guarded in zip(good, guarded, strict=True):
            if is_guarded:
                judged[at].reason = "evaluation_image"
            else:
                signatures.add(number << 32 | at, judged[at].row, judged[at].language)
        signatures.write(_signatures(self.folder, number), thumbs[~guarded], self.buckets)
        write_rows(part_path(self.folder / "rows", number), (row.fields() for row in judged), _MEASURED)
        counts = Counts()
        for row in judged:
            counts.add(row.row["source"], row.row["language"], row.reason or KEPT)
        return counts

    def _judge(self, rows: Iterator[Row]) -> Iterator[_Judged]:
        last: tuple[str, Measured] | None = None
        for row in rows:
            image = row.pop("image")
            language, reason = judge_text(row["text"], row["language"], self.settings)
            picture = Measured(reason)
            if reason is None:
                if last is None or last[0] != row["image_hash"]:  # captions of one image follow each other
                    last = row["image_hash"], measure(image["bytes"], self.settings)
                picture = last[1]
            yield _Judged(row, language, picture.reason, picture)


_READ = ("id", "source", "image_id", "image", "text", "language", "image_hash")


def judge_text(text: str, language: str, settings: CleanSettings) -> tuple[str, str | None]:
    """The language of a row after the rules, and the reason why its text is no good, or None."""
    if is_broken(text):
        return language, "broken_text"
    if len(text.strip()) < settings.min_characters.get(language, 5):
        return language, "short_text"
    possible = languages_of(text)
    if language in possible:
        return language, None
    if settings.wrong_language == "relabel" and len(possible) == 1:
        return next(iter(possible)), None
    return language, "wrong_language"


def _thumbnails(pictures: list[Measured]) -> np.ndarray:
    smalls = [picture.small for picture in pictures if picture.small is not None]
    return perceptual.thumbnails(np.stack(smalls) if smalls else np.empty((0, 16, 16, 3), np.uint8))


def _signatures(folder: Path, part: int) -> Path:
    return folder / "signatures" / f"part-{part:05d}.arrow"


@dataclass(frozen=True)
class MatchTask:
    """Finds the pairs of one bucket."""

    folder: Path
    parts: int

    def __call__(self, number: int) -> Counts:
        files = [_signatures(self.folder / "measure", part) for part in range(self.parts)]
        pairs = (pair._asdict() for pair in find_pairs(files, number))
        write_rows(part_path(self.folder / "match" / "pairs", number), pairs, PAIRS)
        return Counts()


@dataclass(frozen=True)
class ResolveTask:
    """Decides between the rows of all pairs."""

    folder: Path
    parts: int
    buckets: int

    def __call__(self, number: int) -> Counts:
        found = parts_once(self.folder / "match" / "pairs", self.buckets)
        with PartWriter(part_path(self.folder / "resolve", 0), PAIRS) as writer:
            for table in resolve(found, self.parts):
                writer.write_table(table)
        return Counts()


@dataclass(frozen=True)
class FilterTask:
    """Copies the rows of a part that stay."""

    source: Path
    folder: Path
    parts: int

    def __call__(self, number: int) -> Counts:
        measured = pq.read_table(part_path(self.folder / "measure" / "rows", number))
        twins = read_dropped(part_path(self.folder / "resolve", 0), number)
        rows = read_rows(parts_once(self.source, self.parts)[number])
        counts = Counts()
        with (
            PartWriter(part_path(self.folder / "kept", number)) as kept,
            PartWriter(part_path(self.folder / "dropped", number), DROPPED) as dropped,
        ):
            for at, (row, found) in enumerate(zip(rows, measured.to_pylist(), strict=True)):
                twin = twins.get(at)
                reason = found["reason"] or (twin and ("duplicate" if twin.exact else "near_duplicate"))
                counts.add(row["source"], row["language"], reason or KEPT)
                if reason:
                    dropped.write({**row, "reason": reason, "twin": twin and twin.twin_id})
                else:
                    kept.write({**row, **found})
        return counts
