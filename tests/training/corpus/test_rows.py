"""Parts: whole or not there, in the order of their numbers, the same bytes for the same rows."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.corpus.rows import DROPPED, PartWriter, RowsWriter, part_path, parts, parts_once, read_rows, write_rows


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, "PNG")
    return file.getvalue()


def row(number: int) -> dict:
    image = {"bytes": picture(), "path": None}
    return {"id": f"s/0/{number}", "source": "s", "image": image, "text": f"text {number}", "language": "en"}


def test_rows_come_back(tmp_path: Path) -> None:
    part = part_path(tmp_path, 3)
    assert part.name == "part-00003.parquet"
    assert write_rows(part, (row(number) for number in range(600))) == 600  # more than two row groups
    found = list(read_rows(part))
    assert [item["text"] for item in found] == [f"text {number}" for number in range(600)]
    assert found[0]["image"]["bytes"] == picture() and found[0]["score"] is None
    assert list(read_rows(part, ["id"]))[1] == {"id": "s/0/1"}


def test_datasets_decodes_the_images_of_a_part(tmp_path: Path) -> None:
    write_rows(tmp_path / "part-00000.parquet", [row(0)])
    table = datasets.Dataset.from_parquet(str(tmp_path / "part-00000.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table[0]["image"].size == (8, 6) and table[0]["text"] == "text 0"


def test_large_images_are_not_held_by_the_hundred(tmp_path: Path) -> None:
    large = {"id": "s", "image": {"bytes": bytes(2**24), "path": None}}
    write_rows(tmp_path / "part-00000.parquet", [large] * 7)
    metadata = pq.read_metadata(tmp_path / "part-00000.parquet")
    assert [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)] == [2, 2, 2, 1]
    assert len(list(read_rows(tmp_path / "part-00000.parquet"))) == 7


def test_equal_rows_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / name / "part-00000.parquet", (row(number) for number in range(300)))
    assert (tmp_path / "a/part-00000.parquet").read_bytes() == (tmp_path / "b/part-00000.parquet").read_bytes()


def test_a_part_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), PartWriter(tmp_path / "part-00000.parquet") as writer:
        writer.write(row(0))
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    assert write_rows(tmp_path / "part-00000.parquet", [], DROPPED) == 0  # an empty part is one
    assert parts(tmp_path) == [tmp_path / "part-00000.parquet"] and list(read_rows(parts(tmp_path)[0])) == []


def test_parts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["part-00002", "part-99999-00001", "part-99999-00010", "part-100000-00000"]
    for name in reversed(names):
        write_rows(tmp_path / f"{name}.parquet", [])
    (tmp_path / ".part-00003.parquet.0123").touch()  # what a kill leaves is no part
    assert [part.stem for part in parts(tmp_path)] == names
    assert parts_once(tmp_path, 4) == parts(tmp_path)
    with pytest.raises(ValueError, match="has 4 parts, not 5"):
        parts_once(tmp_path, 5)
    with pytest.raises(ValueError, match="No parts in"):
        parts(tmp_path / "nowhere")


@pytest.mark.parametrize("rows, sizes", [(0, [0]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_long_tasks_write_several_parts(tmp_path: Path, rows: int, sizes: list[int]) -> None:
    with RowsWriter(tmp_path, 7, 4) as writer:
        for number in range(rows):
            writer.write(row(number))
    assert [part.name for part in parts(tmp_path)] == [f"part-00007-0000{k}.parquet" for k in range(len(sizes))]
    assert [len(list(read_rows(part, ["id"]))) for part in parts(tmp_path)] == sizes
