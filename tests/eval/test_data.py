"""Reading parquet: what is there is found, what is not is named."""

from __future__ import annotations

import io
import json
import tarfile
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.data import caption_list, open_data, open_table
from eval.tasks import Columns, Data
from tests.eval.conftest import png


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
    assert caption_list("a\n\nb", "\n") == ["a", "b"]
    for wrong in (3, [1, 2], {"a": "b"}, b"bytes", ["a", ["b"]]):
        with pytest.raises(ValueError, match="must hold a string or a list of strings"):
            caption_list(wrong)


def tar(path, samples):
    """A WebDataset shard: members KEY.EXTENSION."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


COLUMNS = Columns("jpg", {"en": "txt"}, image_id="__key__", caption_separator="\n")


def test_webdataset_tars_in_a_folder_as_the_hub_has_them(tmp_path):
    tar(
        tmp_path / "test" / "0.tar",
        {"s0": {"jpg": png("red"), "txt": b"a\nb"}, "s1": {"jpg": png("blue"), "txt": b"c"}},
    )
    tar(tmp_path / "test" / "1.tar", {"s2": {"jpg": b"broken", "txt": b"d"}})
    (tmp_path / "test" / "nshards.txt").write_text("2")  # plain load_dataset(folder) would take this for the data
    data = Data("webdataset", "test/*.tar")
    table = open_data(data, COLUMNS, tmp_path)[""]
    assert table.column("txt") == ["a\nb", "c", "d"] and table.column("__key__") == ["s0", "s1", "s2"]
    assert table.images([1], "jpg")[0].getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match=r"sample s2 of .*1.tar holds an image that cannot be decoded"):
        table.images([2], "jpg")
    # The files may also lie in the folder itself.
    assert len(open_data(data, COLUMNS, tmp_path / "test")[""]) == 3
    with pytest.raises(ValueError, match=r"No .tar file matches val/\*.tar.* \(split 'test'\); there is: .*test/"):
        open_data(Data("webdataset", "val/*.tar"), COLUMNS, tmp_path)
    (tmp_path / "test" / "2.tar").write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match="cannot be read as webdataset"):
        open_data(data, COLUMNS, tmp_path)


def test_json_lines_that_name_image_files(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png("green"))
    lines = [{"image": "photos/a.png", "caption": ["绿色", "绿"]}, {"image": "photos/gone.png", "caption": ["红色"]}]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data, columns = Data("jsonl", "*.jsonl"), Columns("image", {"zh": "caption"})
    for source in (tmp_path, tmp_path / "test.jsonl"):
        table = open_data(data, columns, source)[""]
        assert table.column("caption") == [["绿色", "绿"], ["红色"]]
        assert table.images([0])[0].getpixel((0, 0)) == (0, 255, 0)
        with pytest.raises(ValueError, match="row 1 of .*test.jsonl holds an image that cannot be decoded.*gone.png"):
            table.images([1])
    for outside in ("../secret.png", "/etc/passwd", 3):
        (tmp_path / "test.jsonl").write_text(json.dumps({"image": outside, "caption": ["x"]}))
        with pytest.raises(ValueError, match="row 0 of .*test.jsonl must name an image file below"):
            open_data(data, columns, tmp_path)
    (tmp_path / "test.jsonl").write_text("{not json")
    with pytest.raises(ValueError, match="test.jsonl cannot be read as jsonl"):
        open_data(data, columns, tmp_path)


def test_a_split_that_a_column_names(write):
    file = write("a.parquet", ["red"] * 5, split=["train", "val", "train", "val", "val"], n=list(range(5)))
    columns = Columns(split="split")
    table = open_data(Data("parquet", split="val"), columns, file)[""]
    assert table.column("n") == [1, 3, 4] and table.locate(2) == f"row 4 of {file}"
    assert table.limited(2).column("n") == [1, 3] and table.limited(2).locate(1) == f"row 3 of {file}"
    with pytest.raises(
        ValueError, match=r"No split 'test' in column 'split' of .*; it holds: train \(2 rows\), val \(3"
    ):
        open_data(Data("parquet", split="test"), columns, file)
    with pytest.raises(ValueError, match="No column 'part'"):
        open_data(Data("parquet"), Columns(split="part"), file)


def test_from_the_hub_at_the_pinned_revision_and_else_at_the_newest(monkeypatch):
    """The address that `datasets` is given; nothing is downloaded."""
    rows = datasets.Dataset.from_dict({"txt": ["a"]})
    asked = []

    def load_dataset(builder, data_files, split):
        asked.append((builder, *data_files))
        return rows

    newest = SimpleNamespace(sha="c" * 40)
    monkeypatch.setattr("eval.data.datasets.load_dataset", load_dataset)
    monkeypatch.setattr("eval.data.HfApi.dataset_info", lambda api, name: newest)
    for revision, used in (("b" * 40, "b" * 40), (None, "c" * 40)):
        table = open_data(Data("webdataset", "test/*.tar", "org/name", revision), COLUMNS)[""]
        assert asked.pop() == ("webdataset", f"hf://datasets/org/name@{used}/test/*.tar") and table.revision == used


def test_data_that_cannot_be_had_say_how_to_get_them(monkeypatch):
    with pytest.raises(ValueError, match="not on the Hub. To get them: ask nicely"):
        open_data(Data("parquet", obtain="ask nicely"), Columns())
    # HF_HUB_OFFLINE is set in tests/conftest.py.
    with pytest.raises(ValueError, match="The Hub says nothing of the data set org/name .*name a folder with --data"):
        open_data(Data("parquet", id="org/name"), Columns())
    with pytest.raises(ValueError, match=r"hf://datasets/org/name@b{40}/\* cannot be read as parquet"):
        open_data(Data("parquet", id="org/name", revision="b" * 40), Columns())


def test_a_caption_column_of_numbers_and_a_file_of_no_format_are_named(write):
    table = open_table([write("a.parquet", ["red", b"no image"], text=["a", "b"], label=[0, 1])])
    with pytest.raises(ValueError, match=r"row 0 of .*a.parquet, column 'label': .* not '0'"):
        table.captions("label")
    with pytest.raises(ValueError, match=r"row 1 of .*a.parquet holds .*: its 8 bytes are of no known format"):
        table.images([1])
