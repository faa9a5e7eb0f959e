"""One parquet or tar shard as undecoded rows, from any place in it; nothing in a file stops the run.

Tested by `pytest tests/training/test_shards.py`. What cannot be used is reported by reason, and the first of each kind
with its place:

- "unreadable_shard": gone, refused, no parquet, no such column, or still failing after `RETRY_WAITS`; what is left of
  it is skipped.
- "damaged_row_group": pages that cannot be decompressed or decoded; the next row group goes on.
- "truncated_shard": a tar without its end mark; the complete samples before are used.
- "damaged_member": a tar header whose checksum is wrong; reading goes on at the next header that is right.
- "oversized_member": larger than MAX_MEMBER_BYTES (text: MAX_TEXT_BYTES); never read.
- "duplicate_member": the same name twice in a row; the first is used.
- "bad_json": not UTF-8, not JSON, or not an object.

Written on pyarrow and fsspec rather than on `datasets` streaming (5.2.0, read and measured by
`benchmarks/data_streams.py`): its parquet reader stops the run at a damaged page or a file that vanishes and counts
nothing, its WebDataset reader has no error handling and raises on a repeated key, and neither can go on in the middle
of a shard without reading it from its beginning.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from eval.data import caption_list

from .shard_files import kind_of
from .tables import Row, is_image, is_text

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 2**27  # an image of MAX_PIXELS as PNG can hardly be larger
MAX_TEXT_BYTES = 2**20
RETRY_WAITS = (1.0, 4.0, 16.0)
"""Seconds before a remote shard that failed is opened again, at the sample after the last good one."""
_BATCH_ROWS = 64  # of about 50 kB: what a reader holds at once
_BLOCK = 512  # of a tar file

Note = Callable[[str, str], None]
"""Told a reason and what was seen."""


@dataclass(frozen=True)
class Fields:
    """Where a sample's image and captions are; see `training.data.open_source`."""

    image_column: str
    captions: Mapping[str, str]

    def text_extensions(self) -> set[str]:
        return {"json", "txt", *self.captions.values()}


@dataclass(frozen=True)
class Found:
    """A row with its place in its shard: the row number, or in a tar file the byte where its first header starts."""

    place: int
    after: int
    """Where reading goes on after it."""
    row: Row


def read_shard(shard: str, start: int, fields: Fields, note: Note) -> Iterator[Found]:
    """The rows of a shard from `start` on, which is 0 or the `after` of a row.

    A row may lack its image (None) or captions; everything else that is wrong is left out and noted.
    """
    failures = 0
    read = {"parquet": _read_parquet, "tar": _read_tar}[kind_of(shard)]
    while True:
        try:
            with _open(shard) as file:
                for found in read(file, start, fields, note, "://" not in shard):
                    start, failures = found.after, 0
                    yield found
            return
        except Exception as error:  # any file system, any damage
            if failures == len(RETRY_WAITS) or not _may_pass(error, shard):
                note("unreadable_shard", f"{shard} from {start} on: {type(error).__name__}: {error}")
                return
            logger.warning("%s failed (%s: %s); trying again.", shard, type(error).__name__, error)
            time.sleep(RETRY_WAITS[failures])
            failures += 1


def _open(shard: str) -> BinaryIO:
    return fsspec.open(shard, "rb").open() if "://" in shard else open(shard, "rb")


def _may_pass(error: Exception, shard: str) -> bool:
    """Whether trying again can help."""
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, MemoryError)
    return "://" in shard and not isinstance(error, lasting)  # ArrowInvalid is a ValueError


# ---- Parquet


def _read_parquet(file: BinaryIO, start: int, fields: Fields, note: Note, local: bool) -> Iterator[Found]:
    parquet = pq.ParquetFile(file)
    _check_schema(parquet.schema_arrow, fields)
    columns = list(dict.fromkeys([fields.image_column, *fields.captions.values()]))
    end = 0
    for group in range(parquet.num_row_groups):
        place, end = end, end + parquet.metadata.row_group(group).num_rows
        if end <= start:
            continue
        try:
            # One thread: workers are forks, and there is one for each core.
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                wanted = batch.slice(min(max(start - place, 0), len(batch)))
                place += len(batch) - len(wanted)
                for values in wanted.to_pylist():
                    yield Found(place, place + 1, _row(values, fields, local))
                    place += 1
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if not _is_damage(error):
                raise  # for read_shard to try again
            note("damaged_row_group", f"rows {place} to {end - 1}: {error}")


