from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.build import BUILDERS, build
from eval.build.coco import COUNT_RULES, DEFAULT_COUNT, DEFAULT_SET, SET_RULES
from eval.build.probe import probe, table

from .conftest import coco_document, read_rows


def name(image: int) -> str:
    return f"COCO_val2014_{image:012d}.jpg"


def test_the_categories_of_each_image(coco: dict[str, Path], tmp_path: Path) -> None:
    manifest = build("coco-mcc", coco, tmp_path / "set")
    rows = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    # 2 has the text of 1; 4 and 6 have fewer than two categories; the crowd of people in 3 is a person to be seen.
    assert [(row["image_id"], row["file_name"]) for row in rows] == [("1", name(1)), ("3", name(3)), ("5", name(5))]
    assert [row["captions_en"] for row in rows] == [
        ["a photo of a person and a dog."],
        ["a photo of a person and a car."],
        ["a photo of a person and a bicycle."],
    ]
    assert [row["captions_zh"] for row in rows] == [
        ["一张有人和狗的照片。"],
        ["一张有人和汽车的照片。"],
        ["一张有人和自行车的照片。"],
    ]
    assert manifest["rule"] == DEFAULT_SET
    assert manifest["counts"] == {"images": 3, "texts": 3, "pairs": 3, "choices": 3}
    assert manifest["dropped"] == {
        "images with under 2 categories": 1,
        "images without a category": 1,
        "images whose text fits another image": 1,
    }
    assert manifest["paper"] == {"images": 2222, "texts": 2222, "reproduced": False}


def test_the_numbers_in_each_image(coco: dict[str, Path], tmp_path: Path) -> None:
    manifest = build("coco-count", coco, tmp_path / "set")
    rows = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert [(row["captions_en"], row["captions_zh"]) for row in rows] == [
        (["a photo of two people and one dog."], ["一张有两个人和一只狗的照片。"]),
        (["a photo of three airplanes."], ["一张有三架飞机的照片。"]),
    ]
    assert manifest["rule"] == DEFAULT_COUNT
    assert manifest["dropped"] == {
        "images with a crowd": 1,
        "images with more than 10 of a category": 1,
        "images without a category": 1,
        "images whose text fits another image": 1,
    }


@pytest.mark.parametrize(
    ("set_name", "rule", "images", "texts"),
    [
        ("coco-mcc", "set:min1:unique:ignore", ["3", "4", "5"], 3),
        ("coco-mcc", "set:min1:first:drop", ["1", "4", "5"], 3),
        ("coco-mcc", "set:min2:unique:keep", ["3", "5"], 2),
        ("coco-count", "count:min1:max-:all:ignore", ["1", "2", "3", "4", "5"], 4),
        ("coco-count", "count:min2:max20:unique:keep", ["3", "5"], 2),
        ("coco-count", "count:min1:max10:all:keep", ["1", "2", "3", "4"], 3),
    ],
)
def test_other_rules(
    coco: dict[str, Path], tmp_path: Path, set_name: str, rule: str, images: list[str], texts: int
) -> None:
    manifest = build(set_name, coco, tmp_path / "set", rule=rule)
    rows = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert [row["image_id"] for row in rows] == images
    assert manifest["counts"]["texts"] == texts
    assert manifest["rule"] == rule and manifest["probe"] == {}


def test_texts_that_several_images_share_have_one_row(coco: dict[str, Path], tmp_path: Path) -> None:
    build("coco-count", coco, tmp_path / "set", rule="count:min1:max-:all:ignore")
    texts = read_rows(tmp_path / "set" / "texts.parquet")
    assert [(row["text_id"], row["key"], row["images"]) for row in texts] == [
        (0, "person=2, dog=1", 2),
        (1, "car=1", 1),
        (2, "airplane=3", 1),
        (3, "person=11, bicycle=1", 1),
    ]
    assert texts[3]["text_en"] == "a photo of 11 people and one bicycle."
    assert texts[3]["text_zh"] == "一张有11个人和一辆自行车的照片。"
    rows = read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert [row["text_ids"] for row in rows] == [[0], [0], [1], [2], [3]]


def test_false_candidates_name_one_category_that_the_image_lacks(coco: dict[str, Path], tmp_path: Path) -> None:
    build("coco-mcc", coco, tmp_path / "set")
    for row in read_rows(tmp_path / "set" / "choice.parquet"):
        true = row["candidates_en"][row["label"]]
        assert row["factor"] == "category" and len(set(row["candidates_en"])) == len(set(row["candidates_zh"])) == 4
        words = set(true.removesuffix(".").split())
        for other in row["candidates_en"]:
            # "a dog" -> "a cat", "a traffic light": of what is new only one category's words.
            if other != true:
                assert len(words - set(other.removesuffix(".").split()) - {"a", "an"}) == 1
    first = read_rows(tmp_path / "set" / "choice.parquet")[0]
    true = first["candidates_en"][first["label"]]
    assert true == "a photo of a person and a dog."
    # Whichever of the two is replaced, the others are its neighbours in COCO's order.
    others = set(first["candidates_en"]) - {true}
    assert others in (
        {"a photo of a person and a cat.", "a photo of a person and a horse.", "a photo of a person and a bird."},
        {"a photo of a bicycle and a dog.", "a photo of a car and a dog.", "a photo of a motorcycle and a dog."},
    )


