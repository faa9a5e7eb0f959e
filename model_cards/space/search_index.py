"""Sets of images, and an index of their embeddings that is kept on disk.

Shapes: N images that can be read, E embedding.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
BATCH = 64


class ImageSet(Protocol):
    """Images by number; none is in memory until it is asked for."""

    name: str
    fingerprint: str
    """Differs when the images differ."""

    def __len__(self) -> int: ...

    def source(self, number: int) -> str | Path | bytes:
        """The file of an image, or its bytes."""

    def label(self, number: int) -> str:
        """What a person would call it: a file's name, a row's number."""


class FolderImages:
    """The image files in a folder and the folders in it, in the order of their names."""

    def __init__(self, folder: str | Path):
        self.name = str(folder)
        self.folder = Path(folder)
        files = (path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        self.files = sorted(path.relative_to(self.folder).as_posix() for path in files)
        if not self.files:
            parquet = f"; its parquet files are {folder}/*.parquet" if any(self.folder.glob("*.parquet")) else ""
            raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}){parquet}.")
        seen = [(file, *self._state(file)) for file in self.files]
        self.fingerprint = _digest(seen)

    def _state(self, file: str) -> tuple[int, int]:
        state = (self.folder / file).stat()
        return state.st_size, state.st_mtime_ns

    def __len__(self) -> int:
        return len(self.files)

    def source(self, number: int) -> Path:
        return self.folder / self.files[number]

    def label(self, number: int) -> str:
        return self.files[number]


class DatasetImages:
    """The images of a `datasets.Dataset`: its first column of images."""

    def __init__(self, name: str, rows: datasets.Dataset):
        columns = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise ValueError(f"{name} has no column of images, only {', '.join(rows.column_names)}.")
        self.name = name
        # Decoded here, where a damaged image is named and passed over.
        self.rows = rows.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))
        self.column = columns[0]
        self.fingerprint = _digest([rows._fingerprint, len(rows), self.column])

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, number: int) -> str | bytes:
        image = self.rows[number][self.column] or {}
        if image.get("bytes") or not image.get("path"):
            return image.get("bytes") or b""
        # Files that came with the set, and no others: a set from elsewhere must not choose what is opened here.
        file = Path(image["path"]).resolve()
        if not any(file.is_relative_to(Path(cache).resolve()) for cache in (HF_HUB_CACHE, HF_DATASETS_CACHE)):
            raise ValueError("it names a file outside of the data set")
        return str(file)

    def label(self, number: int) -> str:
        return f"row {number}"


def open_images(data: str) -> ImageSet:
    """A folder of images; parquet files by a pattern; a data set on the Hub.

    Args:
        data: "photos", "scenes/test-*.parquet", "owner/name:train". What follows a Hub name's colon is the split, as in
            `datasets.load_dataset`; it may be missing where there is only one.

    Raises:
        ValueError: when there are no such images; the message says what there is.
    """
    if data.endswith(".parquet"):
        # By their files: `datasets` takes two folders of the same name for one set, whatever is in them.
        files = [glob.escape(file) for file in sorted(glob.glob(data))]
        if not files:
            raise ValueError(f"No file matches {data}.")
        return DatasetImages(data, datasets.load_dataset("parquet", data_files=files, split="train"))
    if Path(data).is_dir():
        return FolderImages(data)
    on_the_hub = re.fullmatch(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>.+))?", data)
    if not on_the_hub:
        raise ValueError(
            f"{data} is neither a folder, nor parquet files, nor a data set on the Hub (owner/name:split)."
        )
    name, split = on_the_hub["name"], on_the_hub["split"]
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # no such set, no such split, no network
        raise ValueError(f"{data} is no folder here, and cannot be loaded from the Hub: {str(error)[:300]}") from error
    if isinstance(rows, datasets.DatasetDict):
        if len(rows) != 1:
            raise ValueError(f"{name} has the splits {', '.join(rows)}: choose one, as in {name}:{next(iter(rows))}.")
        rows = next(iter(rows.values()))
    return DatasetImages(data, rows)


class Found(NamedTuple):
    number: int
    """Of the image in its set."""
    cosine: float


class SearchIndex:
    """Embeddings of a set of images; `load_or_build` makes one."""

    def __init__(self, images: ImageSet, embeddings: np.ndarray, numbers: np.ndarray, bad: dict[str, str]):
        self.images = images
        self.embeddings = embeddings
        """[N, E] float32, of length 1."""
        self.numbers = numbers
        """[N]: which image of the set each row is."""
        self.bad = bad
        """Images that cannot be read, by their label, and why."""

    def search(self, query: np.ndarray, top: int) -> list[Found]:
        """The `top` images nearest to a query [E] of length 1, exactly, best first; equals in the order of the set."""
        cosines = self.embeddings @ query
        best = np.argsort(-cosines, kind="stable")[:top]
        return [Found(int(self.numbers[row]), float(cosines[row])) for row in best]


def load_or_build(
    encoder: Any,
    images: ImageSet,
    folder: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> SearchIndex:
    """The index of `images` by `encoder`: from `folder` if it was built there before, and otherwise built and kept.

    An index belongs to one state of the model and one state of the images (their fingerprints); when either changes it
    is built again, and the older one is removed.

    Args:
        encoder: has `name`, `fingerprint`, `pixels(file or its bytes)`, which raises ValueError to say why an image is
            passed over, and `images(pixels of N images) -> [N, E]`.
        progress: called with (images done, images) after each batch.

    Raises:
        ValueError: when not one of the images can be read.
    """
    place = _digest([encoder.name, images.name])
    file = Path(folder) / f"{place}-{_digest([encoder.fingerprint, images.fingerprint])}.safetensors"
    index = _load(file, images)
    if index is None:
        index = _build(encoder, images, progress)
        _save(index, file)
        for older in file.parent.glob(f"{place}-*.safetensors"):
            if older != file:
                older.unlink(missing_ok=True)
    return index


def _build(encoder: Any, images: ImageSet, progress: Callable[[int, int], None] | None) -> SearchIndex:
    parts, numbers, bad = [], [], {}
    for start in range(0, len(images), BATCH):
        pixels = []
        for number in range(start, min(start + BATCH, len(images))):
            try:
                pixels.append(encoder.pixels(images.source(number)))
                numbers.append(number)
            except ValueError as error:
                bad[images.label(number)] = str(error)
        if pixels:
            parts.append(encoder.images(pixels))
        if progress:
            progress(min(start + BATCH, len(images)), len(images))
    if not parts:
        named = ", ".join(f"{label}: {why}" for label, why in list(bad.items())[:5])
        raise ValueError(f"None of the {len(images)} images of {images.name} can be read ({named}).")
    return SearchIndex(images, np.concatenate(parts).astype(np.float32), np.array(numbers, np.int64), bad)


def _save(index: SearchIndex, file: Path) -> None:
    """Written beside and then renamed, so that nobody finds half an index."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        arrays = {"embeddings": index.embeddings, "numbers": index.numbers}
        save_file(arrays, beside, metadata={"bad": json.dumps(index.bad, ensure_ascii=False)})
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _load(file: Path, images: ImageSet) -> SearchIndex | None:
    """None where there is none, or a damaged one."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "numpy") as kept:
            embeddings, numbers = kept.get_tensor("embeddings"), kept.get_tensor("numbers")
            return SearchIndex(images, embeddings, numbers, json.loads(kept.metadata()["bad"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        print(f"The index {file} is damaged and is built again: {error}")
        return None


def _digest(seen: Sequence[Any]) -> str:
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
