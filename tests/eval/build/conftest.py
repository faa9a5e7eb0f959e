"""Small annotation files in the formats of the publishers, written as they write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

COCO_IDS = {"person": 1, "bicycle": 2, "car": 3, "airplane": 5, "dog": 18}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, Any], Path]:
    def save(name: str, document: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    return save


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """A folder of small JPEG files of these names, each of another grey."""

    def pictures(names: Sequence[str]) -> Path:
        for shade, name in enumerate(names):
            path = tmp_path / "pictures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (shade * 9, 0, 0)).save(path, "jpeg")
        return tmp_path / "pictures"

    return pictures


def coco_document(images: Mapping[int, Mapping[str, int]], crowds: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """instances_val2014.json. images: id -> {category: how many}; crowds: id -> categories with a crowd."""
    annotations = [
        {"id": 0, "image_id": image, "category_id": COCO_IDS[name], "iscrowd": crowd, "area": 9.5, "bbox": [0, 0, 3, 3]}
        for image, counts in images.items()
        for name, crowd in [
            *((name, 0) for name, count in counts.items() for _ in range(count)),
            *((name, 1) for name in crowds.get(image, ())),
        ]
    ]
    for number, own in enumerate(annotations):
        own["id"] = number
    return {
        "info": {"year": 2014},
        "licenses": [],
        "images": [
            {"id": image, "file_name": f"COCO_val2014_{image:012d}.jpg", "height": 8, "width": 8, "license": 1}
            for image in images
        ],
        "annotations": annotations,
        "categories": [{"id": n, "name": name, "supercategory": "thing"} for name, n in COCO_IDS.items()],
    }


@pytest.fixture
def coco(save: Callable[[str, Any], Path]) -> dict[str, Path]:
    """Seven images: the texts of 1, 2 and 7 are the same; 3 holds a crowd; 6 holds nothing. 7 is no test image."""
    images = {
        7: {"person": 2, "dog": 1},
        2: {"dog": 1, "person": 2},
        1: {"person": 2, "dog": 1},
        3: {"car": 1},
        4: {"airplane": 3},
        5: {"bicycle": 1, "person": 11},
        6: {},
    }
    split = [
        {"filename": f"COCO_val2014_{image:012d}.jpg", "split": "train" if image == 7 else "test", "cocoid": image}
        for image in images
    ]
    return {
        "annotations": save("instances_val2014.json", coco_document(images, {3: ["person"]})),
        "karpathy": save("dataset_coco.json", {"images": split, "dataset": "coco"}),
    }


def structs(fields: Sequence[str], rows: Sequence[Sequence[Any]]) -> np.ndarray:
    """A MATLAB struct array."""
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in fields])
    for number, row in enumerate(rows):
        array[0, number] = tuple(row)
    return array


def cells(values: Sequence[str]) -> np.ndarray:
    """A MATLAB column of cells."""
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


HICO_CLASSES = [("bicycle", "hold"), ("bicycle", "ride"), ("bicycle", "no_interaction"), ("hair_drier", "hold")]


@pytest.fixture
def hico(tmp_path: Path, save: Callable[[str, Any], Path]) -> dict[str, Path]:
    """Four test images in the three files. Boxes: 1 rides and holds, 2 nothing, 3 holds a drier that no box shows."""
    names = [f"HICO_test2015_{number:08d}.jpg" for number in (1, 2, 3, 4)]
    actions = structs(["nname", "vname", "vname_ing"], [(noun, verb, "") for noun, verb in HICO_CLASSES])
    labels = np.full((4, 4), np.nan)
    labels[:, 0] = (1, 1, -1, 0)
    labels[:, 1] = (-1, -1, 1, np.nan)
    labels[:, 2] = (0, np.nan, -1, 1)
    labels[:, 3] = (-1, 1, -1, np.nan)
    savemat(tmp_path / "anno.mat", {"list_action": actions.T, "anno_test": labels, "list_test": cells(names)})

    def pair(number: int, invisible: int = 0) -> tuple[Any, ...]:
        return number, np.zeros((1, 4)), np.zeros((1, 4)), np.ones((1, 2)), invisible

    fields = ["id", "bboxhuman", "bboxobject", "connection", "invis"]
    shown = [[pair(1), pair(2), pair(2)], [pair(3)], [pair(4, 1)], [pair(2)]]
    boxes = structs(
        ["filename", "size", "hoi"],
        [(name, np.zeros((1, 3)), structs(fields, own)) for name, own in zip(names, shown, strict=True)],
    )
    savemat(tmp_path / "anno_bbox.mat", {"list_action": actions.T, "bbox_test": boxes})
    document = {
        "annotation": [
            {"boxes_h": [], "boxes_o": [], "hoi": own, "object": [], "verb": []} for own in ([0, 1, 1], [2], [], [1])
        ],
        "filenames": names,
        "objects": ["bicycle", "hair_drier"],
        "verbs": ["hold", "no_interaction", "ride"],
        "correspondence": [[0, 0, 0], [1, 0, 2], [2, 0, 1], [3, 1, 0]],
        "empty": [2],
        "size": [[8, 8]] * 4,
    }
    return {
        "anno": tmp_path / "anno.mat",
        "anno_bbox": tmp_path / "anno_bbox.mat",
        "json": save("instances_test2015.json", document),
    }
