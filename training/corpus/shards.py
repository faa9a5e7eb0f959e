"""The last stage of the rows: everything that was kept, shuffled over the whole corpus, as shards to train on.

    corpus/shards/train-00000-00000.parquet ...   one image with all its captions per row
    corpus/shards/index.json                      file, split, rows, pairs per language, bytes, SHA-256
    corpus/shards/manifest.json, README.md        how it was made and what became of every row; the data card

Phases: "shards/scatter" sends the rows of each part to buckets, "shards/write" makes the shards of each bucket. Between
them the number of pairs of each language is known, and with it how many of the larger one go (`zh_share`).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from eval.files import read_json, write_json

from . import manifest, shuffle
from .config import CorpusConfig
from .engine import KEPT, Counts, Report, claim, run_stage, write_report
from .publish import publish
from .rows import parts
from .shard_task import BALANCE, SHARDS_PER_BUCKET, VALIDATION, ShardTask
from .shard_writers import LANGUAGES

NO_IMAGE = "no_image"
REASONS = {
    NO_IMAGE: "a row without image bytes",
    BALANCE: "its language has more pairs than `zh_share` leaves room for",
    VALIDATION: "in the validation shards",
}


@dataclass(frozen=True)
class ShardsSettings:
    """`shards:` of the corpus file."""

    format: Literal["parquet", "tar", "both"] = "parquet"
    """Of "both", each has everything: name one of them to a reader, as in `shards/train-*.tar`."""
    bytes: int = 2**28
    """Of the largest shard: images and texts. A worker needs about ten times as much memory."""
    zh_share: float | None = None
    """Share of Chinese among the pairs (BM-6B: half, 3 G of 6 G); the language with too many loses some, chosen by a
    hash. None keeps all."""
    validation: float = 0.0
    """Share of the images that go to shards of their own, `validation-*`."""
    fan_out: int = 512
    """Files that a task writes at once at most."""
    title: str = "A bilingual image-text corpus"
    """Of the data card."""
    push_to_hub: str | None = None
    """`owner/name` of a data set on the Hub. Run the stage again to go on with a push that was cut off."""
    private: bool = True
    """Whether that data set is made private."""

    def __post_init__(self) -> None:
        if self.bytes < 1:
            raise ValueError(f"shards.bytes is {self.bytes}; at least 1.")
        if self.zh_share is not None and not 0 < self.zh_share < 1:
            raise ValueError(f"shards.zh_share is {self.zh_share}; between 0 and 1, or leave it out to keep all pairs.")
        if not 0 <= self.validation < 1:
            raise ValueError(f"shards.validation is {self.validation}; a share from 0 to below 1.")
        if self.fan_out < 2:
            raise ValueError(f"shards.fan_out is {self.fan_out}; at least 2.")

    @property
    def formats(self) -> tuple[str, ...]:
        return ("parquet", "tar") if self.format == "both" else (self.format,)

    def of_content(self) -> dict[str, Any]:
        """What decides which bytes the shards have."""
        return {"format": self.format, "bytes": self.bytes, "zh_share": self.zh_share, "validation": self.validation}


def run(config: CorpusConfig) -> Report:
    """Makes the shards, their index, the manifest and the card; then pushes them if the settings say so.

    Raises:
        ValueError: if a stage before has no report or kept nothing, the balance cannot be reached, the folder holds
            the work of other settings, or an id occurs twice.
        RuntimeError: if tasks failed.
    """
    settings = config.section("shards", ShardsSettings)
    folder = config.output / "shards"
    streams = inputs(config)
    input_parts.cache_clear()  # the stages before may have run since
    files = input_parts(config.output, streams)
    claim(folder, {"stage": "shards", "seed": config.seed, "settings": settings.of_content()})
    weight = sum(file.stat().st_size for file in files)
    buckets = min(settings.fan_out, max(1, -(-weight // (SHARDS_PER_BUCKET * settings.bytes))))
    scattered = run_stage(
        config,
        "shards/scatter",
        len(files),
        ScatterTask(config.output, streams, config.seed, buckets),
        {"buckets": buckets},
        after=tuple(dict.fromkeys(stage for stage, _ in streams)),
    )
    limit = balance(folder / "scatter", scattered.counts, settings)
    written = run_stage(
        config,
        "shards/write",
        buckets,
        ShardTask(folder, settings.formats, settings.bytes, settings.validation, settings.fan_out, limit),
        {**settings.of_content(), "limit": limit},
        after=("shards/scatter",),
    )
    counts = Counts(written.counts.as_dict())
    for source, languages in scattered.counts.as_dict().items():
        for language, outcomes in languages.items():
            if NO_IMAGE in outcomes:
                counts.add(source, language, NO_IMAGE, outcomes[NO_IMAGE])
    report = Report("shards", buckets, counts, settings.of_content(), written.fingerprint)
    manifest.write(config, report, settings.title, settings.push_to_hub)
    write_report(folder, report)
    _sweep(folder)
    if settings.push_to_hub:
        publish(folder, settings.push_to_hub, private=settings.private)
    return report


def _sweep(folder: Path) -> None:
    """Removes the buckets, and what killed tasks left beside the shards."""
    for scratch in (folder / "scatter" / "buckets", folder / "write" / "scratch"):
        shutil.rmtree(scratch, ignore_errors=True)
    for split in ("train", "validation"):
        for half in folder.glob(f".{split}-*"):
            half.unlink(missing_ok=True)


def inputs(config: CorpusConfig) -> tuple[tuple[str, str], ...]:
    """(stage, stream) of all rows that go into the shards: those of the last stage that chose, and what was added."""
    first = next((pair for pair in _CHOOSING if config.has(pair[0])), ("sources", "rows"))
    return (first, *((stage, "kept") for stage in ("rewrite", "translate") if config.has(stage)))


@lru_cache(maxsize=1)
def input_parts(output: Path, streams: tuple[tuple[str, str], ...]) -> list[Path]:
    """Listed once per process; a task that carried them would be pickled with all of them for each part."""
    return [part for stage, stream in streams for part in parts(output / stage / stream)]


_CHOOSING = (("score", "high"), ("clean", "kept"))


def balance(folder: Path, counts: Counts, settings: ShardsSettings) -> tuple[str, int] | None:
    """The language with too many pairs, and the pick from which on its pairs go; None if all stay.

    Kept in a file, because the buckets it is read from are removed in the end.

    Raises:
        ValueError: if one language has no pair at all.
    """
    path = folder / "balance.json"
    if settings.zh_share is None:
        return None
    if not path.is_file():
        have = {language: counts.total(KEPT, language=language) for language in LANGUAGES}
        if not all(have.values()):
            raise ValueError(f"shards.zh_share is {settings.zh_share}, but there are {have} pairs: leave it out.")
        language, keep = _surplus(have, settings.zh_share)
        files = sorted((folder / "buckets").glob("*/part-*"))
        limit = shuffle.nth_pick(files, language, keep) if keep < have[language] else None
        write_json(path, {"language": language, "had": have[language], "keep": keep, "limit": limit})
    values = read_json(path)
    return None if values["limit"] is None else (values["language"], values["limit"])


def _surplus(have: dict[str, int], zh_share: float) -> tuple[str, int]:
    """The language of which some must go, and how many pairs of it may stay."""
    share = Fraction(str(zh_share))
    keep_zh = int(have["en"] * share / (1 - share))
    if keep_zh < have["zh"]:
        return "zh", keep_zh
    return "en", min(have["en"], int(have["zh"] * (1 - share) / share))


@dataclass(frozen=True)
class ScatterTask:
    """Sends the rows of one part to the buckets."""

    output: Path
    streams: tuple[tuple[str, str], ...]
    seed: int
    buckets: int

    def __call__(self, number: int) -> Counts:
        counts, seen = Counts(), set()
        folder = self.output / "shards" / "scatter" / "buckets"
        with shuffle.Scatter(folder, f"part-{number:06d}.parquet") as scatter:
            for batch in shuffle.batches([input_parts(self.output, self.streams)[number]]):
                has_image = pc.is_valid(pc.struct_field(batch.column("image"), "bytes"))
                names = (batch.column(name).to_pylist() for name in ("id", "source", "language"))
                for identity, source, language, kept in zip(*names, has_image.to_pylist(), strict=True):
                    if language not in LANGUAGES:
                        raise ValueError(f"Row {identity!r} is in language {language!r}; expected one of {LANGUAGES}.")
                    counts.add(source, language, KEPT if kept else NO_IMAGE)
                rows = shuffle.keyed(batch.filter(has_image), self.seed, seen)
                places = rows.column("place").to_pylist()
                scatter.write(rows, np.array([shuffle.bucket_of(place, self.buckets) for place in places], np.int64))
        return counts
