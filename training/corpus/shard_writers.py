"""A shard, as parquet or as a tar file: one image with all its captions per row.

Tested by `tests/training/corpus/test_shards.py`, with `datasets` and `training.data` as the readers.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval.files import sha256_of

from .rows import IMAGE

LANGUAGES = ("en", "zh")
PAIR_FIELDS = {
    "id": pa.string(),
    "language": pa.string(),
    "source": pa.string(),
    "url": pa.string(),
    "licence": pa.string(),
    "score": pa.float32(),
    "raw_text": pa.string(),
    "origin": pa.string(),
}
"""What is told of each caption. The k-th pair of a language is about the k-th caption in it."""

_COLUMNS = {
    "image": IMAGE,
    **{f"captions_{language}": pa.list_(pa.string()) for language in LANGUAGES},
    "image_hash": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "pairs": pa.list_(pa.struct(list(PAIR_FIELDS.items()))),
}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"_type": "Value", "dtype": "float32" if kind == pa.float32() else str(kind)}


FEATURES = {name: _feature(kind) for name, kind in _COLUMNS.items()}
"""As `datasets.Features.to_dict` writes them."""
TAR_FEATURES = {
    "jpg": {"_type": "Image"},
    "json": {name: feature for name, feature in FEATURES.items() if name != "image"},
    "__key__": {"_type": "Value", "dtype": "string"},
    "__url__": {"_type": "Value", "dtype": "string"},
}
SHARD_SCHEMA = pa.schema(list(_COLUMNS.items()), metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})})
_ROWS_PER_GROUP = 256
OVERHEAD = {"parquet": 0, "tar": 3072}
"""Bytes per image that the format itself takes at most: two headers, and data padded to 512 bytes."""


class ShardWriter:
    """Writes one shard in one format; the file is there, whole, only after a `with` without an error.

    Equal rows in equal order give equal bytes. After the `with`, `facts` is its entry in the index.
    """

    def __init__(self, path: Path):
        self.path, self.facts = path, {}
        self._rows, self._pairs = 0, dict.fromkeys(LANGUAGES, 0)
        self._beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._out: _ParquetRows | _TarRows = {".parquet": _ParquetRows, ".tar": _TarRows}[path.suffix](self._beside)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one image: the columns of `SHARD_SCHEMA`, `image` as bytes."""
        self._out.write(row)
        self._rows += 1
        for language in LANGUAGES:
            self._pairs[language] += len(row[f"captions_{language}"])

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            self._out.close()
            if failure is None:
                self.facts = {
                    "file": self.path.name,
                    "split": self.path.name.partition("-")[0],
                    "rows": self._rows,
                    "pairs": self._pairs,
                    "bytes": self._beside.stat().st_size,
                    "sha256": sha256_of(self._beside),
                }
                os.replace(self._beside, self.path)
        finally:
            self._beside.unlink(missing_ok=True)


class _ParquetRows:
    def __init__(self, path: Path):
        self._file = pq.ParquetWriter(path, SHARD_SCHEMA, compression="zstd")
        self._waiting: list[dict[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self._waiting.append({**row, "image": {"bytes": row["image"], "path": None}})
        if len(self._waiting) == _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(pa.Table.from_pylist(self._waiting, schema=SHARD_SCHEMA))
        self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._file.close()


class _TarRows:
    """WebDataset: two members per image, named after its hash.

    The image's extension is always .jpg, also for a PNG: `datasets` takes no tar file whose samples differ in their
    extensions, and whoever decodes an image goes by its content.
    """

    def __init__(self, path: Path):
        self._file = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)

    def write(self, row: Mapping[str, Any]) -> None:
        fields = {name: value for name, value in row.items() if name != "image"}
        self._add(f"{row['image_hash']}.jpg", row["image"])
        self._add(f"{row['image_hash']}.json", json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace"))

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._file.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        self._file.close()
