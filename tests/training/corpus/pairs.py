"""Rows with drawn pictures, as the stage before would have left them, so that each stage is tested alone."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.corpus.config import CorpusConfig, ExecutorSettings
from training.corpus.engine import KEPT, Counts, Report, write_report
from training.corpus.rows import Row, read_rows, write_rows

ENGLISH = ["a red circle", "a green square and a dog", "two big blue circles", "the photo of a cat", "a big dog"]
CHINESE = ["一张红色圆的照片", "绿色方块和狗", "两只蓝色的猫", "一只猫的照片", "蓝色的方块"]


def picture(number: int, kind: str = "PNG") -> bytes:
    """The encoded picture of this number: noise, and a size of its own."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (30 + number % 7, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def row(number: int, language: str = "en", **changes: Any) -> Row:
    """A clean row."""
    image = picture(number)
    texts = CHINESE if language == "zh" else ENGLISH
    return {
        "id": f"{language}/{number}",
        "source": f"drawn-{language}",
        "image_id": f"{number}",
        "image": {"bytes": image, "path": None},
        "url": None,
        "text": f"{texts[number % len(texts)]}",
        "language": language,
        "licence": "CC0",
        "image_hash": hashlib.sha256(image).hexdigest(),
        "width": 40,
        "height": 30 + number % 7,
        "score": None,
        "raw_text": None,
        "origin": "raw",
        **changes,
    }


def mixed(number: int) -> list[Row]:
    """So many rows, English and Chinese in turn."""
    return [row(place, "zh" if place % 2 else "en") for place in range(number)]


def config(output: Path, sections: Mapping[str, Any], workers: int = 1) -> CorpusConfig:
    return CorpusConfig(output, 0, ExecutorSettings("local", workers), dict(sections))


def finished(output: Path, stage: str, streams: Mapping[str, Sequence[Row]], part: int = 10) -> None:
    """Writes the streams of a stage in parts of so many rows, and its report."""
    counts = Counts()
    tasks = max(1, *(-(-len(rows) // part) for rows in streams.values()))
    for stream, rows in streams.items():
        for place in range(tasks):
            own = rows[place * part : (place + 1) * part]
            write_rows(output / stage / stream / f"part-{place:05d}.parquet", own)
        for item in rows:
            counts.add(item["source"], item["language"], KEPT if stream in ("kept", "high") else stream)
    write_report(output / stage, Report(stage, tasks, counts, {}, f"fingerprint of {stage}"))


def stream(folder: Path) -> list[Row]:
    """All rows of a stream, in order."""
    return [item for path in sorted(folder.glob("part-*.parquet")) for item in read_rows(path)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a stage wrote, but datatrove's logs."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".tasks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
