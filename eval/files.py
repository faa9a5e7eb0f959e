"""Writing results so that a reader never sees half a file.

`modeling_m2encoder.hub_folder.complete_or_absent` does this for folders; importing it takes transformers with it, and a
run whose work is all done should not wait for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes that name when the block ends, and vanishes when the block fails.

    Raises:
        ValueError: for a place that cannot be written.
    """
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}.") from error
    finally:
        try:
            beside.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself cannot be written, which was said above


def write_text(path: Path, text: str) -> None:
    """Raises ValueError for a place that cannot be written."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Raises ValueError for a place that cannot be written."""
    write_text(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Raises ValueError for a file that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}.") from error


def sha256_of(path: Path) -> str:
    """Of a file's bytes, hexadecimal; a megabyte in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def slug(name: str) -> str:
    """A model's name as a file name: "org/name" -> "org--name"."""
    return re.sub(r"[^\w.+-]+", "--", name).strip("-.") or "model"
