"""Sources: every kind of file in the one schema, faults counted row by row, mistakes said before work begins."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.corpus import sources
from training.corpus.adapters import PUBLISHED, Adapter
from training.corpus.config import CorpusConfig, ExecutorSettings
from training.corpus.downloads import TO_DOWNLOAD, command
from training.corpus.engine import KEPT, Report
from training.corpus.entries import SourceSettings, as_text, known_language
from training.corpus.rows import parts, read_rows


def picture(colour: str = "red", format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(file, format)
    return file.getvalue()


def run(tmp_path: Path, *entries: dict[str, Any], **settings: Any) -> Report:
    listed = [{"name": "s", "language": "en", **entry} for entry in entries]
    section = {"list": listed, **settings}
    return sources.run(CorpusConfig(tmp_path / "out", 0, ExecutorSettings("local", 1), {"sources": section}))


def rows(tmp_path: Path, stream: str = "rows") -> list[dict[str, Any]]:
    return [row for part in parts(tmp_path / "out" / "sources" / stream) for row in read_rows(part)]


def outcomes(tmp_path: Path) -> dict[str, str]:
    """id -> outcome, of all that was read."""
    kept = {row["id"]: KEPT for row in rows(tmp_path)}
    return kept | {row["id"]: row["reason"] for row in rows(tmp_path, "dropped")}


def table(path: Path, columns: dict[str, Any], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def invalid(values: list[bytes | None]) -> pa.Array:
    """Bytes that a file calls strings."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


# ---- Parquet


def test_a_row_by_hand(tmp_path: Path) -> None:
    columns = {
        "picture": [picture()],
        "words": [" \ufeffa dog\r\n"],
        "place": ["http://a/1.png"],
        "number": [17],
        "rights": ["CC0"],
        "tongue": ["zh-CN"],
    }
    run(
        tmp_path,
        {
            **{"adapter": "parquet", "files": [table(tmp_path / "a.parquet", columns)], "licence": "unknown"},
            **{"image": "picture", "text": "words", "url": "place", "image_id": "number"},
            **{"licence_column": "rights", "language_column": "tongue"},
        },
    )
    (row,) = rows(tmp_path)
    image_hash = row.pop("image_hash")
    assert row == {
        **{"id": "s/0/0", "source": "s", "image_id": "17", "image": {"bytes": picture(), "path": None}},
        **{"url": "http://a/1.png", "text": "a dog", "language": "zh", "licence": "CC0", "origin": "raw"},
        **dict.fromkeys(("width", "height", "score", "raw_text")),
    }
    import hashlib

    assert image_hash == hashlib.sha256(picture()).hexdigest()


def test_faults_of_rows(tmp_path: Path) -> None:
    """One bad string makes pyarrow refuse the whole batch: here it costs one row."""
    texts = invalid([b"good", b"caf\xe9", None, "狗".encode("gbk"), b"no image", b"empty image", "狗".encode()])
    images = [picture(), picture(), picture(), picture(), None, b"", picture("blue")]
    file = table(tmp_path / "a.parquet", {"text": texts, "image": images})
    report = run(tmp_path, {"adapter": "parquet", "files": [file]})
    expected = [KEPT, "invalid_utf8", "no_text", "invalid_utf8", "no_image", "no_image", KEPT]
    assert outcomes(tmp_path) == {f"s/0/{number}": outcome for number, outcome in enumerate(expected)}
    assert [row["text"] for row in rows(tmp_path)] == ["good", "狗"]
    assert report.counts.as_dict() == {"s": {"en": {KEPT: 2, "invalid_utf8": 2, "no_image": 2, "no_text": 1}}}


