"""Equal and nearly equal images over all sources, on disk: signatures in buckets, pairs within them, one kept of each.

    measure  each part writes, for every bucket, the signatures whose keys fall into it
    match    each bucket finds the pairs (row, row of higher rank that shows the same)
    resolve  a row is dropped if it has such a pair with a row that is kept

The rank of a row is its place: sources of higher priority come first. All is per language, and rows with one image id
are captions of one image. The result is a function of the rows alone: not of the number of buckets, nor of who runs
which task when.

Not datatrove's ExactDedup: it compares one hash per document, so that of images encoded again 9 in 10 stay, and it
says neither for which row another was dropped, nor knows several captions of one image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval.files import replaced

from . import perceptual

_SIGNED = pa.schema(
    [
        ("place", pa.uint64()),  # number of the part << 32 | number of the row: the rank, lower is higher
        ("id", pa.string()),
        ("image", pa.uint64()),  # language, source and image id, hashed
        ("text", pa.uint64()),
        ("content", pa.binary(16)),  # language and bytes of the image, hashed
        ("thumbnail", pa.binary(perceptual.THUMBNAIL_BYTES)),
        ("exact", pa.bool_()),  # whether `content` falls into the bucket
        ("keys", pa.list_(pa.uint64())),  # those of the thumbnail that do, with the language
    ]
)
PAIRS = pa.schema([("place", pa.uint64()), ("twin", pa.uint64()), ("exact", pa.bool_()), ("twin_id", pa.string())])


@dataclass
class Signatures:
    """What is compared of the rows of one part."""

    places: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    languages: list[int] = field(default_factory=list)

    def add(self, place: int, row: dict[str, Any], language: str) -> None:
        """Adds a row; its thumbnail is given to `write` in the same order."""
        self.places.append(place)
        self.ids.append(row["id"])
        self.images.append(_number(language, row["source"], row["image_id"]))
        self.texts.append(_number(row["text"]))
        self.contents.append(_hashed(16, language, row["image_hash"]))
        self.languages.append(_number(language))

    def write(self, path: Path, thumbs: np.ndarray, buckets: int) -> None:
        """Writes an Arrow file with one batch for each bucket.

        Args:
            thumbs: [rows, THUMBNAIL_BYTES].
        """
        numbers, keys = perceptual.keys(thumbs)
        keys = _mixed(keys ^ _mixed(np.array(self.languages, dtype=np.uint64))[numbers])
        exact = np.array([int.from_bytes(content[:8], "little") for content in self.contents], dtype=np.uint64)
        count = np.uint64(buckets)
        with replaced(path) as beside, pa.OSFile(str(beside), "wb") as file:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_file(file, _SIGNED, options=options) as writer:
                for bucket in range(buckets):
                    there = keys % count == bucket
                    writer.write_batch(self._batch(thumbs, numbers[there], keys[there], exact % count == bucket))

    def _batch(self, thumbs: np.ndarray, numbers: np.ndarray, keys: np.ndarray, exact: np.ndarray) -> pa.RecordBatch:
        order = np.argsort(numbers, kind="stable")
        numbers, keys = numbers[order], keys[order]
        rows = np.union1d(numbers, np.flatnonzero(exact)).astype(np.int64)
        ends = np.append(np.searchsorted(numbers, rows, "left"), len(numbers))
        columns = [
            pa.array(np.array(self.places, dtype=np.uint64)[rows]),
            pa.array([self.ids[row] for row in rows], pa.string()),
            pa.array(np.array(self.images, dtype=np.uint64)[rows]),
            pa.array(np.array(self.texts, dtype=np.uint64)[rows]),
            pa.array([self.contents[row] for row in rows], pa.binary(16)),
            _fixed(thumbs[rows]),
            pa.array(exact[rows]),
            pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(keys, pa.uint64())),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=_SIGNED)


def _fixed(values: np.ndarray) -> pa.Array:
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), buffers)


def _hashed(size: int, *values: str) -> bytes:
    return hashlib.blake2b("\0".join(values).encode(), digest_size=size).digest()


def _number(*values: str) -> int:
    return int.from_bytes(_hashed(8, *values), "little")


def _mixed(values: np.ndarray) -> np.ndarray:
    """Unsigned 64-bit numbers spread over all 64 bits (splitmix64), so that close ones are in different buckets."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Pair(NamedTuple):
    """A row, and one of higher rank that shows the same."""

    place: int
    twin: int
    exact: bool
    """Whether their bytes are the same."""
    twin_id: str


def find_pairs(files: Sequence[Path], bucket: int) -> Iterator[Pair]:
    """The pairs of one bucket.

    A row that has a twin among those of a key is compared with no later row of that key, so that 100,000 white images
    are 100,000 comparisons; memory holds the others.

    Args:
        files: what `Signatures.write` wrote, of all parts in order.
    """
    exact, near = _Exact(), _Near()
    for file in files:
        with pa.memory_map(str(file)) as source:
            batch = pa.ipc.open_file(source).get_batch(bucket)
            thumbs = _thumbnails(batch.column("thumbnail"))
            names = ("place", "id", "image", "text", "content", "exact", "keys")
            columns = [batch.column(name).to_pylist() for name in names]
        for thumb, place, id, image, text, content, is_exact, keys in zip(thumbs, *columns, strict=True):
            row = _Row(place, id, image)
            if is_exact:
                yield from exact.pairs(row, content, text)
            if keys:
                yield from near.pairs(row, keys, thumb)


