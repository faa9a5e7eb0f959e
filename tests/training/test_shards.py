"""Rows of a shard from any place, in any form of tar; and what damage of every kind costs."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.training.samples import encoded, members, noise, row, tar_bytes, write_shards
from training import shards
from training.shards import Fields, Found, read_shard

FIELDS = Fields("image", {"en": "captions_en", "zh": "captions_zh"})


class Notes(Counter):
    def __call__(self, reason: str, seen: str) -> None:
        assert seen
        self[reason] += 1


def read(path: Path | str, start: int = 0, fields: Fields = FIELDS) -> tuple[list[Found], Notes]:
    notes = Notes()
    return list(read_shard(str(path), start, fields, notes)), notes


def read_bytes(tmp_path: Path, content: bytes, fields: Fields = FIELDS) -> tuple[list[Found], Notes]:
    (tmp_path / "x.tar").write_bytes(content)
    return read(tmp_path / "x.tar", fields=fields)


def numbers(found: list[Found]) -> list[int]:
    """Which of `row(0)`, `row(1)`, ... these are, by their captions."""
    return [int(item.row.captions["en"][0].split()[-1]) for item in found]


# ---- Whole shards


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_rows_from_any_place(tmp_path: Path, kind: str) -> None:
    (path,) = write_shards(tmp_path, kind, [8])
    whole, notes = read(path)
    assert not notes and numbers(whole) == list(range(8))
    for i, item in enumerate(whole):
        expected = row(i)
        assert item.row.image == expected["image"]["bytes"]
        assert item.row.captions == {"en": expected["captions_en"], "zh": expected["captions_zh"]}
        rest, notes = read(path, item.after)
        assert rest == whole[i + 1 :] and not notes
    assert len({item.place for item in whole}) == 8


NAMES = ["a", "deep/" * 30 + "a", "p" * 140 + "/" + "q" * 90, "长" * 60, "n" * 150]
FORMATS = {tarfile.USTAR_FORMAT: NAMES[:3], tarfile.GNU_FORMAT: NAMES, tarfile.PAX_FORMAT: NAMES}


@pytest.mark.parametrize("format, name", [(format, name) for format, names in FORMATS.items() for name in names])
def test_every_form_of_name(tmp_path: Path, format: int, name: str) -> None:
    content = [(f"{name}{i}{own[5:]}", data) for i in range(3) for own, data in members(i)]
    found, notes = read_bytes(tmp_path, tar_bytes(content, format))
    assert numbers(found) == [0, 1, 2] and not notes
    for i in (0, 1):
        assert read(tmp_path / "x.tar", found[i].after)[0] == found[i + 1 :]  # starts at the long name's own header


def test_sizes_in_pax_and_base_256_headers(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members(0):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), {"size": str(len(data)), "comment": "x = y\n"}
            tar.addfile(info, io.BytesIO(data))
    found, notes = read_bytes(tmp_path, out.getvalue())
    assert numbers(found) == [0] and not notes
    base_256 = bytearray(tar_bytes(members(0)))
    size = int(base_256[124:136].strip(b"\0 "), 8)
    base_256[124:136] = b"\x80" + size.to_bytes(11, "big")
    base_256[148:156] = b" " * 8
    base_256[148:156] = b"%06o\0 " % sum(base_256[:512])
    found, notes = read_bytes(tmp_path, bytes(base_256))
    assert numbers(found) == [0] and not notes


def test_directories_links_and_strangers_are_stepped_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("/etc/x.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in [("README", b"x" * 700), ("0.cls", b"3"), *members(1), ("1.npy", bytes(3000)), *members(2)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found, notes = read_bytes(tmp_path, out.getvalue())
    assert numbers([f for f in found if f.row.image]) == [1, 2] and not notes


def test_captions_in_json_and_text_members(tmp_path: Path) -> None:
    image = encoded(noise(0))
    content = [
        ("a.jpg", image),
        ("a.en.txt", b"a cat"),
        ("a.zh.txt", "猫".encode()),
        ("b.webp", image),
        ("b.json", json.dumps({"en.txt": ["x", None, " "], "zh.txt": 5}).encode()),
        ("c.JPG", image),
        ("c.txt", b"only text"),
    ]
    by_language, notes = read_bytes(tmp_path, tar_bytes(content), Fields("image", {"en": "en.txt", "zh": "zh.txt"}))
    captions = [item.row.captions for item in by_language]
    assert captions == [{"en": ["a cat"], "zh": ["猫"]}, {"en": ["x"], "zh": []}, {"en": [], "zh": []}]
    plain, _ = read_bytes(tmp_path, tar_bytes(content), Fields("image", {"en": "caption"}))
    assert [item.row.captions["en"] for item in plain] == [[], [], ["only text"]]
    assert all(item.row.image == image for item in plain) and not notes
    two = [("a.jpg", b"thumbnail"), ("a.full.jpg", image), ("a.txt", b"cat")]
    (chosen,), _ = read_bytes(tmp_path, tar_bytes(two), Fields("full.jpg", {"en": "txt"}))
    assert chosen.row.image == image


def test_hidden_members_do_not_part_a_sample(tmp_path: Path) -> None:
    both = [
        ("._0.jpg", b"attributes"),
        ("a/0.jpg", encoded(noise(0))),
        ("a/._0.txt", b"attributes"),
        ("a/0.txt", b"cat"),
    ]
    (only,), notes = read_bytes(tmp_path, tar_bytes(both), Fields("image", {"en": "txt"}))
    assert only.row.captions == {"en": ["cat"]} and only.row.image == encoded(noise(0)) and not notes


# ---- Damaged tar files


def test_truncated_anywhere(tmp_path: Path) -> None:
    content = tar_bytes(member for i in range(3) for member in members(i))
    end_of_third = read_bytes(tmp_path, content)[0][2].after
    for cut in range(0, len(content), 128):
        found, notes = read_bytes(tmp_path, content[:cut])
        assert numbers(found) == [0, 1, 2][: len(found)] and (len(found) == 3 or cut < end_of_third)
        assert notes == ({"truncated_shard": 1} if cut < end_of_third + 512 else {})
    assert read_bytes(tmp_path, b"") == ([], {"truncated_shard": 1})


def test_a_damaged_header_costs_its_sample(tmp_path: Path) -> None:
    content = tar_bytes(member for i in range(6) for member in members(i))
    whole, _ = read_bytes(tmp_path, content)
    for damage in (b"\xff" * 512, b"\0" * 100 + b"\xff" * 412, b"garbage " * 64):
        broken = bytearray(content)
        broken[whole[2].place : whole[2].place + 512] = damage
        found, notes = read_bytes(tmp_path, bytes(broken))
        assert numbers([f for f in found if f.row.image]) == [0, 1, 3, 4, 5] and notes["damaged_member"] == 1
    # In the middle of a sample: the part before is no sample, the part after neither.
    broken = bytearray(content)
    broken[whole[3].place - 1024 : whole[3].place - 900] = b"\xff" * 124
    found, notes = read_bytes(tmp_path, bytes(broken))
    assert numbers([f for f in found if f.row.image and f.row.captions["en"]]) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("size", [2**33 - 1, 2**40, -5])
def test_claimed_sizes_are_never_believed(tmp_path: Path, size: int) -> None:
    content = bytearray(tar_bytes(member for i in range(3) for member in members(i)))
    whole, _ = read_bytes(tmp_path, bytes(content))
    at = whole[1].place
    content[at + 124 : at + 136] = b"%011o\0" % size if 0 < size < 2**33 else (size % 2**96).to_bytes(12, "big")
    if size == 2**40:
        content[at + 124] |= 0x80
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    found, notes = read_bytes(tmp_path, bytes(content))
    if size < 0:  # the next header that is right
        assert numbers([f for f in found if f.row.image]) == [0, 2] and notes["damaged_member"] == 1
    else:
        assert numbers(found) == [0] and notes == {"truncated_shard": 1}


def test_members_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 2000)
    large = [("9.png", bytes(2001)), ("9.json", b"{}")]
    found, notes = read_bytes(tmp_path, tar_bytes([*members(0), *large, *members(1)]))
    assert numbers([f for f in found if f.row.image]) == [0, 1] and notes == {"oversized_member": 1}


BAD_JSON = {
    "latin1": '{"captions_en": "caf\xe9"}'.encode("latin-1"),
    "cut": b'{"captions_en": "a',
    "a list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "a long number": b'{"captions_en": ' + b"9" * 5000 + b"}",
    "empty": b"",
}


@pytest.mark.parametrize("name", list(BAD_JSON))
def test_bad_json(tmp_path: Path, name: str) -> None:
    bad = [("9.png", encoded(noise(9))), ("9.json", BAD_JSON[name])]
    found, notes = read_bytes(tmp_path, tar_bytes([*members(0), *bad, *members(1)]))
    assert numbers(found) == [0, 1] and notes == {"bad_json": 1}


def test_incomplete_and_repeated_samples(tmp_path: Path) -> None:
    image, text = members(5)
    content = [*members(0), image, *members(1), text, *members(2), ("2.png", b"x"), image, text, image, text]
    found, notes = read_bytes(tmp_path, tar_bytes(content))
    # Only an image; only captions; "2.png" is a sample of its own after "00002.*"; 5 comes twice.
    assert [bool(f.row.image) for f in found] == [True, True, True, False, True, True, True]
    assert [bool(f.row.captions["en"]) for f in found] == [True, False, True, True, True, False, True]
    assert notes == {"duplicate_member": 2}  # the second image and text of 5 stand beside the first
    assert found[-1].row.captions["en"] == row(5)["captions_en"]


# ---- Damaged parquet files


def test_truncated_and_foreign_parquet(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, "parquet", [6])
    content = path.read_bytes()
    for wrong in (content[: len(content) // 2], content[:-1], b"PAR1", b"", content[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(wrong)
        found, notes = read(path)
        assert found == [] and notes == {"unreadable_shard": 1}
    assert read(tmp_path / "gone.parquet")[1] == {"unreadable_shard": 1}
    for column in ("picture", "captions_en"):
        path.write_bytes(content)
        assert read(path, fields=Fields(column, {"en": "captions_zh"}))[1] == {"unreadable_shard": 1}


def test_damaged_pages_cost_their_row_group(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, "parquet", [9])
    column = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    found, notes = read(path)
    assert numbers(found) == [0, 1, 2, 6, 7, 8] and notes == {"damaged_row_group": 1}
    assert numbers(read(path, found[2].after)[0]) == [6, 7, 8]


def test_paths_in_remote_data_are_not_followed(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "mine.png")
    table = pa.Table.from_pylist([row(0, image={"bytes": None, "path": str(tmp_path / "mine.png")})])
    pq.write_table(table, tmp_path / "x.parquet")
    with fsspec.open("memory://paths/x.parquet", "wb") as file:
        file.write((tmp_path / "x.parquet").read_bytes())
    assert read(tmp_path / "x.parquet")[0][0].row.image == str(tmp_path / "mine.png")
    assert read("memory://paths/x.parquet")[0][0].row.image is None


# ---- Remote files


class Flaky(MemoryFileSystem):
    """Files of `memory://` whose reads begin to fail once `budget` bytes were given out; `failures` times."""

    protocol = "flaky"
    cachable = False
    budget, failures, error = 10**9, 0, ConnectionError("reset by peer")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        with MemoryFileSystem().open(path.replace("flaky://", "memory://"), "rb") as file:
            return _FlakyFile(file.read())


class _FlakyFile(io.BytesIO):
    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        Flaky.budget -= len(data)
        if Flaky.budget < 0 and Flaky.failures:
            Flaky.failures -= 1
            Flaky.budget = 10**9 if not Flaky.failures else 0
            raise Flaky.error
        return data


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(shards, "RETRY_WAITS", (0.0, 0.0, 0.0))
    for name, value in (("budget", 10**9), ("failures", 0), ("error", ConnectionError("reset by peer"))):
        monkeypatch.setattr(Flaky, name, value)
    yield Flaky
    MemoryFileSystem.store.clear()


def put(path: Path) -> str:
    with fsspec.open(f"memory://bucket/{path.name}", "wb") as file:
        file.write(path.read_bytes())
    return f"flaky://bucket/{path.name}"


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_remote_shard_that_stumbles_goes_on_where_it_was(tmp_path: Path, kind: str, flaky: type[Flaky]) -> None:
    (path,) = write_shards(tmp_path, kind, [9])
    url = put(path)
    whole = read(path)[0]
    assert read(url)[0] == whole
    flaky.budget, flaky.failures = path.stat().st_size // 2, 2
    found, notes = read(url)
    assert found == whole and not notes and flaky.failures == 0


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_remote_shard_that_vanishes_is_left(tmp_path: Path, kind: str, flaky: type[Flaky]) -> None:
    (path,) = write_shards(tmp_path, kind, [9])
    url = put(path)
    flaky.budget, flaky.failures, flaky.error = path.stat().st_size // 2, 1, FileNotFoundError(url)
    found, notes = read(url)
    assert notes == {"unreadable_shard": 1} and numbers(found) == list(range(len(found))) and len(found) < 9
    flaky.budget, flaky.failures, flaky.error = 600, 10**6, ConnectionError("down")
    assert read(url)[1] == {"unreadable_shard": 1}  # after the last try
    assert read("flaky://bucket/nothing.tar")[1] == {"unreadable_shard": 1}
    assert read("nosuchprotocol://bucket/nothing.tar")[1] == {"unreadable_shard": 1}


def test_a_stream_that_cannot_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HTTP servers without ranges give it."""

    class Forward(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *args: Any) -> int:
            raise OSError("not seekable")

    (path,) = write_shards(tmp_path, "tar", [4])
    whole = read(path)[0]
    content = path.read_bytes()
    monkeypatch.setattr(shards, "_open", lambda shard: Forward(content))
    assert read(path) == (whole, {}) and read(path, whole[1].after) == (whole[2:], {})
    monkeypatch.setattr(shards, "_open", lambda shard: Forward(content[: whole[2].place + 700]))
    found, notes = read(path)
    assert found == whole[:2] and notes == {"truncated_shard": 1}
