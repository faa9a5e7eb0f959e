"""Finished stages for the tests of what comes after them: parts of small images, and reports that add up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.training.samples import encoded
from training.corpus.config import CorpusConfig, ExecutorSettings
from training.corpus.engine import KEPT, Counts, Report, write_report
from training.corpus.rows import write_rows

TEXTS = {"en": "a picture with the number {}", "zh": "一张写着数字{}的图片"}


def image_bytes(number: int, side: int = 16) -> bytes:
    """A PNG of noise, about 3 bytes per pixel."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def row(source: str, number: int, language: str, drawn: int | None = None, **changes: Any) -> dict[str, Any]:
    """A row as the stage `clean` keeps it."""
    data = image_bytes(number if drawn is None else drawn)
    return {
        "id": f"{source}/0/{number}",
        "source": source,
        "image_id": f"0/{number}",
        "image": {"bytes": data, "path": None},
        "text": TEXTS[language].format(number),
        "language": language,
        "licence": "cc0-1.0",
        "image_hash": hashlib.sha256(data).hexdigest(),
        "width": 16,
        "height": 16,
        "origin": "raw",
        **changes,
    }


def bilingual(english: int, chinese: int, source: str = "drawn") -> list[dict[str, Any]]:
    """Rows with an image each, English first."""
    return [row(source, n, "en" if n < english else "zh") for n in range(english + chinese)]


def corpus(output: Path, rows: Sequence[dict[str, Any]], sections: dict[str, Any], **changes: Any) -> CorpusConfig:
    """A corpus whose stages `sources` and `clean` are done, with `rows` in parts of 50."""
    finish(output, "sources", "rows", rows)
    finish(output, "clean", "kept", rows)
    executor = changes.pop("executor", ExecutorSettings(workers=1))
    return CorpusConfig(output, changes.pop("seed", 0), executor, {"sources": {}, "clean": {}, **sections}, **changes)


def finish(output: Path, stage: str, stream: str, rows: Sequence[dict[str, Any]], counts: Counts | None = None) -> None:
    """Writes parts and a report of a stage that kept all rows, or counted as `counts` says."""
    starts = range(0, max(len(rows), 1), 50)
    for number, start in enumerate(starts):
        write_rows(output / stage / stream / f"part-{number:05d}.parquet", rows[start : start + 50])
    if counts is None:
        counts = Counts()
        for one in rows:
            counts.add(one["source"], one["language"], KEPT)
    digest = hashlib.sha256(repr([(one["id"], one["text"]) for one in rows]).encode()).hexdigest()[:16]
    write_report(output / stage, Report(stage, len(starts), counts, {}, digest))
