"""The one schema that all stages read and write, and parts: parquet files of rows, whole or not there.

A row is one image with one text in one language (paper, section 2.2: an image-text pair). A stage writes each of its
streams as a folder of parts, `<output>/<stage>/<stream>/part-00000.parquet`; a task that does not know how many rows
it will have writes several, `part-00000-00000.parquet`, ....
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The `Image` feature of `datasets`: encoded bytes, as the source gave them."""

_FIELDS = [
    ("id", pa.string()),  # unique in the corpus: source, place in the source
    ("source", pa.string()),
    ("image_id", pa.string()),  # rows of one source with the same one are captions of one image, not duplicates
    ("image", IMAGE),
    ("url", pa.string()),  # null where the source names none
    ("text", pa.string()),
    ("language", pa.string()),  # "en" or "zh"; what the source says, later what was identified
    ("licence", pa.string()),  # null where unknown
    ("image_hash", pa.string()),  # SHA-256 of the encoded bytes, hexadecimal
    ("width", pa.int32()),  # pixels; null until measured
    ("height", pa.int32()),
    ("score", pa.float32()),  # cosine of image and text, in [-1, 1]; null until scored
    ("raw_text", pa.string()),  # what the source said, where `text` is a rewriting or a translation
    ("origin", pa.string()),  # "raw", "rewritten" or "translated"
]
_FEATURES = {
    name: {"_type": "Image"}
    if name == "image"
    else {"_type": "Value", "dtype": "float32" if kind == pa.float32() else str(kind)}
    for name, kind in _FIELDS
}

SCHEMA = pa.schema(
    [pa.field(name, kind) for name, kind in _FIELDS],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
"""`datasets.load_dataset("parquet", ...)` decodes the images of a part with it."""

DROPPED = pa.schema([(name, pa.string()) for name in ("id", "source", "language", "reason", "twin")])
"""What is left of a row that does not go on; `twin` is the id of the row that is kept instead, or null."""

Row = dict[str, Any]
_ROWS_PER_GROUP, _BYTES_PER_GROUP = 256, 2**25  # what a reader holds at once, and one image more


def part_path(folder: Path, task: int) -> Path:
    """Where a task writes its part of a stream."""
    return folder / f"part-{task:05d}.parquet"


def parts(folder: Path) -> list[Path]:
    """The parts of one stream, in order.

    Raises:
        ValueError: if there is none, which means that the stage before did not run or failed.
    """
    found = sorted(folder.glob("part-*.parquet"), key=_numbers)
    if not found:
        raise ValueError(f"No parts in {folder}: run the stage that writes them first.")
    return found


@lru_cache(maxsize=4)
def parts_once(folder: Path, number: int) -> list[Path]:
    """`parts`, listed once per process: for tasks, which are many. `number` parts are expected.

    Raises:
        ValueError: if there are more or fewer.
    """
    found = parts(folder)
    if len(found) != number:
        raise ValueError(f"{folder} has {len(found)} parts, not {number}: it was changed after its stage was run.")
    return found


def _numbers(part: Path) -> list[int]:
    """By number, since the hundred thousandth part has one digit more."""
    return [int(number) for number in re.findall(r"\d+", part.stem)]


def read_rows(part: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a part, one row group in memory at a time."""
    with pq.ParquetFile(part) as file:
        for group in range(file.num_row_groups):
            # One thread: as many tasks run as there are cores.
            table = file.read_row_group(group, None if columns is None else list(columns), use_threads=False)
            yield from table.to_pylist()


class PartWriter:
    """Writes rows to `path` as parquet with zstd; the file is there, whole, only after a `with` without an error.

    Equal rows in equal order give equal bytes.
    """

    def __init__(self, path: Path, schema: pa.Schema = SCHEMA):
        self.path, self.schema, self.rows = path, schema, 0
        self._waiting: list[Mapping[str, Any]] = []
        self._bytes = 0
        # Not one fixed name: a worker that outlived its killed run may still write the same part.
        self._beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(self._beside, schema, compression="zstd")

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row; missing columns are null."""
        self._waiting.append(row)
        self.rows += 1
        image = row.get("image")
        self._bytes += len(image["bytes"] or b"") if isinstance(image, dict) else 0
        if len(self._waiting) == _ROWS_PER_GROUP or self._bytes >= _BYTES_PER_GROUP:
            self._flush()

    def write_table(self, table: pa.Table) -> None:
        """Adds rows that are a table already, as row groups of their own."""
        self._file.write_table(table.cast(self.schema))
        self.rows += len(table)

    def _flush(self) -> None:
        self._file.write_table(pa.Table.from_pylist(self._waiting, schema=self.schema))
        self._waiting.clear()
        self._bytes = 0

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if failure is None:
                if self._waiting or not self.rows:  # an empty part is a part
                    self._flush()
                self._file.close()
                os.replace(self._beside, self.path)
            else:
                self._file.close()
        finally:
            self._beside.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema = SCHEMA) -> int:
    """Writes a whole part; returns the number of rows."""
    with PartWriter(path, schema) as writer:
        for row in rows:
            writer.write(row)
    return writer.rows


class RowsWriter:
    """Writes the rows of a task as parts of at most `limit` rows each; at least one part, which may be empty."""

    def __init__(self, folder: Path, task: int, limit: int):
        self._folder, self._task, self._limit, self._number = folder, task, limit, 0
        self._part = self._open()

    def _open(self) -> PartWriter:
        return PartWriter(self._folder / f"part-{self._task:05d}-{self._number:05d}.parquet")

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row; missing columns are null."""
        if self._part.rows == self._limit:
            self._part.__exit__(None)
            self._number += 1
            self._part = self._open()
        self._part.write(row)

    def __enter__(self) -> RowsWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *rest: object) -> None:
        self._part.__exit__(failure, *rest)
