"""The translation tables: tab-separated files with one header line; lines that start with # are comments."""

from __future__ import annotations

import csv
import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("tables")


def table_path(name: str) -> Path:
    return FOLDER / f"{name}.tsv"


@cache
def read_table(name: str) -> tuple[dict[str, str], ...]:
    """The rows of `tables/NAME.tsv` as {column: cell}; cells that a line leaves out are empty.

    Raises:
        ValueError: for a line with more cells than the header has columns.
    """
    path = table_path(name)
    with path.open(encoding="utf-8", newline="") as file:
        lines = (line for line in file if not line.startswith("#"))
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, restval=""))
    for row in rows:
        if None in row:
            raise ValueError(f"{path} has a line with too many cells: {row}.")
    return tuple(rows)


def table_sha256(name: str) -> str:
    return hashlib.sha256(table_path(name).read_bytes()).hexdigest()
