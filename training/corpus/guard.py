"""Evaluation images, so that none of them, nor a copy in other bytes, is trained on."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import perceptual
from .engine import KEPT, Counts
from .pictures import Limits, measure
from .reading import Lost, Slice, image_column, read
from .rows import part_path, parts_once, write_rows

SIGNATURES = pa.schema([("image_hash", pa.string()), ("thumbnail", pa.binary(perceptual.THUMBNAIL_BYTES))])
"""A guard list without the images: SHA-256 in hexadecimal, and `perceptual.thumbnails`. It can be published where the
images cannot, and named as a guard itself."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def guard_files(patterns: Sequence[str]) -> list[Path]:
    """The files that a guard list names: parquet, tar and images; of folders all that are in them, at any depth.

    Raises:
        ValueError: for a name that stands for none, or a parquet file without images: a benchmark that is not read
            is not kept out.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
        files = [path] if path.is_file() else [file for file in inside if file.is_file()]
        files = sorted(file for file in files if file.suffix.lower() in (".parquet", ".tar", *_PICTURES))
        if not files:
            raise ValueError(
                f"clean.guard: no parquet, tar or image file matches {pattern!r} (seen from {Path.cwd()})."
            )
        found += files
    for file in found:
        if file.suffix.lower() == ".parquet" and not _is_signatures(file):
            image_column(file)
    return found


def _is_signatures(file: Path) -> bool:
    try:
        return set(SIGNATURES.names) <= set(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"clean.guard: {file} is no readable parquet file: {error}") from error


@dataclass(frozen=True)
class GuardTask:
    """Writes the signatures of the images of some files."""

    folder: Path
    files: tuple[tuple[Path, ...], ...]
    limits: Limits

    def __call__(self, number: int) -> Counts:
        counts = Counts()
        # A guard image may have any shape; what cannot be decoded cannot be trained on either.
        limits = dataclasses.replace(self.limits, max_aspect_ratio=math.inf)

        def signatures() -> Iterator[dict[str, Any]]:
            for file in self.files[number]:
                for image in _images(file):
                    row, outcome = (image, KEPT) if isinstance(image, dict) else _signature(image, limits)
                    counts.add("guard", "none", outcome)
                    if row is not None:
                        yield row

        write_rows(part_path(self.folder, number), signatures(), SIGNATURES)
        return counts


def _images(file: Path) -> Iterator[bytes | None | dict[str, Any]]:
    """Encoded images, or signatures."""
    if file.suffix.lower() in _PICTURES:
        yield file.read_bytes()
    elif file.suffix.lower() == ".parquet" and _is_signatures(file):
        for batch in pq.ParquetFile(file).iter_batches(columns=SIGNATURES.names):
            yield from batch.to_pylist()
    else:
        is_table = file.suffix.lower() == ".parquet"
        columns = {"image": image_column(file)} if is_table else {"image": "jpg", "text": "txt"}
        for record in read(Slice(str(file), 0), columns):
            yield None if isinstance(record, Lost) else record.values["image"]


def _signature(image: bytes | None, limits: Limits) -> tuple[dict[str, Any] | None, str]:
    if not isinstance(image, bytes) or not image:
        return None, "no_image"
    measured = measure(image, limits)
    thumbnail = None if measured.small is None else perceptual.thumbnails(measured.small[None])[0].tobytes()
    return {"image_hash": hashlib.sha256(image).hexdigest(), "thumbnail": thumbnail}, measured.reason or KEPT


class Guard:
    """Finds evaluation images among others, in memory: 0.4 kB each."""

    def __init__(self, hashes: Sequence[str], thumbs: np.ndarray):
        self._hashes, self._thumbs = frozenset(hashes), thumbs
        numbers, keys = perceptual.keys(thumbs)
        order = np.argsort(keys, kind="stable")
        self._numbers, self._keys = numbers[order], keys[order]

    def finds(self, hashes: Sequence[str], thumbs: np.ndarray) -> np.ndarray:
        """Which images, with SHA-256 and thumbnails [N, THUMBNAIL_BYTES], are evaluation images -> [N] bool."""
        found = np.array([hash in self._hashes for hash in hashes], dtype=bool)
        numbers, keys = perceptual.keys(thumbs)
        first, last = np.searchsorted(self._keys, keys, "left"), np.searchsorted(self._keys, keys, "right")
        for at in np.flatnonzero(last > first):
            number = numbers[at]
            if not found[number]:
                candidates = self._thumbs[self._numbers[first[at] : last[at]]]
                found[number] = perceptual.are_twins(thumbs[number], candidates).any()
        return found


@lru_cache(maxsize=1)
def load_guard(folder: Path, number: int, fingerprint: str) -> Guard:
    """The guard that `number` tasks wrote; `fingerprint` tells it from another one that was in the same folder."""
    tables = [pq.read_table(part) for part in parts_once(folder, number)] if number else [SIGNATURES.empty_table()]
    table = pa.concat_tables(tables)
    thumbs = b"".join(value for value in table["thumbnail"].to_pylist() if value is not None)
    return Guard(
        table["image_hash"].to_pylist(), np.frombuffer(thumbs, np.uint8).reshape(-1, perceptual.THUMBNAIL_BYTES)
    )
