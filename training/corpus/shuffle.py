"""A global shuffle in two passes whose memory does not grow with the corpus, and the shards it is cut into.

Every image has a place in [0, 2^64), a hash of the seed and the image's own hash: sorted by place, the corpus is
shuffled, the same way whoever does it. Pass one (`Scatter`) sends the rows of each part to buckets, ranges of places.
Pass two (`training.corpus.shard_task`) reads one bucket, cuts it into shards and sorts each of them. Rows of one image
have one place, so they meet whatever source and stage they come from: a shard holds each image once, with its texts.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .rows import SCHEMA

PLACES = 2**64
_BUFFER = 2**26  # bytes that wait for all buckets together
_ROWS = 256

KEYS = [
    ("place", pa.uint64()),  # of the image in the shuffled corpus
    ("draw", pa.uint64()),  # decides whether the image is for validation
    ("pick", pa.uint64()),  # of the pair: where a language has too many, those with the highest go
    ("image_size", pa.int64()),  # bytes
    ("pair_size", pa.int64()),  # bytes of the text and what is told of it
]
_TEXTS = ("id", "source", "url", "text", "licence", "raw_text", "origin", "language")
# Pairs of one image in one part share one copy of its bytes: `image` of the others is null.
BUCKET_SCHEMA = pa.schema(
    [("image", pa.large_binary()), *[(f.name, f.type) for f in SCHEMA if f.name != "image"], *KEYS]
)
_COMPRESSION = {name: "none" if name == "image" else "zstd" for name in BUCKET_SCHEMA.names}


def hashes(seed: int, text: str) -> tuple[int, int]:
    """Two independent numbers in [0, 2^64), uniform over texts."""
    digest = hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def bucket_of(place: int, buckets: int) -> int:
    """Buckets are equal ranges of places, in their order."""
    return place * buckets // PLACES


class Scatter:
    """Writes rows to `<folder>/<bucket>/<name>`; the files appear, whole, when the `with` ends without an error.

    Memory: `_BUFFER` bytes, and 200 bytes per image of the part.
    """

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._waiting: dict[int, list[pa.RecordBatch]] = {}
        self._bytes = 0
        self._files: dict[int, tuple[pq.ParquetWriter, Path]] = {}

    def write(self, batch: pa.RecordBatch, buckets: np.ndarray) -> None:
        """Rows of `BUCKET_SCHEMA`, and the bucket of each."""
        for bucket in np.unique(buckets).tolist():
            rows = batch.take(pa.array(np.flatnonzero(buckets == bucket)))
            self._waiting.setdefault(bucket, []).append(rows)
            self._bytes += rows.nbytes
        if self._bytes > _BUFFER:
            self._flush()

    def _flush(self) -> None:
        for bucket, batches in sorted(self._waiting.items()):
            if bucket not in self._files:
                path = self._folder / f"{bucket:05d}" / self._name
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
                self._files[bucket] = (pq.ParquetWriter(beside, BUCKET_SCHEMA, compression=_COMPRESSION), beside)
            self._files[bucket][0].write_table(pa.Table.from_batches(batches))
        self._waiting, self._bytes = {}, 0

    def __enter__(self) -> Scatter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if failure is None:
                self._flush()
            for bucket, (file, beside) in self._files.items():
                file.close()
                if failure is None:
                    os.replace(beside, self._folder / f"{bucket:05d}" / self._name)
        finally:
            for _, beside in self._files.values():
                beside.unlink(missing_ok=True)


def keyed(batch: pa.RecordBatch, seed: int, seen: set[str]) -> pa.RecordBatch:
    """Rows of `rows.SCHEMA` as rows of `BUCKET_SCHEMA`.

    Args:
        seen: the hashes of images whose bytes were written already; this batch's are added.
    """
    columns = {field.name: batch.column(field.name) for field in SCHEMA}
    image = pc.struct_field(columns.pop("image"), "bytes").cast(pa.large_binary())
    names = [
        name or hashlib.sha256(data.as_py()).hexdigest()
        for name, data in zip(columns["image_hash"].to_pylist(), image, strict=True)
    ]
    first = [name not in seen and not seen.add(name) for name in names]
    places, draws = zip(*(hashes(seed, name) for name in names), strict=True) if names else ((), ())
    columns["image_hash"] = pa.array(names, pa.string())
    columns["image"] = pc.if_else(pa.array(first, pa.bool_()), image, pa.scalar(None, pa.large_binary()))
    columns["place"], columns["draw"] = pa.array(places, pa.uint64()), pa.array(draws, pa.uint64())
    picks = [hashes(seed, name)[0] for name in columns["id"].to_pylist()]
    columns["pick"] = pa.array(picks, pa.uint64())
    columns["image_size"] = pc.binary_length(image)
    columns["pair_size"] = _text_sizes(columns)
    return pa.RecordBatch.from_arrays(
        [columns[field.name].cast(field.type) for field in BUCKET_SCHEMA], schema=BUCKET_SCHEMA
    )


def _text_sizes(columns: dict[str, pa.Array]) -> pa.Array:
    sizes = [pc.fill_null(pc.binary_length(columns[name]), 0).cast(pa.int64()) for name in _TEXTS]
    total = sizes[0]
    for size in sizes[1:]:
        total = pc.add(total, size)
    return total


def read_keys(files: Iterable[Path], columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of all rows of a bucket, without the images."""
    tables = [_read(file, columns) for file in files]
    if not tables:
        return {name: np.empty(0, object) for name in columns}
    table = pa.concat_tables(tables)
    return {name: table.column(name).to_numpy() for name in columns}


