"""Reading parquet: what is there is found, what is not is named."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.data import caption_list, open_table


def test_files_globs_and_folders_in_order(write, tmp_path):
    first, second = write("d/a.parquet", ["red"] * 3, n=[0, 1, 2]), write("d/b.parquet", ["blue"] * 2, n=[3, 4])
    for sources in ([first, second], [tmp_path / "d"], [str(tmp_path / "d" / "*.parquet")]):
        table = open_table(sources)
        assert table.column("n") == [0, 1, 2, 3, 4] and len(table) == 5
    assert [image.getpixel((0, 0)) for image in table.images([2, 3])] == [(255, 0, 0), (0, 0, 255)]
    assert table.locate(2) == f"row 2 of {first}" and table.locate(3) == f"row 0 of {second}"


def test_a_name_with_glob_characters_is_a_name(write):
    path = write("a[1].parquet", ["red"], n=[7])
    assert open_table([path]).column("n") == [7]


def test_a_limit_takes_evenly_spaced_rows_and_still_knows_where_they_are(write):
    path = write("a.parquet", ["red"] * 10, n=list(range(10)))
    table = open_table([path]).limited(4)
    assert table.column("n") == [0, 2, 5, 7]
    assert table.locate(3) == f"row 7 of {path}"
    assert len(open_table([path]).limited(None)) == len(open_table([path]).limited(99)) == 10
    with pytest.raises(ValueError, match="at least 1, not 0"):
        table.limited(0)


def test_image_columns_of_other_kinds(write, tmp_path):
    """Plain bytes, and the `Image` feature of `datasets`."""
    cells = [row["image"] for row in pq.read_table(write("a.parquet", ["green"])).to_pylist()]
    pq.write_table(pa.table({"photo": [cell["bytes"] for cell in cells]}), tmp_path / "plain.parquet")
    rows = datasets.Dataset.from_dict({"photo": cells}, features=datasets.Features({"photo": datasets.Image()}))
    rows.to_parquet(tmp_path / "feature.parquet")
    for name in ("plain", "feature"):
        (image,) = open_table([tmp_path / f"{name}.parquet"]).images([0], "photo")
        assert image.getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize("bad", [b"", b"no image at all", "truncated"])
def test_a_bad_image_is_named_by_row_and_file(write, bad):
    if bad == "truncated":
        good = pq.read_table(write("good.parquet", ["red"])).to_pylist()[0]["image"]["bytes"]
        bad = good[: len(good) - 30]
    write("d/a.parquet", ["red", "red"])
    second = write("d/b.parquet", ["red", bad])
    with pytest.raises(ValueError, match=f"row 1 of {second} holds an image that cannot be decoded"):
        open_table([second.parent]).images(range(4))


def test_a_column_without_images_is_named(write):
    path = write("a.parquet", ["red"], n=[1])
    with pytest.raises(ValueError, match="row 0 of .* holds no image but int '1'"):
        open_table([path]).images([0], "n")


def test_what_is_missing_and_what_is_there(write, tmp_path):
    path = write("d/a.parquet", ["red"], caption=["x"])
    with pytest.raises(ValueError, match="No column 'captions' in .*a.parquet; its columns are: image, caption"):
        open_table([path]).column("captions")
    with pytest.raises(ValueError, match=r"test-\*.parquet; in .* there is: a.parquet"):
        open_table([tmp_path / "d" / "test-*.parquet"])
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        open_table([tmp_path / "nowhere" / "a.parquet"])
    with pytest.raises(ValueError, match="No parquet files"):
        open_table([])
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="text.parquet is not a readable parquet file"):
        open_table([tmp_path / "text.parquet"])
    other = write("d/b.parquet", ["red"], text=["x"])
    with pytest.raises(ValueError, match="b.parquet has the columns image, text, but .*a.parquet has image, caption"):
        open_table([path, other])
    with pytest.raises(ValueError, match="holds no rows"):
        open_table([write("empty.parquet", [], n=pa.array([], pa.int64()))])


def test_captions_in_either_form():
    assert caption_list("a") == ["a"]
    assert caption_list(["a", "", None, " \t", "b"]) == ["a", "b"]
    assert caption_list(None) == caption_list("  ") == caption_list([]) == []
