"""Reading the annotation files and images that others published; every fault is a ValueError that names the file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """A JSON file, or the one inside a .zip.

    Args:
        object_hook: as for `json.load`; turns each object into something smaller while a large file is read.

    Raises:
        ValueError: for a file that is missing or is no JSON.
    """
    require_file(path)
    try:
        return json.loads(_content(path), object_hook=object_hook)
    except (ValueError, zipfile.BadZipFile, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error


def read_json_lines(path: Path) -> list[Any]:
    """One JSON value per line; blank lines are passed over.

    Raises:
        ValueError: for a file that is missing, and for a line that is no JSON; the message gives its number.
    """
    require_file(path)
    values = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"Line {number} of {path} is not JSON: {error}") from error
    return values


def _content(path: Path) -> bytes:
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".json") and not name.startswith("__MACOSX")]
        if len(members) != 1:
            raise ValueError(f"the archive holds {len(members)} JSON files, one was expected")
        return archive.read(members[0])


def read_mat(path: Path, *names: str) -> dict[str, Any]:
    """The variables of a MATLAB file (version 5; scipy reads data only), with singleton dimensions dropped.

    Args:
        names: variables to read; those that the file lacks are left out.

    Raises:
        ValueError: for a file that is missing or is none that scipy reads.
    """
    from scipy.io import loadmat  # takes half a second; only four of the formats need it

    require_file(path)
    try:
        return loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=list(names))
    except Exception as error:  # for damaged files scipy raises nearly anything: MatReadError, TypeError, zlib.error
        raise ValueError(f"{path} is not a readable MATLAB file: {type(error).__name__}: {error}") from error


def numbers(where: str, values: Any) -> np.ndarray:
    """Numbers of a MATLAB file, at least one-dimensional, or a ValueError that says what is there instead."""
    array = np.atleast_1d(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where} must be numbers, not {str(values)[:80]!r}.")
    return array


def field(where: str, record: Any, name: str, kind: type | tuple[type, ...] = object) -> Any:
    """`record[name]`, which must be of that kind, or a ValueError that says what is there instead."""
    if not isinstance(record, Mapping) or name not in record:
        there = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"{where} has no {name!r}; it has: {there[:200] or 'nothing'}.")
    value = record[name]
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name!r} cannot be {type(value).__name__} {str(value)[:80]!r}.")
    return value


def require_file(path: Path) -> None:
    if not path.is_file():
        folder = path.parent
        there = ", ".join(sorted(item.name for item in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
        raise ValueError(f"No file at {path}; in {folder}: {there or 'nothing'}.")


def stable_hash(*parts: object) -> int:
    """A number that depends on `parts` only, unlike `hash`: for orders and choices that no run changes."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big")


def find_images(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Image files by name, in `folder` or one folder below it (val2014/, VG_100K_2/); every one is decoded once.

    Raises:
        ValueError: names the first files that are missing, there twice or damaged, and says how many there are.
    """
    if not folder.is_dir():
        raise ValueError(f"No image folder at {folder}.")
    below = sorted(item for item in folder.iterdir() if item.is_dir())
    found: dict[str, Path] = {}
    faults: list[str] = []
    for name in tqdm(names, desc="checking images", disable=None):  # silent where nobody watches
        # Names come from annotation files: they must not lead out of the folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"The annotations name an image outside of the image folder: {name!r}.")
        files = [file for file in [folder / name] if file.is_file()]
        files = files or [place / name for place in below if (place / name).is_file()]
        fault = _fault(files)
        if fault:
            faults.append(f"{name} {fault}")
        else:
            found[name] = files[0]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{len(faults)} images cannot be used from {folder}: {'; '.join(faults[:5])}{more}.")
    return found


def _fault(files: list[Path]) -> str | None:
    if len(files) != 1:
        return f"is in {len(files)} folders" if files else "is missing"
    try:
        with Image.open(files[0]) as image:
            image.load()
    # What PIL raises for missing, truncated, damaged and suspiciously large files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be decoded ({error})"
    return None