def _read(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    # Not pq.read_table: in a folder like "seed=1" it finds a column that the file does not have.
    with pq.ParquetFile(file) as opened:
        return opened.read(columns=None if columns is None else list(columns), use_threads=False)


def batches(files: Iterable[Path]) -> Iterator[pa.RecordBatch]:
    """The rows of files of `BUCKET_SCHEMA` or `rows.SCHEMA`, a few at a time."""
    for file in files:
        with pq.ParquetFile(file) as opened:
            yield from opened.iter_batches(batch_size=_ROWS, use_threads=False)


def sorted_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of a few shards by place, image and id. In memory: these files, and a few rows as Python objects."""
    table = pa.concat_tables([_read(file) for file in files])
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ("place", "image_hash", "id")])
    for start in range(0, len(order), _ROWS):
        yield from table.take(order.slice(start, _ROWS)).to_pylist()


def nth_pick(files: Sequence[Path], language: str, number: int) -> int:
    """The `number`-th smallest pick (from 0) of the pairs in a language, over all buckets.

    By a histogram of 65,536 ranges and then the values of one of them: 6 G pairs need 1 MB, and are read twice.
    """
    histogram = np.zeros(2**16, np.int64)
    for picks in _picks(files, language):
        histogram += np.bincount((picks >> np.uint64(48)).astype(np.int64), minlength=2**16)
    before = np.cumsum(histogram)
    chosen = int(np.searchsorted(before, number, side="right"))
    inside = [picks[(picks >> np.uint64(48)) == chosen] for picks in _picks(files, language)]
    return int(np.sort(np.concatenate(inside))[number - (int(before[chosen - 1]) if chosen else 0)])


def _picks(files: Sequence[Path], language: str) -> Iterator[np.ndarray]:
    for file in files:
        table = _read(file, ["pick", "language"])
        yield table.filter(pc.equal(table["language"], language))["pick"].to_numpy()


def cut(sizes: np.ndarray, limit: int) -> list[int]:
    """Where shards begin so that none is larger than `limit`, there are as few as can be, and the largest is smallest.

    Args:
        sizes: [n] bytes of each image with its texts, in order. One that is larger than `limit` is a shard of its own.
    """
    if not len(sizes):
        return []
    ends = np.cumsum(sizes)
    fewest = len(_greedy(ends, limit))
    low, high = max(int(ends[-1]) // fewest, 1), limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedy(ends, middle)) <= fewest else (middle + 1, high)
    return _greedy(ends, high)


def _greedy(ends: np.ndarray, limit: int) -> list[int]:
    starts, before = [0], 0
    while True:
        end = max(int(np.searchsorted(ends, before + limit, side="right")), starts[-1] + 1)
        if end >= len(ends):
            return starts
        starts.append(end)
        before = int(ends[end - 1])
