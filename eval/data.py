"""Rows of a benchmark: columns by name, images that say where they came from, captions in either form.

    table = open_table(["photos-*.parquet"])
    tables = open_data(task.data, task.columns, "downloads/flickr30k")  # without a source: from the Hub

Everything is loaded through `datasets`: parquet, WebDataset tars, and JSON lines that name image files. No data set's
own code is ever run (`datasets` 5 refuses loading scripts).
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from PIL import Image, UnidentifiedImageError

from .tasks import Columns, Data

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar", "jsonl": ".jsonl", "built": ".parquet", "scenes": ".parquet"}
BUILDERS = {"parquet": "parquet", "webdataset": "webdataset", "jsonl": "json", "built": "parquet", "scenes": "parquet"}


Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Table:
    """Rows of one or more files with one schema, memory-mapped, in the order of the files."""

    files: tuple[str, ...]
    rows: datasets.Dataset
    picked: tuple[int, ...] | None = None
    """Which rows of the files these are, if not all."""
    revision: str | None = None
    """The commit of the data set, where it is known."""

    def limited(self, limit: int | None) -> Table:
        """At most `limit` rows, evenly spaced, since files are often sorted by class; all of them without a limit.

        Raises:
            ValueError: for a limit below 1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}.")
        if limit is None or limit >= len(self):
            return self
        return self.select([i * len(self) // limit for i in range(limit)])

    def select(self, rows: Sequence[int]) -> Table:
        """These rows, in this order."""
        picked = tuple(rows if self.picked is None else (self.picked[row] for row in rows))
        return replace(self, rows=self.rows.select(rows), picked=picked)

    def of_split(self, split: str, column: str) -> Table:
        """The rows whose `column` says `split`.

        Raises:
            ValueError: where there is no such column, or no such row; the message lists the splits that there are.
        """
        splits = self.column(column)
        rows = [row for row, value in enumerate(splits) if value == split]
        if not rows:
            seen = ", ".join(f"{name} ({count} rows)" for name, count in Counter(map(str, splits)).items())
            raise ValueError(f"No split {split!r} in column {column!r} of {_shown(self.files)}; it holds: {seen}.")
        return self if len(rows) == len(self) else self.select(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
            ValueError: where there is no such column; the message lists those that there are.
        """
        self.require(name)
        return self.rows[name][:]

    def captions(self, name: str, separator: str | None = None) -> list[list[str]]:
        """The captions of every row, see `caption_list`.

        Raises:
            ValueError: where there is no such column, or it holds something else.
        """
        found = []
        for row, cell in enumerate(self.column(name)):
            try:
                found.append(caption_list(cell, separator))
            except ValueError as error:
                raise ValueError(f"{self.locate(row)}, column {name!r}: {error}") from error
        return found

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
        except UnidentifiedImageError as error:
            what = "file is" if data is None else f"{len(data)} bytes are"
            raise ValueError(
                f"{self.locate(row)} holds an image that cannot be decoded: its {what} of no known format."
            ) from error
        # What PIL raises for missing, truncated, damaged and suspiciously large files.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.locate(row)} holds an image that cannot be decoded: {error}.") from error
        return image

    def locate(self, row: int) -> str:
        """Where a row stands on disk, for messages: "row 3 of a/b.parquet", counted from 0 within its file."""
        if "__key__" in self.rows.column_names and "__url__" in self.rows.column_names:
            sample = self.rows.select_columns(["__key__", "__url__"])[row]
            return f"sample {sample['__key__']} of {sample['__url__']}"
        row = row if self.picked is None else self.picked[row]
        if len(self.files) == 1:
            return f"row {row} of {self.files[0]}"
        if not all(file.endswith(".parquet") and Path(file).is_file() for file in self.files):
            return f"row {row} of {_shown(self.files)}"
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
    return _load_parquet([file for source in sources for file in _expand(str(source))])


def open_data(data: Data, columns: Columns, source: Source | None = None) -> dict[str, Table]:
    """The rows of a benchmark, of its split: one table for all languages under "", or one per language.

    Args:
        source: a file, glob pattern or folder, or several files and patterns; the folder's files are those that match
            `data.files`. Without one the data set is loaded from the Hub, at its pinned revision or at the newest.

    Raises:
        ValueError: for data that cannot be found, downloaded or read, or a split that they lack.
    """
    patterns = data.files if isinstance(data.files, dict) else {"": data.files}
    if source is None and data.id is None:
        raise ValueError(f"These data are not on the Hub. To get them: {data.obtain or 'see the task file'}.")
    revision = hub_revision(data) if source is None else None
    tables = {}
    for language, pattern in patterns.items():
        if source is not None:
            table = _open_local(data, columns, source, pattern)
        else:
            table = _load(data.format, [f"hf://datasets/{data.id}@{revision}/{pattern}"], revision=revision)
        tables[language] = table if columns.split is None else table.of_split(data.split, columns.split)
    return tables


def hub_revision(data: Data) -> str:
    """The commit that is loaded from the Hub: the pinned one, or else the newest at this moment.

    Raises:
        ValueError: where the Hub does not answer or does not know the data set.
    """
    if data.revision is not None:
        return data.revision
    try:
        return HfApi().dataset_info(str(data.id)).sha
    except Exception as error:  # httpx, the Hub's own, offline mode: all of them end this task and no other
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(
            f"The Hub says nothing of the data set {data.id} ({said}). Offline, name a folder with --data."
        ) from error


def local_revision(files: Sequence[str]) -> str | None:
    """The commit that local files were downloaded at, as the Hub's own tools note it: in the name of the cache's
    snapshot folder, or in the metadata that `hf download --local-dir` leaves. None where neither is there; several
    commits are joined by a plus sign."""
    found = set()
    for file in files:
        snapshot = re.search(r"/snapshots/([0-9a-f]{40})/", str(Path(file).absolute()))
        if snapshot:
            found.add(snapshot[1])
            continue
        path = Path(file).absolute()
        for folder in path.parents:
            notes = folder / ".cache" / "huggingface" / "download" / f"{path.relative_to(folder)}.metadata"
            if notes.is_file():
                found.add(notes.read_text(encoding="utf-8").partition("\n")[0].strip())
                break
    return "+".join(sorted(found)) or None


def caption_list(value: str | Sequence[str | None] | None, separator: str | None = None) -> list[str]:
    """The captions of one cell, which holds one string, a list of strings, or nothing; blank ones are left out.

    Args:
        separator: what parts several captions in one string.

    Raises:
        ValueError: for a cell that holds anything else, such as a number.
    """
    captions = [value] if isinstance(value, str) or value is None else value
    if not isinstance(captions, Sequence) or not all(isinstance(one, str | None) for one in captions):
        raise ValueError(f"A caption cell must hold a string or a list of strings, not {str(value)[:80]!r}.")
    if separator is not None:
        captions = [part for caption in captions if caption for part in caption.split(separator)]
    return [caption for caption in captions if caption and caption.strip()]


def _open_local(data: Data, columns: Columns, source: Source, pattern: str) -> Table:
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_dir():
        # Downloaded by hand, the files may lie in the folder itself.
        found = sorted(glob.glob(str(path / pattern))) or sorted(glob.glob(str(path / Path(pattern).name)))
        suffix = SUFFIXES[data.format]
        files = [file for file in found if file.endswith(suffix)]
        if not files:
            there = sorted(f"{item.name}/" if item.is_dir() else item.name for item in path.iterdir())[:20]
            raise ValueError(
                f"No {suffix} file matches {pattern} in {path} (split {data.split!r}); there is: "
                f"{', '.join(there) or 'nothing'}."
            )
    else:
        files = [file for one in ([source] if path is not None else source) for file in _expand(str(one))]
        path = Path(files[0]).parent
    revision = local_revision(files)
    if BUILDERS[data.format] == "parquet":
        return replace(_load_parquet(files), revision=revision)
    table = replace(_load(data.format, [glob.escape(file) for file in files], tuple(files)), revision=revision)
    if data.format == "jsonl":
        return replace(table, rows=_image_files(table, columns.image, path))
    return table


def _image_files(table: Table, column: str, root: Path) -> datasets.Dataset:
    """Rows that name image files, with the image column as `datasets` writes it. A data set from elsewhere must not
    make us open files outside its folder."""
    cells = []
    for row, name in enumerate(table.column(column)):
        if not isinstance(name, str) or not (root / name).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{table.locate(row)} must name an image file below {root}, not {name!r}.")
        cells.append({"bytes": None, "path": str(root / name)})
    feature = datasets.Image(decode=False)
    return table.rows.remove_columns(column).add_column(column, cells, feature=feature)


def _load(kind: str, patterns: list[str], files: tuple[str, ...] = (), revision: str | None = None) -> Table:
    """Any format through `datasets`, images left encoded."""
    try:
        # "train" is what `datasets` calls the rows of plain files, whatever they are for.
        rows = datasets.load_dataset(BUILDERS[kind], data_files=patterns, split="train")
    # A damaged archive, a line that is no JSON, no network, a file that is not there: each library has its own.
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{_shown(files or patterns)} cannot be read as {kind}: {type(cause).__name__}: {str(cause)[:300]}"
        ) from error
    if not len(rows):
        raise ValueError(f"{_shown(files or patterns)} holds no rows.")
    return Table(files or tuple(patterns), _encoded(rows), revision=revision)


def _load_parquet(files: list[str]) -> Table:
    columns = {file: _column_names(file) for file in files}
    for file in files:
        if columns[file] != columns[files[0]]:
            raise ValueError(
                f"{file} has the columns {', '.join(columns[file])}, but {files[0]} has "
                f"{', '.join(columns[files[0]])}: evaluate them separately."
            )
    if not sum(pq.read_metadata(file).num_rows for file in files):
        raise ValueError(f"{_shown(files)} holds no rows.")
    return _load("parquet", [glob.escape(file) for file in files], files=tuple(files))


def _encoded(rows: datasets.Dataset) -> datasets.Dataset:
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _expand(source: str) -> list[str]:
    path = Path(source)
    if path.is_file():  # also a name that holds [ or *
        return [source]
    files = sorted(glob.glob(str(path / "*.parquet") if path.is_dir() else source))
    if not files:
        folder = path if path.is_dir() else path.parent
        there = sorted(item.name for item in folder.iterdir())[:20] if folder.is_dir() else None
        seen = f"no folder {folder}" if there is None else f"in {folder} there is: {', '.join(there) or 'nothing'}"
        raise ValueError(f"No {'parquet ' if path.is_dir() else ''}file at {source}; {seen}.")
    return files


def _column_names(file: str) -> list[str]:
    try:
        return pq.read_schema(file).names
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error


def _shown(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
