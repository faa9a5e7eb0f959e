"""The records of a source's files, each as the file has it; what cannot be read is counted, and never fatal.

Text is read as bytes: parquet files of web crawls hold strings that are no UTF-8, and pyarrow then refuses to give a
whole batch.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

TABLES = (".parquet",)
ARCHIVES = (".tar",)
LISTS = tuple(kind + packed for kind in (".csv", ".tsv", ".jsonl") for packed in ("", ".gz"))
_BATCH_ROWS = 64  # images of about 100 kB
_MAX_FIELD = 2**20  # characters of a CSV field
_MAX_LINES = 20  # of a record


@dataclass(frozen=True)
class Record:
    """One record: an image, or the address of one, with its texts."""

    row: int
    """Its number in the file, from 0."""
    values: Mapping[str, Any]
    """Our name -> what the file has: bytes or str, a number, a list of these, or None."""
    listed: bool = False
    """Whether its text is a list of texts."""


@dataclass(frozen=True)
class Lost:
    """A record that cannot be read."""

    row: int
    reason: str


@dataclass(frozen=True)
class Slice:
    """What one task reads: a file, or some row groups of one."""

    path: str
    file: int
    """Its number in the source."""
    groups: tuple[int, int] | None = None
    """First and last + 1; None: the whole file."""
    first: int = 0
    """The number of its first row in the file."""


def read(part: Slice, columns: Mapping[str, str]) -> Iterator[Record | Lost]:
    """The records of a slice, with the columns our name -> theirs."""
    if is_kind(part.path, TABLES):
        yield from _read_parquet(part, columns)
    elif is_kind(part.path, ARCHIVES):
        yield from _read_tar(part, columns)
    else:
        yield from _read_list(part, columns)


def is_kind(path: str | Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is of a kind, by its name."""
    return str(path).lower().endswith(suffixes)


# ---- Parquet


def slices(path: Path, file: int, rows: int) -> list[Slice]:
    """A file in slices of at least `rows` rows, or as few row groups as that takes; one for all but parquet."""
    whole = [Slice(str(path), file)]
    if not is_kind(path, TABLES):
        return whole
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return whole  # damaged: the task counts it
    found, start, first, end = [], 0, 0, 0
    for group in range(metadata.num_row_groups):
        end += metadata.row_group(group).num_rows
        if end - first >= rows or group == metadata.num_row_groups - 1:
            found.append(Slice(str(path), file, (start, group + 1), first))
            start, first = group + 1, end
    return found or whole


def check_columns(path: Path, columns: Mapping[str, str], source: str) -> None:
    """Whether a parquet, CSV or TSV file has what the entry of its source says.

    Raises:
        ValueError: naming the column that is not there or of a type that cannot be meant. A file that cannot be read
            at all is no mistake of the entry: it is counted as damaged.
    """
    try:
        schema = _schema(path)
    except (pa.ArrowException, OSError, EOFError, zlib.error, csv.Error):
        return
    for name, column in columns.items() if schema is not None else ():
        if column not in schema.names:
            raise ValueError(f"Source {source}: {path} has no column {column!r} for `{name}`; it has {schema.names}.")
        kind = schema.field(column).type
        if name == "image" and not _is_image(kind):
            raise ValueError(f"Source {source}: column {column!r} of {path} is {kind}; expected bytes of images.")
        if name == "text" and not _is_text(kind):
            raise ValueError(f"Source {source}: column {column!r} of {path} is {kind}; expected text, or lists of it.")


def _schema(path: Path) -> pa.Schema | None:
    """None: every record of such a file has names of its own."""
    if is_kind(path, TABLES):
        return pq.read_schema(path)
    if is_kind(path, (*ARCHIVES, ".jsonl", ".jsonl.gz")):
        return None
    with _opened(path) as file:
        header = next(_csv_records(file, path), None) or []
    if any("\0" in name or not name.isprintable() for name in header):
        raise ValueError(f"{path} does not begin with a line of column names in UTF-8: {header!r:.100}.")
    return pa.schema([(name, pa.string()) for name in header])


