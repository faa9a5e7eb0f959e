"""Rows of local parquet files: columns by name, images that say where they came from, captions in either form."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class Table:
    """Rows of one or more parquet files with one schema, memory-mapped, in the order of the files."""

    files: tuple[str, ...]
    rows: datasets.Dataset
    picked: tuple[int, ...] | None = None
    """Which rows of the files these are, if not all."""

    def limited(self, limit: int | None) -> Table:
        """At most `limit` rows, evenly spaced, since files are often sorted by class; all of them without a limit.

        Raises:
            ValueError: for a limit below 1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}.")
        if limit is None or limit >= len(self):
            return self
        picked = tuple(i * len(self) // limit for i in range(limit))
        return replace(self, rows=self.rows.select(picked), picked=picked)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
            ValueError: where there is no such column; the message lists those that there are.
        """
        self.require(name)
        return self.rows[name][:]

    def require(self, *names: str) -> None:
        """Raises ValueError for a column that the files do not have."""
        missing = [name for name in names if name not in self.rows.column_names]
        if missing:
            have = ", ".join(self.rows.column_names)
            raise ValueError(
                f"No column {', '.join(map(repr, missing))} in {_shown(self.files)}; its columns are: {have}."
            )

    def images(self, rows: Sequence[int], column: str = "image") -> list[Image.Image]:
        """The decoded images of some rows: a struct of `bytes` and `path` as `datasets` writes it, or plain bytes.

        Raises:
            ValueError: for an image that cannot be decoded; the message names its row and file.
        """
        self.require(column)
        return [self._decode(row, value) for row, value in zip(rows, self.rows[list(rows)][column], strict=True)]

    def _decode(self, row: int, value: Any) -> Image.Image:
        # `datasets` would decode too, but its errors do not say which row of which file is bad.
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not isinstance(data, bytes) and not path:
            raise ValueError(f"{self.locate(row)} holds no image but {type(value).__name__} {str(value)[:80]!r}.")
        try:
            image = Image.open(BytesIO(data) if data is not None else path)
            image.load()
        # What PIL raises for missing, truncated, damaged and suspiciously large files.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.locate(row)} holds an image that cannot be decoded: {error}.") from error
        return image

    def locate(self, row: int) -> str:
        """Where a row stands on disk, for messages: "row 3 of a/b.parquet", counted from 0 within its file."""
        row = row if self.picked is None else self.picked[row]
        for file in self.files:
            length = pq.read_metadata(file).num_rows
            if row < length:
                return f"row {row} of {file}"
            row -= length
        raise IndexError(f"The files end {row + 1} rows earlier.")


def open_table(sources: Sequence[str | Path]) -> Table:
    """Open parquet files, glob patterns, or folders (all their *.parquet files) as one table.

    Raises:
        ValueError: for a source that matches no file (the message lists what is there), and files that cannot be read,
            do not share their columns, or hold no rows.
    """
    if not sources:
        raise ValueError("No parquet files were given.")
    files = [file for source in sources for file in _expand(str(source))]
    columns = {file: _column_names(file) for file in files}
    for file in files:
        if columns[file] != columns[files[0]]:
            raise ValueError(
                f"{file} has the columns {', '.join(columns[file])}, but {files[0]} has "
                f"{', '.join(columns[files[0]])}: evaluate them separately."
            )
    # "train" is what `datasets` calls the rows of plain files, whatever they are for.
    if not sum(pq.read_metadata(file).num_rows for file in files):
        raise ValueError(f"{_shown(files)} holds no rows.")
    patterns = [glob.escape(file) for file in files]
    rows = datasets.load_dataset("parquet", data_files=patterns, split="train")
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return Table(tuple(files), rows)


def caption_list(value: str | Sequence[str | None] | None) -> list[str]:
    """The captions of one cell, which holds one string, a list of strings, or nothing; blank ones are left out."""
    captions = [value] if isinstance(value, str) else list(value or ())
    return [caption for caption in captions if caption and caption.strip()]


def _expand(source: str) -> list[str]:
    path = Path(source)
    if path.is_file():  # also a name that holds [ or *
        return [source]
    files = sorted(glob.glob(str(path / "*.parquet") if path.is_dir() else source))
    if not files:
        folder = path if path.is_dir() else path.parent
        there = sorted(item.name for item in folder.iterdir())[:20] if folder.is_dir() else None
        seen = f"no folder {folder}" if there is None else f"in {folder} there is: {', '.join(there) or 'nothing'}"
        raise ValueError(f"No parquet file at {source}; {seen}.")
    return files


def _column_names(file: str) -> list[str]:
    try:
        return pq.read_schema(file).names
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error


def _shown(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
