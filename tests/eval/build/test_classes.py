from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from scipy.io import savemat

from eval.build import build
from eval.build.probe import probe

from .conftest import cells, read_rows, structs


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """CUB_200_2011 with three classes and five images, of which 2, 4 and 5 are for testing."""
    folder = tmp_path / "CUB_200_2011"
    folder.mkdir()
    (folder / "classes.txt").write_text(
        "1 001.Black_footed_Albatross\n2 048.European_Goldfinch\n3 109.American_Redstart\n"
    )
    files = ["001.Black_footed_Albatross/a.jpg"] * 2 + ["048.European_Goldfinch/b.jpg"] * 3
    files = [file.replace(".jpg", f"_{number}.jpg") for number, file in enumerate(files, 1)]
    (folder / "images.txt").write_text("".join(f"{number} {file}\n" for number, file in enumerate(files, 1)))
    (folder / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n5 2\n")
    (folder / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n5 0\n")
    return folder


def test_cub(cub: Path, tmp_path: Path) -> None:
    manifest = build("cub", {"annotations": cub}, tmp_path / "set")
    rows = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert [(row["image_id"], row["file_name"], row["label"]) for row in rows] == [
        ("2", "001.Black_footed_Albatross/a_2.jpg", 0),
        ("4", "048.European_Goldfinch/b_4.jpg", 1),
        ("5", "048.European_Goldfinch/b_5.jpg", 1),
    ]
    assert rows[1]["captions_en"] == ["a photo of a European goldfinch, a type of bird."]
    assert rows[1]["captions_zh"] == ["一张红额金翅雀的照片。"]
    assert (rows[0]["name_en"], rows[0]["name_zh"]) == ("black-footed albatross", "黑脚信天翁")
    # A class without a test image stays among the candidates.
    texts = read_rows(tmp_path / "set" / "texts.parquet")
    assert [(row["key"], row["images"]) for row in texts] == [
        ("Black_footed_Albatross", 1),
        ("European_Goldfinch", 2),
        ("American_Redstart", 0),
    ]
    assert manifest["counts"] == {"images": 3, "texts": 3, "pairs": 3, "choices": 0}
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="test")
    assert loaded.features["label"].names == ["black-footed albatross", "European goldfinch", "American redstart"]
    assert set(manifest["sources"]) == {
        f"annotations/{name}.txt" for name in ("classes", "image_class_labels", "images", "train_test_split")
    }


def test_faults_of_cub(cub: Path, tmp_path: Path) -> None:
    def fault(message: str, **files: str) -> None:
        kept = {name: (cub / f"{name}.txt").read_text() for name in files}
        for name, content in files.items():
            (cub / f"{name}.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            build("cub", {"annotations": cub}, tmp_path / "set")
        for name, content in kept.items():
            (cub / f"{name}.txt").write_text(content)

    fault("does not name: Dodo", classes="1 001.Black_footed_Albatross\n2 002.Dodo\n")
    fault("2 classes, but only 1 distinct names", classes="1 001.Bobolink\n2 002.Bobolink\n")
    fault("Line 1 of .*images.txt must be a number and a value, not 'a.jpg'", images="a.jpg\n")
    fault(r"image 2 \(.*a_2.jpg\) has no class or no split", image_class_labels="1 1\n")
    (cub / "train_test_split.txt").unlink()
    with pytest.raises(ValueError, match="No file at .*train_test_split.txt"):
        build("cub", {"annotations": cub}, tmp_path / "set")


def test_dogs(tmp_path: Path) -> None:
    files = ["n02085620-Chihuahua/n02085620_1.jpg", "n02110958-pug/n02110958_2.jpg", "n02110958-pug/n02110958_3.jpg"]
    path = tmp_path / "test_list.mat"
    savemat(path, {"file_list": cells(files), "annotation_list": cells(files), "labels": np.array([[1.0], [2], [2]])})
    manifest = build("dogs", {"annotations": path}, tmp_path / "set")
    rows = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert [(row["image_id"], row["label"], row["name_zh"]) for row in rows] == [
        ("n02085620_1", 0, "吉娃娃"),
        ("n02110958_2", 1, "巴哥犬"),
        ("n02110958_3", 1, "巴哥犬"),
    ]
    assert rows[2]["captions_en"] == ["a photo of a pug, a type of dog."]
    assert manifest["counts"] == {"images": 3, "texts": 2, "pairs": 3, "choices": 0}

    def fault(message: str, files: Sequence[str], labels: Any) -> None:
        savemat(path, {"file_list": cells(files), "labels": labels})
        with pytest.raises(ValueError, match=message):
            build("dogs", {"annotations": path}, tmp_path / "other")

    fault("has 3 files but 2 labels", files, np.array([[1], [2]]))
    fault("one breed per label", files, np.array([[1], [1], [2]]))
    fault("must be 1 to 2, not", files, np.array([[1], [3], [3]]))
    fault("must be numbers, not", files, cells(["a", "b", "c"]))
    fault("does not name: unicorn", ["n1-unicorn/a.jpg"], np.array([[1]]))


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]


@pytest.fixture
def cars(tmp_path: Path) -> dict[str, Path]:
    """Five test images of classes 1, 2, 3, 1, 2 (counted from 1), and the class names beside them."""
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    rows = [(1, 1, 8, 8, label, f"{number:05d}.jpg") for number, label in enumerate((1, 2, 3, 1, 2), 1)]
    savemat(tmp_path / "cars_test_annos_withlabels.mat", {"annotations": structs(fields, rows)})
    savemat(
        tmp_path / "cars_test_annos.mat",
        {"annotations": structs(fields[:4] + fields[5:], [row[:4] + row[5:] for row in rows])},
    )
    savemat(tmp_path / "cars_meta.mat", {"class_names": cells(CARS).T})
    return {"annotations": tmp_path / "cars_test_annos_withlabels.mat", "meta": tmp_path / "cars_meta.mat"}


def test_cars(cars: dict[str, Path], tmp_path: Path) -> None:
    manifest = build("cars", cars, tmp_path / "set")
    rows = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert [(row["file_name"], row["label"]) for row in rows] == [
        (f"{number:05d}.jpg", label) for number, label in enumerate((0, 1, 2, 0, 1), 1)
    ]
    assert rows[0]["captions_en"] == ["a photo of an AM General Hummer SUV 2000, a type of car."]
    assert rows[0]["captions_zh"] == ["一张2000款AM通用悍马SUV的照片。"]
    assert manifest["rule"] == "all"
    assert manifest["probe"] == {"even": [3, 3], "first": [3, 3], "all": [5, 3]}


@pytest.mark.parametrize(("rule", "numbers"), [("even", (1, 3, 5)), ("first", (1, 2, 3))])
def test_half_of_the_cars(cars: dict[str, Path], tmp_path: Path, rule: str, numbers: Sequence[int]) -> None:
    manifest = build("cars", cars, tmp_path / "set", rule=rule)
    rows = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert [row["file_name"] for row in rows] == [f"{number:05d}.jpg" for number in numbers]
    assert manifest["dropped"] == {"images of the other half": 2}


def test_the_release_of_the_cars_in_one_file(tmp_path: Path) -> None:
    fields = ["relative_im_path", "bbox_x1", "class", "test"]
    rows = [("car_ims/000001.jpg", 1, 3, 0), ("car_ims/000002.jpg", 1, 3, 1)]
    path = tmp_path / "cars_annos.mat"
    savemat(path, {"annotations": structs(fields, rows), "class_names": cells(CARS).T})
    assert probe("cars", {"annotations": path})["all"] == (1, 3)
    build("cars", {"annotations": path}, tmp_path / "set")
    (row,) = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert (row["file_name"], row["name_zh"]) == ("car_ims/000002.jpg", "2012款smart fortwo敞篷车")


def test_faults_of_the_cars(cars: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="take cars_test_annos_withlabels.mat"):
        build("cars", {**cars, "annotations": tmp_path / "cars_test_annos.mat"}, tmp_path / "set")
    with pytest.raises(ValueError, match="has no 'class_names'"):
        build("cars", {"annotations": cars["annotations"]}, tmp_path / "set")
    savemat(tmp_path / "cars_meta.mat", {"class_names": cells(CARS[:2]).T})
    with pytest.raises(ValueError, match="00003.jpg has class 3, but there are 2 classes"):
        build("cars", cars, tmp_path / "set")