def _thumbnails(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    buffer = column.buffers()[1]
    values = np.frombuffer(buffer, np.uint8) if len(column) else np.empty(0, np.uint8)
    return values.reshape(-1, perceptual.THUMBNAIL_BYTES).copy()


class _Row(NamedTuple):
    place: int
    id: str
    image: int


class _Exact:
    """Rows by the bytes of their image."""

    def __init__(self) -> None:
        self._first: dict[bytes, tuple[_Row, set[int]]] = {}

    def pairs(self, row: _Row, content: bytes, text: int) -> Iterator[Pair]:
        first, texts = self._first.setdefault(content, (row, set()))
        if first.image != row.image or text in texts:  # another image; or the same caption of the same image again
            yield Pair(row.place, first.place, True, first.id)
        else:
            texts.add(text)


class _Near:
    """Rows by the keys of their thumbnails."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._thumbs = np.empty((1024, perceptual.THUMBNAIL_BYTES), np.uint8)
        self._by_key: dict[int, list[int]] = {}

    def pairs(self, row: _Row, keys: list[int], thumb: np.ndarray) -> Iterator[Pair]:
        lists = [self._by_key.setdefault(key, []) for key in keys]
        candidates = sorted({number for numbers in lists for number in numbers})
        found = np.flatnonzero(perceptual.are_twins(thumb, self._thumbs[candidates])) if candidates else ()
        twins = {candidates[at] for at in found}
        for twin in (self._rows[number] for number in sorted(twins)):
            if twin.image != row.image:
                yield Pair(row.place, twin.place, False, twin.id)
        # Key by key, since a key is in one bucket, but the keys of a row in as many as there are buckets.
        without = [numbers for numbers in lists if twins.isdisjoint(numbers)]
        if without:
            number = self._add(row, thumb)
            for numbers in without:
                numbers.append(number)

    def _add(self, row: _Row, thumb: np.ndarray) -> int:
        number = len(self._rows)
        if number == len(self._thumbs):
            self._thumbs = np.concatenate([self._thumbs, np.empty_like(self._thumbs)])
        self._thumbs[number] = thumb
        self._rows.append(row)
        return number


def resolve(files: Sequence[Path], parts: int, pairs_at_once: int = 5_000_000) -> Iterator[pa.Table]:
    """Which rows are dropped, and for which row that is kept: one pair for each, sorted by place.

    A row is dropped if one of its pairs is with a row that is kept; pairs of the same bytes first, then of the highest
    rank. Where A shows the same as B and B as C, but A not the same as C, then B is dropped for C, and A stays.

    Memory holds some of the pairs, and 8 bytes for each row that is dropped.

    Args:
        files: pairs, of all buckets.
        parts: how many there are of the rows.
    """
    steps = -(-sum(pq.read_metadata(file).num_rows for file in files) // pairs_at_once)
    bounds = sorted({parts * step // max(steps, 1) for step in range(max(steps, 1) + 1)})
    dropped = np.empty(0, np.uint64)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        places = [("place", ">=", first << 32), ("place", "<", last << 32)]
        table = _resolved(pa.concat_tables(pq.read_table(file, filters=places) for file in files), dropped)
        dropped = np.concatenate([dropped, table["place"].to_numpy()])
        yield table


def _resolved(pairs: pa.Table, dropped: np.ndarray) -> pa.Table:
    """`resolve`, of the pairs of some places after those of which `dropped` are dropped."""
    pairs = pairs.sort_by([("place", "ascending"), ("exact", "descending"), ("twin", "ascending")])
    places, twins = pairs["place"].to_numpy(), pairs["twin"].to_numpy()
    kept = ~np.isin(twins, places) & ~np.isin(twins, dropped)  # a twin without pairs is kept
    undecided = np.setdiff1d(places, places[kept])
    saved: set[int] = set()
    # In order of rank, so that all twins of a place are decided before it.
    for at in np.flatnonzero(np.isin(places, undecided)):
        place = int(places[at])
        if at and places[at - 1] == place:
            continue
        last = np.searchsorted(places, place, "right")
        if not saved.intersection(twins[at:last].tolist()):
            saved.add(place)
    kept |= np.isin(twins, np.array(sorted(saved), dtype=np.uint64))
    places, first = np.unique(places[kept], return_index=True)
    return pairs.take(pa.array(np.flatnonzero(kept)[first]))


def read_dropped(file: Path, part: int) -> dict[int, Pair]:
    """Row number -> its pair, of the rows of one part that are dropped; from a file of what `resolve` gave."""
    low, high = part << 32, (part + 1) << 32
    table = pq.read_table(file, filters=[("place", ">=", low), ("place", "<", high)])
    return {row["place"] - low: Pair(**row) for row in table.to_pylist()}
