"""Local parquet files of images and captions as one indexable data set. Tested by `tests/training/test_data.py`."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from eval.data import caption_list


def resolve_files(files: Iterable[str | Path]) -> list[Path]:
    """The parquet files that paths, globs and folders stand for, each once, in the given order (globs: sorted).

    A folder stands for its `train-*.parquet` if it has any, so that a data set's folder never trains on its own test
    split; otherwise for all its `*.parquet`. Sub-folders are not searched.

    Raises:
        ValueError: for a pattern that matches nothing, or for none at all.
    """
    found: dict[Path, None] = {}
    for pattern in files:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(path.glob("train-*.parquet")) or sorted(path.glob("*.parquet"))
        else:
            matches = [path] if path.is_file() else sorted(map(Path, glob.glob(str(pattern), recursive=True)))
        if not matches:
            raise ValueError(f"No parquet file matches {str(pattern)!r} (seen from {Path.cwd()}).")
        found.update(dict.fromkeys(matches))
    if not found:
        raise ValueError("No data: give at least one parquet file, glob or folder.")
    return list(found)


def read_captions(files: Iterable[str | Path], columns: Iterable[str]) -> Iterator[str]:
    """Every caption of the columns (strings or lists of strings), file by file; blank ones are left out.

    Raises:
        ValueError: at once, for missing files or columns.
    """
    paths, columns = resolve_files(files), list(columns)
    check_columns(paths, columns, image_column=None)

    def captions() -> Iterator[str]:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=4096, columns=columns):
                for row in batch.to_pylist():
                    for column in columns:
                        yield from caption_list(row[column])

    return captions()


def check_columns(paths: Sequence[Path], caption_columns: Sequence[str], image_column: str | None) -> None:
    """Every file has the columns, of a type that can be read, and the same type as in the first file."""
    if not caption_columns:
        raise ValueError("No caption column was named.")
    first: dict[str, pa.DataType] = {}
    for path in paths:
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {error}") from error
        for column in (*caption_columns, *([image_column] if image_column is not None else [])):
            if column not in schema.names:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}.")
            kind = schema.field(column).type
            if not (is_image(kind) if column == image_column else is_text(kind)):
                wanted = (
                    "image bytes (or a struct with them)" if column == image_column else "a string or list of strings"
                )
                raise ValueError(f"Column {column!r} of {path} should be {wanted}, but is {kind}.")
            if _is_list(first.setdefault(column, kind)) != _is_list(kind):
                raise ValueError(f"Column {column!r} is {kind} in {path}, but {first[column]} in {paths[0]}.")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_list(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return False
        kind = kind.field("bytes").type
        if pa.types.is_null(kind):  # every image is a path
            return True
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@dataclass(frozen=True)
class Row:
    """One undecoded sample: image bytes (or a path, or None), and the captions of each language."""

    image: bytes | str | None
    captions: dict[str, list[str]]


class CaptionDataset:
    """Rows of parquet files, memory-mapped as Arrow in the `datasets` cache: nothing is held in memory.

    Args:
        files: paths, globs or folders, see `resolve_files`.
        image_column: encoded images, as bytes or as the `Image` feature of `datasets` (bytes, or a path to a file).
        captions: language -> column with one caption or a list of captions.
        cache_dir: where the Arrow copy goes; by default the cache of `datasets`.

    Raises:
        ValueError: for missing files or columns (with the columns there are), wrong column types, or no row.
    """

    def __init__(
        self,
        files: Iterable[str | Path],
        image_column: str = "image",
        captions: Mapping[str, str] | None = None,
        cache_dir: str | Path | None = None,
    ):
        self.files = resolve_files(files)
        self.image_column = image_column
        self.columns = dict(captions if captions is not None else {"en": "captions_en", "zh": "captions_zh"})
        check_columns(self.files, list(self.columns.values()), image_column)
        filled = [path for path in self.files if pq.read_metadata(path).num_rows]  # datasets stumbles over empty ones
        if not filled:
            raise ValueError(f"No row in {', '.join(map(str, self.files))}.")
        with _quiet():
            # Not load_dataset: that counts the use of its "parquet" loader on the network.
            table = datasets.Dataset.from_parquet(
                [glob.escape(str(path)) for path in filled],
                cache_dir=str(cache_dir) if cache_dir is not None else None,
                columns=list(dict.fromkeys([image_column, *self.columns.values()])),
            )
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    @property
    def fingerprint(self) -> str:
        """Changes with the files' names, their order, the number of rows and the columns; not with their folder."""
        names = [path.name for path in self.files]
        return hashlib.sha256(repr((names, len(self), self.image_column, self.columns)).encode()).hexdigest()[:16]

    @property
    def languages(self) -> list[str]:
        """The languages that rows have captions in."""
        return list(self.columns)

    def captions(self) -> Iterator[str]:
        """Every caption in every language that is not blank, for training a tokenizer."""
        return read_captions(self.files, self.columns.values())

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows at these places, undecoded."""
        return [self._row(values) for values in self._table[list(indices)].to_pylist()]

    def _row(self, values: dict[str, Any]) -> Row:
        image = values[self.image_column]
        if isinstance(image, dict):
            image = image["bytes"] if image["bytes"] is not None else image.get("path")
        return Row(image, {language: caption_list(values[column]) for language, column in self.columns.items()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, which would appear once per process."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