def image_column(path: Path) -> str:
    """The column of a parquet file with images: "image", or else the only one that can be.

    Raises:
        ValueError: if there is none or several.
    """
    schema = pq.read_schema(path)
    kinds = {name: schema.field(name).type for name in schema.names}
    fitting = [name for name, kind in kinds.items() if _is_image(kind) and not pa.types.is_null(kind)]
    if "image" in fitting or len(fitting) == 1:
        return "image" if "image" in fitting else fitting[0]
    raise ValueError(f"{path} has {fitting or 'no columns'} with bytes of images; one must be called `image`.")


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    return _is_binary(kind) or pa.types.is_null(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_list(kind) or pa.types.is_dictionary(kind) else kind
    return _is_string(kind) or _is_binary(kind) or pa.types.is_null(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _read_parquet(part: Slice, columns: Mapping[str, str]) -> Iterator[Record | Lost]:
    try:
        file = pq.ParquetFile(part.path)
    except (pa.ArrowException, OSError):
        yield Lost(0, "damaged_rows")  # how many there were, nobody knows
        return
    with file:
        # A column that the entry names is there (`check_columns`); one that only img2dataset's lists have may not be.
        columns = {name: column for name, column in columns.items() if column in file.schema_arrow.names}
        names, wanted = list(columns), list(dict.fromkeys(columns.values()))
        listed, text = False, None
        if "text" in columns:
            listed, text = _is_list(file.schema_arrow.field(columns["text"]).type), names.index("text")
        row = part.first
        for group in range(*(part.groups or (0, file.num_row_groups))):
            end = row + file.metadata.row_group(group).num_rows
            try:
                # One thread: as many tasks run as there are cores.
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                    cells = [_as_bytes(batch.column(columns[name])).to_pylist() for name in names]
                    for values in zip(*cells, strict=True):
                        yield Record(row, dict(zip(names, values, strict=True)), listed and values[text] is not None)
                        row += 1
            except (pa.ArrowException, OSError) as error:
                if not _is_damage(error):
                    raise
            for lost in range(row, end):
                yield Lost(lost, "damaged_rows")
            row = end


def _is_damage(error: Exception) -> bool:
    """Arrow's own errors, and not those of the file system below it. Its IOError is a bare OSError."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text as the bytes that it is in the file, a struct as its field `bytes`; everything else as it is."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return pc.struct_field(column, "bytes")
    if _is_string(kind):
        return column.cast(pa.large_binary())
    if _is_list(kind) and _is_string(kind.value_type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


# ---- Tar, read by `training.shards`

_NOTED = {"bad_json": "invalid_utf8"} | dict.fromkeys(
    ("truncated_shard", "damaged_member", "unreadable_shard"), "damaged_rows"
)
"""What its notes mean for a record. The others lose none: of a member that is there twice the first is used, and one
that is too large is not read, which leaves its record without an image or a text."""


def _read_tar(part: Slice, columns: Mapping[str, str]) -> Iterator[Record | Lost]:
    from ..shards import Fields, read_shard  # brings `datasets` along, which only tars need

    reasons: list[str] = []

    def note(reason: str, seen: str) -> None:
        if reason in _NOTED:
            wrong_json = reason == "bad_json" and "codec can't decode" not in seen
            reasons.append("wrong_type" if wrong_json else _NOTED[reason])

    row = 0
    others = {name: column for name, column in columns.items() if name != "image"}
    found = read_shard(part.path, 0, Fields(columns["image"], others), note)
    while True:
        sample = next(found, None)
        for reason in reasons:  # of the samples before this one
            yield Lost(row, reason)
            row += 1
        reasons.clear()
        if sample is None:
            return
        values = {name: next(iter(cells), None) for name, cells in sample.row.captions.items()}
        texts = sample.row.captions["text"]
        listed = len(texts) > 1
        yield Record(row, {**values, "image": sample.row.image, "text": texts if listed else values["text"]}, listed)
        row += 1


# ---- CSV, TSV and JSON lines: text in which bytes that are no UTF-8 are lone surrogates


def _read_list(part: Slice, columns: Mapping[str, str]) -> Iterator[Record | Lost]:
    row, path = 0, Path(part.path)
    try:
        with _opened(path) as file:
            for values in _json_lines(file) if is_kind(path, (".jsonl", ".jsonl.gz")) else _csv_rows(file, path):
                if values is None:
                    yield Lost(row, "wrong_type")
                else:
                    picked = {name: values.get(column) for name, column in columns.items()}
                    yield Record(row, picked, isinstance(picked["text"], list))
                row += 1
    except (OSError, EOFError, zlib.error):  # of a damaged archive; the file itself was opened before work began
        yield Lost(row, "damaged_rows")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    open_ = gzip.open if is_kind(path, (".gz",)) else open
    with open_(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        yield file


def _json_lines(file: TextIO) -> Iterator[dict[str, Any] | None]:
    """Objects; None for a line that is none."""
    for line in file:
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            yield values if isinstance(values, dict) else None


def _csv_rows(file: TextIO, path: Path) -> Iterator[dict[str, str] | None]:
    """Rows by the names of the first line; None for one that is no row."""
    records = _csv_records(file, path)
    header = next(records, None)
    for record in records:
        if record is None or header is None:
            yield None
        elif record:
            yield dict(zip(header, record, strict=False))


def _csv_records(lines: Iterator[str], path: Path) -> Iterator[list[str] | None]:
    """The fields of each record. Tabs separate without quotes, as in all such lists of addresses.

    A quote that does not close within some lines is a sign of the text: that line is taken without quotes, and the
    others are read again, so that one stray quote does not take the rows after it.
    """
    csv.field_size_limit(_MAX_FIELD)
    if is_kind(path, (".tsv", ".tsv.gz")):
        yield from (_fields([line], delimiter="\t", quoting=csv.QUOTE_NONE) for line in lines)
        return
    waiting: deque[str] = deque()
    while True:
        taken: list[str] = []

        def some(taken: list[str] = taken) -> Iterator[str]:
            while len(taken) < _MAX_LINES and (line := waiting.popleft() if waiting else next(lines, None)) is not None:
                taken.append(line)
                yield line

        fields = _fields(some(), strict=True)
        if not taken:
            return
        if fields is None:
            waiting.extendleft(reversed(taken[1:]))
            fields = _fields(taken[:1], quoting=csv.QUOTE_NONE)
        yield fields


def _fields(lines: Iterable[str], **options: Any) -> list[str] | None:
    try:
        return next(csv.reader(lines, **options), None)
    except csv.Error:
        return None