def test_false_candidates_change_one_number_by_one(coco: dict[str, Path], tmp_path: Path) -> None:
    build("coco-count", coco, tmp_path / "set", rule="count:min1:max-:all:ignore")
    asked = {row["image_id"]: row for row in read_rows(tmp_path / "set" / "choice.parquet")}
    assert set(asked) == {"1", "2", "4", "5"}  # in 3 a crowd makes the numbers doubtful
    assert asked["4"]["factor"] == "count"
    assert set(asked["4"]["candidates_en"]) == {f"a photo of {n} airplanes." for n in ("two", "three", "four")}
    assert asked["4"]["candidates_en"][asked["4"]["label"]] == "a photo of three airplanes."
    assert asked["4"]["candidates_zh"][asked["4"]["label"]] == "一张有三架飞机的照片。"


def test_the_rule_that_gives_the_papers_counts_is_taken(
    coco: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILDERS, "coco-count", dataclasses.replace(BUILDERS["coco-count"], paper=(5, 4)))
    manifest = build("coco-count", coco, tmp_path / "set")
    assert manifest["rule"] == "count:min1:max-:all:keep"  # the first of those that give 5 images and 4 texts
    assert manifest["paper"]["reproduced"]
    assert manifest["probe"]["count:min1:max-:all:keep"] == [5, 4]
    assert set(manifest["probe"]) == set(COUNT_RULES)


def test_probe_counts_every_rule_without_building(coco: dict[str, Path]) -> None:
    found = probe("coco-mcc", coco)
    assert set(found) == set(SET_RULES)
    assert found["set:min2:first:keep"] == (3, 3)
    assert found["set:min3:unique:drop"] == (0, 0)


def test_the_probe_lists_the_closest_rules_first() -> None:
    found = {"far": (10, 10), "same": (2222, 2222), "near": (2200, 2201)}
    assert table("coco-mcc", found).splitlines() == [
        "  images    texts  rule",
        "    2222     2222  (the paper)",
        "    2222     2222  same  <- the same",
        "    2200     2201  near",
        "      10       10  far",
    ]


def test_all_images_of_the_annotations_without_a_split(coco: dict[str, Path], tmp_path: Path) -> None:
    manifest = build("coco-count", {"annotations": coco["annotations"]}, tmp_path / "set", rule=COUNT_RULES[0])
    assert "karpathy" not in manifest["sources"]
    assert build_ids(tmp_path / "set") == ["3", "4", "5"]


def test_the_released_caption_file_may_name_the_images(coco: dict[str, Path], tmp_path: Path) -> None:
    lines = [{"image": f"val2014/{name(image)}", "caption": ["a", "b"]} for image in (3, 4)]
    split = tmp_path / "coco_caption_karpathy_test.jsonl"
    split.write_text("\n".join(map(json.dumps, lines)) + "\n")
    build("coco-mcc", {**coco, "karpathy": split}, tmp_path / "set", rule="set:min1:first:keep")
    assert build_ids(tmp_path / "set") == ["3", "4"]


def build_ids(folder: Path) -> list[str]:
    return [row["image_id"] for row in read_rows(folder / "test-00000-of-00001.parquet")]


def test_faults_of_the_annotations_name_what_is_wrong(
    coco: dict[str, Path], save: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    def fault(message: str, **sources: Path) -> None:
        with pytest.raises(ValueError, match=message):
            build("coco-mcc", {**coco, **sources}, tmp_path / "set")
        assert not (tmp_path / "set").exists()

    fault(r"No file at .*nowhere\.json; in .*: dataset_coco\.json", annotations=tmp_path / "nowhere.json")
    fault("has no 'categories'; it has: images", annotations=save("a.json", {"images": []}))
    (tmp_path / "text.json").write_text("not json")
    fault(r"text\.json is not readable JSON", annotations=tmp_path / "text.json")
    fault("has no 'categories'; it has: list", annotations=save("b.json", [1, 2]))
    document = coco_document({1: {"person": 1}}, {})
    document["categories"][0]["name"] = "unicorn"
    fault(r"not among the 80 of COCO: \['unicorn'\]", annotations=save("c.json", document))
    document = coco_document({1: {"person": 1}}, {})
    del document["categories"][0]
    fault("is about category 1, which the file does not list", annotations=save("d.json", document))
    document["annotations"][0]["image_id"] = [3]
    fault(r"'image_id' cannot be list '\[3\]'", annotations=save("e.json", document))
    split = {"images": [{"filename": "COCO_val2014_000000000099.jpg", "split": "test"}]}
    fault("1 of them are not, such as COCO_val2014_000000000099", karpathy=save("f.json", split))
    (tmp_path / "g.jsonl").write_text('{"image": "a.jpg"}\n{broken\n')
    fault(r"Line 2 of .*g\.jsonl is not JSON", karpathy=tmp_path / "g.jsonl")


def test_a_set_without_images_is_refused(save: Callable[[str, Any], Path], tmp_path: Path) -> None:
    empty = save("empty.json", coco_document({1: {}}, {}))
    with pytest.raises(ValueError, match="no image of the annotations fits the rule"):
        build("coco-mcc", {"annotations": empty}, tmp_path / "set")
