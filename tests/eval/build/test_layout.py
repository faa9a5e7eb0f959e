"""What holds for the folder of any set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard

from eval.build import BUILDERS, build, layout
from eval.data import open_table

from .conftest import read_rows

NAMES = [f"COCO_val2014_{image:012d}.jpg" for image in (1, 3, 5)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_same_inputs_give_the_same_bytes(
    coco: dict[str, Path], pictures: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    sources = {**coco, "images": pictures(NAMES)}
    for name in ("a", "b"):
        build("coco-mcc", sources, tmp_path / name)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    build("coco-mcc", sources, tmp_path / "a")  # over itself
    assert first == contents(tmp_path / "a")
    # Not only within this process, in which hashes of strings stay the same: these texts are written out by hand.
    assert json.loads(first["manifest.json"])["captions_sha256"]["en"] == sha256_of(
        "a photo of a person and a dog.", "a photo of a person and a car.", "a photo of a person and a bicycle."
    )


def sha256_of(*captions: str) -> str:
    return hashlib.sha256("".join(f"{caption}\n" for caption in captions).encode()).hexdigest()


def test_datasets_loads_every_config(
    coco: dict[str, Path], pictures: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    build("coco-mcc", {**coco, "images": pictures(NAMES)}, tmp_path / "set")
    rows = datasets.load_dataset(str(tmp_path / "set"), split="test")
    assert len(rows) == 3 and rows[0]["image"].size == (8, 8)
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows[2]["captions_zh"] == ["一张有人和自行车的照片。"]
    texts = datasets.load_dataset(str(tmp_path / "set"), "texts", split="test")
    assert texts["text_id"][:] == [0, 1, 2]
    questions = datasets.load_dataset(str(tmp_path / "set"), "choice", split="test")
    assert questions.column_names == ["image_id", "candidates_en", "candidates_zh", "label", "factor"]


def test_the_rest_of_eval_reads_the_images(
    coco: dict[str, Path], pictures: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    folder = pictures(NAMES)
    build("coco-mcc", {**coco, "images": folder}, tmp_path / "set")
    table = open_table([tmp_path / "set" / "test-*.parquet"])
    assert [image.getpixel((0, 0))[0] // 9 for image in table.images([0, 1, 2])] == [0, 1, 2]
    (row,) = [row for row in read_rows(tmp_path / "set" / "test-00000-of-00001.parquet") if row["image_id"] == "3"]
    assert row["image"]["bytes"] == (folder / NAMES[1]).read_bytes()  # the publisher's own file, not encoded again


def test_images_may_lie_one_folder_deeper(
    coco: dict[str, Path], pictures: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    folder = pictures([f"val2014/{name}" for name in NAMES])
    manifest = build("coco-mcc", {**coco, "images": folder}, tmp_path / "set")
    assert manifest["images"]["files"] == 3
    lines = [f"{name} {hashlib.sha256((folder / 'val2014' / name).read_bytes()).hexdigest()}\n" for name in NAMES]
    assert manifest["images"]["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_missing_and_damaged_images_are_named_and_nothing_is_written(
    coco: dict[str, Path], pictures: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    folder = pictures(NAMES)

    def fault(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build("coco-mcc", {**coco, "images": folder}, tmp_path / "set")
        assert not list(tmp_path.glob("set*")) + list(tmp_path.glob(".set*"))

    (folder / "val2014").mkdir()
    (folder / "train2014").mkdir()
    (folder / NAMES[0]).rename(folder / "val2014" / NAMES[0])
    (folder / "train2014" / NAMES[0]).write_bytes(b"")
    (folder / NAMES[1]).unlink()
    (folder / NAMES[2]).write_bytes((folder / NAMES[2]).read_bytes()[:200])
    fault(rf"3 images cannot be used .*{NAMES[0]} is in 2 folders; {NAMES[1]} is missing; {NAMES[2]} cannot be decoded")
    folder = tmp_path / "nowhere"
    fault("No image folder at .*nowhere")


def test_image_names_do_not_lead_out_of_the_folder(
    coco: dict[str, Path], pictures: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    document = json.loads(coco["annotations"].read_text())
    for image in document["images"]:
        image["file_name"] = f"../secret/{image['id']}.jpg"
    coco["annotations"].write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"outside of the image folder: '\.\./secret/1\.jpg'"):
        build("coco-mcc", {"annotations": coco["annotations"], "images": pictures(NAMES)}, tmp_path / "set")


def test_another_build_is_not_overwritten(coco: dict[str, Path], tmp_path: Path) -> None:
    build("coco-mcc", coco, tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match='holds another build .*name "coco-mcc" instead of "coco-count"'):
        build("coco-count", coco, tmp_path / "set")
    with pytest.raises(ValueError, match="holds another build .*seed 0 instead of 1"):
        build("coco-mcc", coco, tmp_path / "set", seed=1)
    document = json.loads(coco["annotations"].read_text())
    coco["annotations"].write_text(json.dumps({**document, "info": {"year": 2017}}))
    with pytest.raises(ValueError, match="holds another build .*sources"):
        build("coco-mcc", coco, tmp_path / "set")
    assert before == contents(tmp_path / "set")
    for name, content in (("other", "notes.txt"), ("odd", "manifest.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("[]")
        with pytest.raises(ValueError, match="is no fine-grained set"):
            build("coco-mcc", coco, tmp_path / name)
    (tmp_path / "empty").mkdir()
    build("coco-mcc", coco, tmp_path / "empty")


def test_images_are_split_into_files_of_limited_size(
    coco: dict[str, Path], pictures: Callable[[Sequence[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(NAMES)
    monkeypatch.setattr(layout, "BYTES_PER_FILE", 2 * (folder / NAMES[0]).stat().st_size + 10)
    manifest = build("coco-mcc", {**coco, "images": folder}, tmp_path / "set")
    files = ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    assert [file for file in manifest["files"] if file.startswith("test")] == files
    assert [len(read_rows(tmp_path / "set" / file)) for file in files] == [2, 1]
    assert len(datasets.load_dataset(str(tmp_path / "set"), split="test")) == 3


def test_the_manifest_holds_the_hashes_of_what_is_there(coco: dict[str, Path], tmp_path: Path) -> None:
    manifest = build("coco-mcc", coco, tmp_path / "set")
    assert manifest == json.loads((tmp_path / "set" / "manifest.json").read_text())
    for file, digest in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "set" / file).read_bytes()).hexdigest() == digest
    assert set(manifest["files"]) == {"test-00000-of-00001.parquet", "texts.parquet", "choice.parquet"}
    digest = hashlib.sha256(coco["annotations"].read_bytes()).hexdigest()
    assert manifest["sources"]["annotations"] == {"file": "instances_val2014.json", "sha256": digest}
    assert set(manifest["tables"]) == {"coco_categories.tsv"} and manifest["images"] is None


def test_the_card_says_what_is_inside(
    coco: dict[str, Path], pictures: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    build("coco-mcc", coco, tmp_path / "texts only")
    card = DatasetCard.load(tmp_path / "texts only" / "README.md")
    assert card.data.language == ["en", "zh"] and card.data.license == "cc-by-4.0"
    assert [config["config_name"] for config in card.data.configs] == ["default", "texts", "choice"]
    assert "The images are not inside" in card.text
    assert "The paper prints 2,222 images and 2,222 texts: this is another selection." in card.text
    assert "* images without a category: 1" in card.text
    build("coco-mcc", {**coco, "images": pictures(NAMES)}, tmp_path / "with images")
    card = DatasetCard.load(tmp_path / "with images" / "README.md")
    assert "The image files are inside" in card.text and card.data.license == "other"


def test_unknown_names_rules_and_sources_are_refused(coco: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "set"
    with pytest.raises(ValueError, match=f"no fine-grained set 'coco'; there are: {', '.join(BUILDERS)}"):
        build("coco", coco, output)
    with pytest.raises(ValueError, match="coco-mcc has no rule 'best'; there are: set:min1"):
        build("coco-mcc", coco, output, rule="best")
    with pytest.raises(ValueError, match="there is no source 'karpaty'.*karpathy: optional"):
        build("coco-mcc", {"annotations": coco["annotations"], "karpaty": coco["karpathy"]}, output)
    with pytest.raises(ValueError, match="the source 'annotations' is missing.*instances_val2014.json"):
        build("coco-mcc", {}, output)
    assert not output.exists()
