from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from eval.build import build
from eval.build.probe import probe

from .conftest import read_rows


def rows_of(folder: Path) -> dict[str, list[str]]:
    rows = read_rows(folder / "test-00000-of-00001.parquet")
    return {row["image_id"]: row["captions_en"] for row in rows}


HOLD, RIDE = "a photo of a person holding a bicycle.", "a photo of a person riding a bicycle."
DRIER = "a photo of a person holding a hair drier."


def test_image_level_labels(hico: dict[str, Path], tmp_path: Path) -> None:
    manifest = build("hoi-pos", {"annotations": hico["anno"]}, tmp_path / "set")
    assert rows_of(tmp_path / "set") == {
        "HICO_test2015_00000001": [HOLD, RIDE],
        "HICO_test2015_00000003": [DRIER],
        "HICO_test2015_00000004": [RIDE],
    }
    assert manifest["rule"] == "image-level" and manifest["dropped"] == {"images without an interaction": 1}
    assert manifest["counts"] == {"images": 3, "texts": 3, "pairs": 4, "choices": 1}
    texts = read_rows(tmp_path / "set" / "texts.parquet")
    assert [(row["key"], row["text_zh"], row["images"]) for row in texts] == [
        ("hold bicycle", "一张一个人扶着自行车的照片。", 1),
        ("ride bicycle", "一张一个人正骑着自行车的照片。", 2),
        ("hold hair drier", "一张一个人拿着吹风机的照片。", 1),
    ]


def test_false_candidates_were_looked_for_in_vain(hico: dict[str, Path], tmp_path: Path) -> None:
    build("hoi-pos", {"annotations": hico["anno"]}, tmp_path / "set")
    (row,) = read_rows(tmp_path / "set" / "choice.parquet")
    # Image 4 is -1 for "hold bicycle"; image 1 shows all verbs; 3 has no other verb for a hair drier.
    assert row["image_id"] == "HICO_test2015_00000004" and row["factor"] == "verb"
    assert row["candidates_en"][row["label"]] == RIDE
    assert row["candidates_en"][1 - row["label"]] == HOLD


@pytest.mark.parametrize("file", ["anno_bbox", "json"])
def test_boxes(hico: dict[str, Path], tmp_path: Path, file: str) -> None:
    manifest = build("hoi-pos", {"annotations": hico[file]}, tmp_path / "set")
    # The invisible pair of image 3 has no boxes, so that nothing is left for it, nor for the class.
    assert rows_of(tmp_path / "set") == {"HICO_test2015_00000001": [HOLD, RIDE], "HICO_test2015_00000004": [RIDE]}
    assert manifest["rule"] == "boxes" and manifest["counts"]["choices"] == 0
    assert manifest["dropped"] == {"images without an interaction": 2, "classes that no test image shows": 1}
    assert not (tmp_path / "set" / "choice.parquet").exists()


def test_the_file_decides_the_rule(hico: dict[str, Path], tmp_path: Path) -> None:
    assert probe("hoi-pos", {"annotations": hico["anno"]}) == {"image-level": (3, 3)}
    assert probe("hoi-pos", {"annotations": hico["json"]}) == {"boxes": (2, 2)}
    with pytest.raises(ValueError, match="is for the rule 'boxes', not 'image-level'"):
        build("hoi-pos", {"annotations": hico["json"]}, tmp_path / "set", rule="image-level")


def test_faults_of_the_annotations_name_what_is_wrong(hico: dict[str, Path], tmp_path: Path) -> None:
    def fault(message: str, path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            build("hoi-pos", {"annotations": path}, tmp_path / "set")
        assert not (tmp_path / "set").exists()

    def changed(**changes: object) -> Path:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps({**json.loads(hico["json"].read_text()), **changes}))
        return path

    (tmp_path / "text.mat").write_text("not a MATLAB file at all, only some text " * 10)
    fault(r"text\.mat is not a readable MATLAB file", tmp_path / "text.mat")
    (tmp_path / "cut.mat").write_bytes(hico["anno"].read_bytes()[:300])
    fault(r"cut\.mat is not a readable MATLAB file", tmp_path / "cut.mat")
    savemat(tmp_path / "other.mat", {"x": 1})
    fault("has no 'list_action'", tmp_path / "other.mat")
    savemat(tmp_path / "numbers.mat", {"list_action": np.arange(3)})
    fault("has no vname and nname", tmp_path / "numbers.mat")
    fault("do not translate: bewitch bicycle", changed(verbs=["hold", "no_interaction", "bewitch"]))
    fault("4 filenames but 1 annotations", changed(annotation=[{"hoi": []}]))
    fault("there is no class 9 among the 4", changed(annotation=[{"hoi": [9]}] * 4))
    fault(r"must be \[hoi, object, verb\], not \[0, 0\]", changed(correspondence=[[0, 0]]))
    fault(r"must be \[hoi, object, verb\], not 3", changed(correspondence=[3]))
