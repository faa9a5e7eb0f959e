"""One entry of `sources.list`: where its files are, and their records as rows of `training/corpus/rows.py`."""

from __future__ import annotations

import glob
import hashlib
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapters import DOWNLOADED, PUBLISHED, Adapter, Published
from .reading import ARCHIVES, LISTS, TABLES, Lost, Record, Slice, check_columns, is_kind, read, slices
from .rows import Row

REASONS = (
    "no_text",  # null, or no text in a list
    "invalid_utf8",
    "wrong_type",  # a text that is no text, a line that is no record
    "no_image",  # null or no bytes: img2dataset writes one for an address that gave none
    "no_url",  # of a list of addresses: none that begins with http:// or https://
    "other_language",  # the column of languages says neither English nor Chinese
    "damaged_rows",  # of a row group or an archive that cannot be read; one for a file that is no parquet file at all
)
"""Why a row of a source does not become one of ours."""


_KINDS = (ARCHIVES, TABLES, LISTS)
_SUFFIXES = (*ARCHIVES, *TABLES, *LISTS)


@dataclass(frozen=True)
class SourceSettings:
    """One source. The names of columns are the adapter's (`adapters.PUBLISHED`) unless given here."""

    name: str
    """Begins the ids of its rows: "<name>/<file>/<row>", files and rows from 0, and "/<text>" where the text column
    holds lists (in a tar: where a record has several)."""
    adapter: Adapter
    files: tuple[str, ...]
    """Paths, globs or folders: parquet or tar; lists of addresses also .csv, .tsv and .jsonl, with or without .gz."""
    images: tuple[str, ...] = ()
    """Of a source of addresses: what img2dataset wrote, parquet or tar. Then `files` are not read any more."""
    priority: int = 0
    """Of two equal images in one language, that of the source with the higher number is kept."""
    image: str | None = None
    text: str | None = None
    url: str | None = None
    image_id: str | None = None
    """The column that names the image; by default each row of the source is another image."""
    language: str | None = None
    """"en" or "zh": of all its rows; needed unless the adapter knows it or `language_column` is given."""
    language_column: str | None = None
    licence: str | None = None
    licence_column: str | None = None

    def __post_init__(self) -> None:
        if not self.name or any(sign in self.name for sign in "/#\\\0") or self.name.startswith("."):
            raise ValueError(f"a source cannot be named {self.name!r}: without / \\ # and not beginning with a point.")
        if self.language not in (None, "en", "zh"):
            raise ValueError(f"the language of source {self.name} is {self.language!r}; expected en or zh.")
        if (self.published.language or self.published.language_column) is None:
            raise ValueError(f"source {self.name} has neither `language` nor `language_column`.")

    @property
    def published(self) -> Published:
        """Columns and constants: the adapter's, with what the entry says otherwise."""
        known = PUBLISHED[self.adapter].changed_by(self)
        return DOWNLOADED.changed_by(_Constants(known.language, known.licence)) if self.images else known

    @property
    def is_addresses(self) -> bool:
        """Whether there are no images to read yet."""
        return self.published.image is None

    def paths(self) -> list[Path]:
        """The files to read, in the given order (globs and folders: sorted).

        Raises:
            ValueError: for a name that stands for no file, or for files of another kind.
        """
        return [path for pattern in self.images or self.files for path in self._matches(pattern)]

    def _matches(self, pattern: str) -> list[Path]:
        path = Path(pattern)
        if path.is_dir():
            # Of one kind: img2dataset writes beside each tar a parquet file with all but the images.
            inside = sorted(file for file in path.iterdir() if file.is_file())
            found = next(filter(None, ([file for file in inside if is_kind(file, kind)] for kind in _KINDS)), [])
        else:
            found = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not found:
            home = PUBLISHED[self.adapter].home
            where = f" It is published as {home}." if home and not self.images else ""
            raise ValueError(f"Source {self.name}: no file matches {pattern!r} (seen from {Path.cwd()}).{where}")
        for file in found:
            if not is_kind(file, _SUFFIXES):
                raise ValueError(f"Source {self.name}: {file} is none of {', '.join(_SUFFIXES)}.")
        return found

    def slices(self, rows: int) -> list[Slice]:
        """What is to be read, in slices of about `rows` rows, one task each.

        Raises:
            ValueError: for files that are missing or lack a column.
        """
        columns = self.published.columns()
        # Lists that img2dataset was given by others lack what ours have beside.
        needed = {name: columns[name] for name in ("image", "text")} if self.images else columns
        found = []
        for number, path in enumerate(self.paths()):
            check_columns(path, needed, self.name)
            found += slices(path, number, rows)
        return found

    def fingerprint(self) -> str:
        """Of the names and sizes of the files: what a folder of rows was made of."""
        seen = [(path.name, path.stat().st_size) for path in self.paths()]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Constants:
    """What stays true of a source of addresses when img2dataset's columns take the place of its own."""

    language: str | None
    licence: str | None