def _check_schema(schema: pa.Schema, fields: Fields) -> None:
    for column in (fields.image_column, *fields.captions.values()):
        fits = is_image if column == fields.image_column else is_text
        if column not in schema.names:
            raise ValueError(f"no column {column!r}; it has {', '.join(schema.names)}")
        if not fits(schema.field(column).type):
            raise ValueError(f"column {column!r} is {schema.field(column).type}")


def _is_damage(error: Exception) -> bool:
    """Arrow's own errors, and not those of the file system below it. Its IOError is a bare OSError."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def _row(values: Mapping[str, Any], fields: Fields, local: bool) -> Row:
    image = values[fields.image_column]
    if isinstance(image, dict):
        # A path in somebody else's data names nothing here, or a file that is not theirs to name.
        image = image["bytes"] if image["bytes"] is not None or not local else image.get("path")
    return Row(image, {language: caption_list(values[column]) for language, column in fields.captions.items()})


# ---- Tar


def _read_tar(file: BinaryIO, start: int, fields: Fields, note: Note, local: bool) -> Iterator[Found]:
    """Members that follow each other with one name up to the first point of its last part are one sample."""
    texts = fields.text_extensions()
    limits = {extension: MAX_MEMBER_BYTES for extension in (fields.image_column, *IMAGE_EXTENSIONS)}
    limits |= dict.fromkeys(texts, MAX_TEXT_BYTES)
    key, group, begin, after = None, {}, start, start
    for member in _members(_Tape(file, start), limits, note):
        folder, _, base = (member.name or "").rpartition("/")
        if base.startswith("."):  # what macOS adds to each file, between the image and its text
            after = _padded(member.end)
            continue
        stem, _, extension = base.partition(".")
        own = (folder, stem) if member.name else None
        if own != key or own is None:
            # Next to damage a sample is found whole or not at all: what is missing there is counted already.
            row = _sample(group, fields, note, even_in_part=own is not None)
            if row is not None:
                yield Found(begin, member.begin, row)
            key, group, begin = own, {}, member.begin
        extension = extension.lower()
        if extension in group:
            note("duplicate_member", f"{member.name!r} at byte {member.begin}")
        elif own is not None and extension in limits:
            group[extension] = member.data
        after = _padded(member.end)
    row = _sample(group, fields, note, even_in_part=True)
    if row is not None:
        yield Found(begin, after, row)


def _sample(group: Mapping[str, bytes | None], fields: Fields, note: Note, even_in_part: bool) -> Row | None:
    if not group:
        return None
    image = group.get(fields.image_column) or next((group[e] for e in IMAGE_EXTENSIONS if group.get(e)), None)
    try:
        texts = {name: (group.get(name) or b"").decode("utf-8") for name in fields.text_extensions() if name in group}
        values = json.loads(texts.pop("json")) if group.get("json") is not None else {}
        if not isinstance(values, dict):
            raise ValueError(f"an object was expected, not {type(values).__name__}")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        note("bad_json", str(error)[:200])
        return None
    captions = {}
    for language, column in fields.captions.items():
        value = values.get(column, texts.get(column))
        if value is None and len(fields.captions) == 1:
            value = texts.get("txt")
        captions[language] = caption_list(value) if _is_captions(value) else []
    return Row(image, captions) if even_in_part or (image and any(captions.values())) else None


def _is_captions(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(v is None or isinstance(v, str) for v in value))


@dataclass(frozen=True)
class _Member:
    begin: int
    """The byte where its first header starts."""
    end: int
    """Of its data."""
    name: str | None
    """None: the archive is damaged here."""
    data: bytes | None = None


def _members(tape: _Tape, limits: Mapping[str, int], note: Note) -> Iterator[_Member]:
    """The regular files of a tar archive, with the data of those that `limits` (extension -> bytes) names."""
    for header in _headers(tape, note):
        if header.name is None:
            yield header
            continue
        size = header.end - tape.position
        limit = limits.get(header.name.rpartition("/")[2].partition(".")[2].lower(), -1)
        if size > limit:
            if limit >= 0:
                note("oversized_member", f"{header.name[:200]!r} claims {size} bytes")
            yield header
            continue
        data = tape.read(size)
        if len(data) < size:
            note("truncated_shard", f"ends inside the member at byte {header.begin}")
            yield _Member(header.begin, tape.position, None)
            return
        yield _Member(header.begin, header.end, header.name, data)


def _headers(tape: _Tape, note: Note) -> Iterator[_Member]:
    """The headers from here on, with the tape at each one's data: ustar, GNU long names, PAX names and sizes.

    Not `tarfile`: it keeps every member it has seen and ends at the first bad header. Its parser does read all headers
    but the plain ones.
    """
    begin, extended, lost = tape.position, {}, False
    while len(block := tape.read(_BLOCK)) == _BLOCK:
        if not block.strip(b"\0"):
            if lost:
                continue
            return  # the end mark
        try:
            name, size, kind = _parse(block)
        except (tarfile.HeaderError, ValueError) as error:
            if not lost:
                note("damaged_member", f"at byte {tape.position - _BLOCK}: {error}")
                yield _Member(begin, tape.position, None)
            begin, extended, lost = tape.position, {}, True
            continue
        lost = False
        name, size = extended.get("path", name), extended.get("size", size)
        if tape.size is not None and tape.position + size > tape.size:
            note("truncated_shard", f"{size} bytes are claimed at byte {begin}, but it ends at {tape.size}")
            yield _Member(begin, tape.size, None)
            return
        end = tape.position + size
        if kind in _EXTENDED:
            extended |= _EXTENDED[kind](tape.read(min(size, MAX_TEXT_BYTES)))
        elif kind in _REGULAR:
            yield _Member(begin, end, name)
        tape.go_to(_padded(end))
        if kind not in _EXTENDED:
            begin, extended = tape.position, {}
    note("truncated_shard", f"ends at byte {tape.position} without an end mark")
    yield _Member(begin, tape.position, None)


def _parse(block: bytes) -> tuple[str, int, bytes]:
    """Name, bytes and type of a header. Plain ones, which almost all are, 5 times as fast as `tarfile` does.

    Raises:
        ValueError, tarfile.HeaderError: for a wrong checksum or numbers that are none.
    """
    kind = block[156:157]
    if kind in _REGULAR and block[345] == 0 and block[124] < 128:
        if sum(block) - sum(block[148:156]) + 8 * 32 == int(block[148:156].strip(b" \0") or b"0", 8):
            size = int(block[124:136].strip(b" \0") or b"0", 8)
            if size >= 0:
                return block[:100].partition(b"\0")[0].decode("utf-8", "replace"), size, kind
    info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    if info.size < 0:
        raise ValueError(f"a size of {info.size}")
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in _EXTENDED or info.type in b"gK"
    return info.name, info.size if has_data else 0, info.type


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _gnu_name(data: bytes) -> dict[str, Any]:
    return {"path": data.partition(b"\0")[0].decode("utf-8", "replace")}


def _pax_fields(data: bytes) -> dict[str, Any]:
    """Path and size of records "LENGTH KEY=VALUE\\n"; the length counts itself."""
    fields: dict[str, Any] = {}
    while data:
        digits, _, rest = data.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(data):
            break
        key, _, value = rest[: int(digits) - len(digits) - 2].partition(b"=")
        if key == b"path":
            fields["path"] = value.decode("utf-8", "replace")
        elif key == b"size" and value.isdigit():
            fields["size"] = int(value)
        data = data[int(digits) :]
    return fields


_REGULAR = (b"0", b"\0", b"7")
_EXTENDED: dict[bytes, Callable[[bytes], dict[str, Any]]] = {b"L": _gnu_name, b"x": _pax_fields}
"""Headers whose data says more about the next member."""


class _Tape:
    """A file that is read forwards from `start` on, and stepped over where nothing is needed."""

    def __init__(self, file: BinaryIO, start: int):
        self._file, self._seekable = file, file.seekable()
        self.size = file.seek(0, io.SEEK_END) if self._seekable else None
        self.position = 0
        if self._seekable:
            file.seek(0)
        self.go_to(start)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.position += len(data)
        return data

    def go_to(self, position: int) -> None:
        """Forwards; at most to the end."""
        if position == self.position:
            return
        if self._seekable:
            self.position = self._file.seek(position)
            return
        while self.position < position and self.read(min(position - self.position, 2**20)):
            pass
