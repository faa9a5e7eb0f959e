"""The stage "sources": every source's rows in the one schema of `training/corpus/rows.py`."""

from __future__ import annotations

from dataclasses import dataclass

from .adapters import Adapter

REASONS = (
    "no_text",  # null, or no list of texts
    "invalid_utf8",
    "wrong_type",  # a text that is no text, an image that is no bytes
    "no_image",  # null or no bytes: img2dataset writes one for an address that gave none
    "damaged_rows",  # of a row group that cannot be read, or of a damaged archive
)
"""Why a row of a source does not become one of ours."""
TO_DOWNLOAD = "to_download"
"""The outcome of a row that has an address and no image yet."""


@dataclass(frozen=True)
class SourceSettings:
    """One source. The names of columns are the adapter's (`adapters.PUBLISHED`) unless given here."""

    name: str
    """Part of the ids of its rows: "<name>/<file>/<row>", files and rows from 0, and "/<caption>" where the text column
    holds lists."""
    adapter: Adapter
    files: tuple[str, ...]
    """Paths, globs or folders: parquet, tar, or for `urls` also .csv, .tsv and .jsonl (each also with .gz)."""
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


@dataclass(frozen=True)
class SourcesSettings:
    """The section `sources`."""

    list: tuple[SourceSettings, ...]
    rows_per_part: int = 10_000
    """Bounds the parts, which are the tasks of the next stages."""