def rows_of(source: SourceSettings, part: Slice) -> Iterator[tuple[Row, str | None]]:
    """The rows of a slice, each with None or the reason why it is none."""
    published = source.published
    is_there = _has_image if published.image is not None else _has_url
    for record in read(part, published.columns()):
        id = f"{source.name}/{part.file}/{record.row}"
        base: Row = {"id": id, "source": source.name, "language": published.language or "other"}
        if isinstance(record, Lost):
            yield base, record.reason
            continue
        base |= _facts(record, published, f"{part.file}/{record.row}")
        missing = is_there(record.values, base)
        wrong = "other_language" if base["language"] == "other" else None
        texts = record.values["text"] if record.listed else [record.values["text"]]
        for place, text in enumerate(texts or [None]):
            row = {**base, "id": f"{id}/{place}"} if record.listed else base
            text, reason = as_text(text)
            yield {**row, "text": text}, missing or reason or wrong


def _facts(record: Record, published: Published, place: str) -> Row:
    def text(name: str) -> str | None:
        value = record.values.get(name)
        return as_text(str(value) if isinstance(value, (int, float)) else value)[0] or None

    licence, said = text("licence"), text("language")
    return {
        "image_id": text("image_id") or place,
        "url": text("url"),
        "language": (known_language(said) if said else published.language) or "other",
        "licence": licence if licence not in (None, "?") else published.licence,  # LAION's "?": not known
        "origin": "raw",
    }


_BLANKS = string.whitespace + "\ufeff\u00a0\u2028\u2029\u3000"  # with the mark that some editors begin files with
_LANGUAGES = {"en": ("en", "eng", "english"), "zh": ("zh", "zho", "chi", "cmn", "chinese")}


def known_language(name: str | None) -> str | None:
    """ "en" or "zh" for their names and codes ("EN", "zh-CN", "eng_Latn", "Chinese"), otherwise None."""
    first = re.split(r"[-_ ]", (name or "").lower())[0]
    return next((language for language, names in _LANGUAGES.items() if first in names), None)


def _has_image(values: Any, row: Row) -> str | None:
    image = values["image"]
    if not image:
        return "no_image"
    if not isinstance(image, bytes):
        return "wrong_type"
    row["image"] = {"bytes": image, "path": None}
    row["image_hash"] = hashlib.sha256(image).hexdigest()
    return None


def _has_url(values: Any, row: Row) -> str | None:
    # img2dataset opens what it is given, file:///etc/passwd too.
    return None if row["url"] and re.match("https?://", row["url"], re.IGNORECASE) else "no_url"


def as_text(value: Any) -> tuple[str | None, str | None]:
    """A text of a source without blanks at its ends, or None with the reason why it is none."""
    if value is None:
        return None, "no_text"
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8").strip(_BLANKS), None
        if isinstance(value, str):
            value.encode("utf-8")  # a lone surrogate stands for a byte that is no UTF-8
            return value.strip(_BLANKS), None
    except UnicodeError:
        return None, "invalid_utf8"
    return None, "wrong_type"
