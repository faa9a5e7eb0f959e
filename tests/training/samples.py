"""Images and image files of every kind, whole and broken, for the tests of the data path."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


def noise(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def row(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "image": {"bytes": encoded(noise(i)), "path": None},
        "captions_en": [f"a red star number {i}", f"the star {i}"],
        "captions_zh": [f"红色的星 {i}", f"星 {i}", f"第 {i} 颗星"],
        **changes,
    }


def tar_bytes(members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar archive, written by the standard library."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def members(i: int, **changes: Any) -> list[tuple[str, bytes]]:
    """The same sample as `row(i)`, in the layout of WebDataset."""
    values = row(i, **changes)
    image = values.pop("image")["bytes"]
    return [(f"{i:05}.png", image), (f"{i:05}.json", json.dumps(values, ensure_ascii=False).encode())]


def write_shards(folder: Path, kind: str, sizes: Iterable[int]) -> list[Path]:
    """Shards of `row(0)`, `row(1)`, ...; parquet in row groups of 3."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for number, size in enumerate(sizes):
        path = folder / f"shard-{number:03}.{kind}"
        if kind == "tar":
            path.write_bytes(tar_bytes(member for i in range(first, first + size) for member in members(i)))
        else:
            table = pa.Table.from_pylist([row(i) for i in range(first, first + size)] or [row(0)])
            pq.write_table(table.slice(0, size), path, row_group_size=3)
        paths.append(path)
        first += size
    return paths


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size; grey, 8 bits, no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT", b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def damaged_png() -> bytes:
    content = bytearray(encoded(noise(1, 64, 64)))
    content[60:90] = bytes(30)
    return bytes(content)


BROKEN = {
    "truncated": {"bytes": encoded(noise(0, 64, 64))[:4000], "path": None},
    "damaged": {"bytes": damaged_png(), "path": None},
    "garbage": {"bytes": b"not an image at all", "path": None},
    "empty": {"bytes": b"", "path": None},
    "missing": None,
    "lost_file": {"bytes": None, "path": "/nowhere/lost.png"},
    "bomb": {"bytes": png_header(30_000, 30_000), "path": None},  # PIL raises DecompressionBombError
    "warning": {"bytes": png_header(10_000, 10_000), "path": None},  # PIL would only warn
    "large": {"bytes": png_header(8_200, 8_200), "path": None},  # fine for PIL, over MAX_PIXELS
}


REASONS = {
    "truncated": "broken_image",
    "damaged": "broken_image",
    "garbage": "not_an_image",
    "empty": "no_image",
    "missing": "no_image",
    "lost_file": "no_image",
    "bomb": "too_many_pixels",
    "warning": "too_many_pixels",
    "large": "too_many_pixels",
}