def test_lists_of_texts_share_their_image(tmp_path: Path) -> None:
    texts = pa.array([["one", None, "three"], [], None, ["x"]], pa.list_(pa.string()))
    file = table(tmp_path / "a.parquet", {"text": texts, "image": [picture()] * 4})
    run(tmp_path, {"adapter": "parquet", "files": [file]})
    assert outcomes(tmp_path) == {
        **{"s/0/0/0": KEPT, "s/0/0/1": "no_text", "s/0/0/2": KEPT, "s/0/1/0": "no_text", "s/0/2": "no_text"},
        "s/0/3/0": KEPT,
    }
    assert [(row["image_id"], row["text"]) for row in rows(tmp_path)] == [
        ("0/0", "one"),
        ("0/0", "three"),
        ("0/3", "x"),
    ]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
    ],
)
def test_kinds_of_text_columns(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["a dog", "一只狗"]
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    column = pa.array([[value] for value in values] if listed else values).cast(kind)
    file = table(tmp_path / "a.parquet", {"text": column, "image": [picture()] * 2})
    run(tmp_path, {"adapter": "parquet", "files": [file]})
    assert [row["text"] for row in rows(tmp_path)] == values


def test_images_as_datasets_writes_them(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": picture(), "path": "a.png"}, {"bytes": None, "path": "/etc/passwd"}, None]
    file = table(tmp_path / "a.parquet", {"text": ["a", "b", "c"], "image": pa.array(images, struct)})
    run(tmp_path, {"adapter": "parquet", "files": [file]})
    # A path in others' data names nothing here, or a file that is not theirs to name.
    assert outcomes(tmp_path) == {"s/0/0": KEPT, "s/0/1": "no_image", "s/0/2": "no_image"}


def test_damage_costs_its_row_group(tmp_path: Path) -> None:
    numbers = [f"text {number}" for number in range(30)]
    columns = {"text": numbers, "image": [picture() + bytes([number]) for number in range(30)]}
    path = Path(table(tmp_path / "a.parquet", columns, row_group_size=10, use_dictionary=False, compression="zstd"))
    group = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    for place in range(group.data_page_offset, group.data_page_offset + group.total_compressed_size):
        data[place] ^= 0xFF
    path.write_bytes(data)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    run(tmp_path, {"adapter": "parquet", "files": [str(path), str(tmp_path / "b.parquet")]})
    expected = {f"s/0/{number}": "damaged_rows" if 10 <= number < 20 else KEPT for number in range(30)}
    assert outcomes(tmp_path) == expected | {"s/1/0": "damaged_rows"}


def test_large_files_are_read_by_row_groups(tmp_path: Path) -> None:
    columns = {"text": [f"text {number}" for number in range(50)], "image": [picture()] * 50}
    file = table(tmp_path / "a.parquet", columns, row_group_size=10)
    report = run(tmp_path, {"adapter": "parquet", "files": [file]}, rows_per_part=15)
    assert report.tasks == 3  # 20, 20 and 10 rows
    sizes = [pq.read_metadata(part).num_rows for part in parts(tmp_path / "out/sources/rows")]
    assert sizes == [15, 5, 15, 5, 10]
    assert [row["id"] for row in rows(tmp_path)] == [f"s/0/{number}" for number in range(50)]


def test_sources_of_high_priority_come_first(tmp_path: Path) -> None:
    entries = []
    for name, priority in (("low", 1), ("high", 9), ("also high", 9)):
        file = table(tmp_path / f"{name}.parquet", {"text": ["text"], "image": [picture()]})
        entries.append({"name": name, "adapter": "parquet", "files": [file], "priority": priority})
    run(tmp_path, *entries)
    assert [row["source"] for row in rows(tmp_path)] == ["high", "also high", "low"]


# ---- Tar


def archive(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def test_tars(tmp_path: Path) -> None:
    file = archive(
        tmp_path / "a.tar",
        [
            *(("x/0.jpg", picture()), ("x/0.txt", b"a dog\n")),
            *(("x/1.txt", b"caf\xe9"), ("x/1.jpg", picture())),
            ("x/2.jpg", picture()),
            ("x/3.txt", b"no image"),
            *(("x/4.PNG", picture()), ("x/4.txt", b"upper case")),
        ],
    )
    run(tmp_path, {"adapter": "tar", "files": [file]})
    assert outcomes(tmp_path) == {
        **{"s/0/0": KEPT, "s/0/1": "invalid_utf8", "s/0/2": "no_text", "s/0/3": "no_image", "s/0/4": KEPT}
    }


def test_a_truncated_tar_gives_what_is_whole(tmp_path: Path) -> None:
    members = [
        (f"{number}.{kind}", data) for number in range(4) for kind, data in (("jpg", picture()), ("txt", b"text"))
    ]
    path = Path(archive(tmp_path / "a.tar", members))
    path.write_bytes(path.read_bytes()[: 5 * 1024 + 514])  # in the text of sample 2
    report = run(tmp_path, {"adapter": "tar", "files": [str(path)]})
    assert report.counts.outcomes() == {KEPT: 2, "damaged_rows": 1}


def test_what_img2dataset_wrote(tmp_path: Path) -> None:
    """Its parquet output has rows for addresses that gave no image; beside its tars lie tables without images."""
    columns = {
        **{"url": ["http://a/1", "http://a/2"], "key": ["0", "1"], "status": ["success", "failed_to_download"]},
        **{"caption": ["a dog", "a cat"], "jpg": [picture(format="JPEG"), None], "image_id": ["7", "8"]},
        **{"language": ["en", "en"], "licence": ["CC0", None], "sha256": ["x", None]},
    }
    table(tmp_path / "images/00000.parquet", columns)
    entry = {"name": "laion", "adapter": "laion-2b-en", "files": ["gone.parquet"], "images": [str(tmp_path / "images")]}
    run(tmp_path, entry)
    (row,) = rows(tmp_path)
    assert {name: row[name] for name in ("id", "image_id", "url", "text", "licence")} == {
        **{"id": "laion/0/0", "image_id": "7", "url": "http://a/1", "text": "a dog", "licence": "CC0"}
    }
    assert [row["reason"] for row in rows(tmp_path, "dropped")] == ["no_image"]

    said = {"caption": "a dog", "url": "http://a/1", "image_id": "7", "language": "en", "licence": "CC0"}
    archive(tmp_path / "images/00000.tar", [("0.jpg", picture()), ("0.json", json.dumps(said).encode())])
    run(tmp_path / "tars", entry)
    (from_tar,) = rows(tmp_path / "tars")
    assert from_tar["text"] == "a dog" and from_tar["licence"] == "CC0" and from_tar["image_id"] == "7"


# ---- Addresses


def listed(tmp_path: Path) -> list[dict[str, Any]]:
    return [row for part in parts(tmp_path / "out/downloads/s/list") for row in read_rows(part)]


@pytest.mark.parametrize("adapter", [name for name, known in PUBLISHED.items() if known.image is None])
def test_every_list_of_addresses(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The columns that each source publishes become a list that img2dataset reads with the printed command."""
    known = PUBLISHED[adapter]
    columns = {
        known.text: ["a dog", None, "a cat"],
        known.url: ["http://a/1.jpg", "http://a/2.jpg", "file:///etc/passwd"],
    }
    columns |= {column: ["?", "x", "y"] for column in (known.licence_column, known.image_id) if column}
    report = run(tmp_path, {"adapter": adapter, "files": [table(tmp_path / "a.parquet", columns)]})
    assert report.counts.outcomes() == {"no_text": 1, "no_url": 1, TO_DOWNLOAD: 1}
    (row,) = listed(tmp_path)
    assert (row["url"], row["text"], row["licence"]) == ("http://a/1.jpg", "a dog", known.licence)
    assert row["image_id"] == ("?" if known.image_id else "0/0")
    said = capsys.readouterr().out
    assert command(tmp_path / "out/downloads/s") in said and f"images: [{tmp_path / 'out/downloads/s/images'}]" in said
    assert not (tmp_path / "out/sources").exists()  # nothing to clean yet


def test_the_adapters_that_there_are() -> None:
    assert set(get_args(Adapter)) == set(PUBLISHED)
    assert {"laion-2b-en", "coyo-700m", "datacomp-1b", "laion-cn", "wukong", "taisu", "zero"} < set(PUBLISHED)


def test_after_the_download_the_same_output_goes_on(tmp_path: Path) -> None:
    file = table(tmp_path / "a.parquet", {"text": ["a dog"], "url": ["http://a/1.jpg"]})
    local = {"name": "t", "adapter": "parquet"}
    local["files"] = [table(tmp_path / "t.parquet", {"text": ["x"], "image": [picture()]})]
    entry = {"adapter": "urls", "files": [file]}
    assert run(tmp_path, entry, local).counts.outcomes() == {TO_DOWNLOAD: 1}
    columns = {"caption": ["a dog"], "url": ["http://a/1.jpg"], "jpg": [picture()]}
    table(tmp_path / "out/downloads/s/images/00000.parquet", columns)
    entry["images"] = [str(tmp_path / "out/downloads/s/images")]
    assert run(tmp_path, entry, local).counts.outcomes() == {KEPT: 2}


CSV = """url,caption,more
http://a/1,"a, ""dog""\",x
http://a/2,"two
lines",x
http://a/3,"never closed,x
http://a/4,5" pipe,x
"""


def read_list(tmp_path: Path, name: str, data: bytes, text: str = "caption") -> list[tuple[str, str]]:
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    run(tmp_path, {"adapter": "urls", "files": [str(tmp_path / name)], "text": text})
    return [(row["url"], row["text"]) for row in listed(tmp_path)]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "A.CSV"])
def test_csv_and_its_quotes(tmp_path: Path, name: str) -> None:
    lines = CSV + "".join(f"http://a/{number},text {number},x\n" for number in range(5, 40))
    found = dict(read_list(tmp_path, name, lines.encode("utf-8-sig")))
    assert found["http://a/1"] == 'a, "dog"' and found["http://a/2"] == "two\nlines"
    # One quote that never closes takes no other row along.
    assert len(found) == 39 and found["http://a/3"] == '"never closed' and found["http://a/39"] == "text 39"


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    lines = 'caption\turl\n"5 inch pipe\thttp://a/1\nfine\thttp://a/2\nit is 5" long\thttp://a/3\n'
    assert [text for _, text in read_list(tmp_path, "a.tsv", lines.encode())] == [
        '"5 inch pipe',
        "fine",
        'it is 5" long',
    ]


def test_json_lines(tmp_path: Path) -> None:
    lines = b'{"url": "http://a/1", "text": "a dog"}\n\nnot json\n[1]\n{"url": "http://a/2", "text": 5}\n'
    lines += b'{"url": "http://a/3", "text": "caf\xe9"}\n{"url": "http://a/4", "text": "\\ud800"}\n'
    lines += b'{"url": "http://a/5", "text": ["one", "two"]}\n'
    found = read_list(tmp_path, "a.jsonl", lines, "text")
    assert found == [("http://a/1", "a dog"), ("http://a/5", "one"), ("http://a/5", "two")]
    reasons = [row["reason"] for part in parts(tmp_path / "out/downloads/s/dropped") for row in read_rows(part)]
    assert reasons == ["wrong_type", "wrong_type", "wrong_type", "invalid_utf8", "invalid_utf8"]


def test_a_damaged_gzip_gives_what_comes_before(tmp_path: Path) -> None:
    packed = gzip.compress("".join(f"http://a/{n},text {n * 7919 % 10007}\n" for n in range(20000)).encode())
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"url,text\n") + packed[: len(packed) // 2])
    report = run(tmp_path, {"adapter": "urls", "files": [str(path)]})
    assert report.counts.total(TO_DOWNLOAD) > 1000 and report.counts.total("damaged_rows") == 1


# ---- Mistakes


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"adapter": "parquet", "files": ["none-*.parquet"]}, "no file matches 'none-*.parquet'"),
        ({"adapter": "parquet", "files": ["{t}/a.parquet"], "text": "words"}, "no column 'words' for `text`"),
        ({"adapter": "parquet", "files": ["{t}/a.parquet"], "image": "text"}, "expected bytes of images"),
        ({"adapter": "parquet", "files": ["{t}/a.parquet"], "text": "number"}, "int64; expected text"),
        ({"adapter": "parquet", "files": ["{t}/a.parquet"], "licence_column": "rights"}, "no column 'rights'"),
        ({"adapter": "urls", "files": ["{t}/a.csv"]}, "no column 'text'"),
        ({"adapter": "urls", "files": ["{t}/a.txt"]}, "is none of .tar"),
        ({"adapter": "urls", "files": ["{t}/utf16.csv"]}, "column names in UTF-8"),
    ],
)
def test_mistakes_are_said_before_work_begins(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    table(tmp_path / "a.parquet", {"text": ["x"], "image": [picture()], "number": [1]})
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "a.txt").write_text("http://a/1\n")
    (tmp_path / "utf16.csv").write_bytes("url,text\n".encode("utf-16"))
    entry = {**entry, "files": [file.replace("{t}", str(tmp_path)) for file in entry["files"]]}
    with pytest.raises(ValueError) as failure:
        run(tmp_path, entry)
    assert said in str(failure.value) and "s" in str(failure.value)
    assert not (tmp_path / "out").exists()


def test_other_files_are_other_settings(tmp_path: Path) -> None:
    file = table(tmp_path / "a.parquet", {"text": ["x"], "image": [picture()]})
    run(tmp_path, {"adapter": "parquet", "files": [file]})
    table(tmp_path / "a.parquet", {"text": ["x", "y"], "image": [picture()] * 2})
    with pytest.raises(ValueError, match="contents.s was"):
        run(tmp_path, {"adapter": "parquet", "files": [file]})


def test_names_of_languages() -> None:
    assert [known_language(name) for name in ("en", "EN-us", "eng_Latn", "English")] == ["en"] * 4
    assert [known_language(name) for name in ("zh", "zh-CN", "zho_Hans", "Chinese", "cmn")] == ["zh"] * 5
    assert [known_language(name) for name in ("fr", "", None, "enzh")] == [None] * 4


def test_texts() -> None:
    assert as_text(" a\u3000") == ("a", None) and as_text("狗".encode()) == ("狗", None)
    assert as_text("\ud800") == (None, "invalid_utf8") and as_text(b"\xff") == (None, "invalid_utf8")
    assert as_text(3) == (None, "wrong_type") and as_text(None) == (None, "no_text")


def test_an_entry_knows_its_columns() -> None:
    entry = SourceSettings("a", "coyo-700m", ("x",), text="other")
    assert entry.published.columns() == {"text": "other", "url": "url", "image_id": "id"}
    assert entry.is_addresses and not SourceSettings("a", "coyo-700m", ("x",), images=("y",)).is_addresses
