from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.build import build, visual_genome
from eval.build.probe import probe

from .conftest import read_rows


def relation(subject: tuple[int, str], predicate: str, other: tuple[int, str]) -> dict[str, Any]:
    """As in relationships.json: version 1.4 gives an object a `name`, version 1.2 `names`."""
    box = {"x": 1, "y": 2, "w": 3, "h": 4, "synsets": ["horse.n.01"], "merged_object_ids": []}
    return {
        "predicate": predicate,
        "relationship_id": 15927,
        "synsets": ["along.r.01"],
        "subject": {**box, "object_id": subject[0], "name": subject[1]},
        "object": {**box, "object_id": other[0], "names": [other[1]]},
    }


DOCUMENT = [
    {
        "image_id": 10,
        "relationships": [
            relation((1, "man"), "riding", (2, "horse")),
            relation((1, "Man"), "WEARING", (3, " hat ")),
            relation((4, "trees"), "behind", (2, "horse")),
            relation((5, "dragon"), "near", (1, "man")),
        ],
    },
    {
        "image_id": 11,
        "relationships": [
            relation((1, "man"), "on", (2, "street")),
            relation((3, "man"), "on", (2, "street")),
            relation((1, "man"), "near", (3, "man")),
        ],
    },
    {"image_id": 12, "relationships": [relation((1, "dragon"), "on", (2, "moon"))]},
    {"image_id": 13, "relationships": []},
]


@pytest.fixture
def sources(save: Callable[[str, Any], Path], tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "object_alias.txt").write_text("tree,trees,a tree\nstreet,road\n")
    return {"relationships": save("relationships.json", DOCUMENT), "object_alias": tmp_path / "object_alias.txt"}


def test_relations_in_the_vocabulary(sources: dict[str, Path], tmp_path: Path) -> None:
    manifest = build("vg-pos", sources, tmp_path / "set")
    rows = {row["image_id"]: row for row in read_rows(tmp_path / "set" / "test-00000-of-00001.parquet")}
    assert set(rows) == {"10", "11"} and rows["10"]["file_name"] == "10.jpg"
    assert rows["10"]["captions_en"] == ["a man riding a horse", "a man wearing a hat", "a tree behind a horse"]
    assert rows["10"]["captions_zh"] == ["男人骑着马", "男人戴着帽子", "树在马后面"]
    assert rows["11"]["captions_en"] == ["a man on a street", "a man near a man"]
    assert manifest["counts"]["images"] == 2 and manifest["counts"]["texts"] == manifest["counts"]["pairs"] == 5
    assert manifest["dropped"] == {
        "relations outside of the vocabulary": 2,
        "relations that an image repeats": 1,
        "images without a relation in the vocabulary": 2,
    }


def test_false_candidates(sources: dict[str, Path], tmp_path: Path) -> None:
    build("vg-pos", sources, tmp_path / "set")
    asked = {row["factor"]: row for row in read_rows(tmp_path / "set" / "choice.parquet")}
    # None about image 11, in which "man" names two objects: either may be on the street.
    assert {row["image_id"] for row in asked.values()} == {"10"} and set(asked) == {"roles", "relation"}
    relation = asked["relation"]
    assert relation["candidates_en"][relation["label"]] == "a tree behind a horse"
    assert relation["candidates_en"][1 - relation["label"]] == "a tree in front of a horse"
    assert relation["candidates_zh"][1 - relation["label"]] == "树在马前面"
    roles = asked["roles"]
    swapped = {
        "a man riding a horse": ("a horse riding a man", "马骑着男人"),
        "a man wearing a hat": ("a hat wearing a man", "帽子穿着男人"),
        "a tree behind a horse": ("a horse behind a tree", "马在树后面"),
    }
    true, other = roles["label"], 1 - roles["label"]
    assert swapped[roles["candidates_en"][true]] == (roles["candidates_en"][other], roles["candidates_zh"][other])


def test_a_false_candidate_is_not_true_of_the_image(save: Callable[[str, Any], Path], tmp_path: Path) -> None:
    near = [relation((1, "man"), "behind", (2, "tree")), relation((2, "tree"), "behind", (1, "man"))]
    near.append(relation((1, "man"), "in front of", (2, "tree")))
    near.append(relation((2, "tree"), "in front of", (1, "man")))
    build("vg-pos", {"relationships": save("r.json", [{"image_id": 1, "relationships": near}])}, tmp_path / "set")
    assert not (tmp_path / "set" / "choice.parquet").exists()


def test_the_seed_decides_which_images(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visual_genome, "IMAGES", 1)
    taken = set()
    for seed in range(4):
        manifest = build("vg-pos", sources, tmp_path / str(seed), seed=seed)
        rows = read_rows(tmp_path / str(seed) / "test-00000-of-00001.parquet")
        taken |= {row["image_id"] for row in rows}
        assert len(rows) == 1 and any(reason.startswith("images beyond") for reason in manifest["dropped"])
    assert taken == {"10", "11"}


def test_probe_also_counts_free_form_english(sources: dict[str, Path]) -> None:
    # Image 11 has two distinct relations; of 12 and 13 the latter has none.
    assert probe("vg-pos", sources) == {
        "vg150": (2, 5),
        "free-form, each text once": (3, 7),
        "free-form, texts of each image": (3, 7),
    }


def test_the_archive_as_it_is_published(sources: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "relationships.json.zip", "w") as archive:
        archive.writestr("relationships.json", json.dumps(DOCUMENT))
    manifest = build("vg-pos", {**sources, "relationships": tmp_path / "relationships.json.zip"}, tmp_path / "set")
    assert manifest["counts"]["texts"] == 5
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(ValueError, match="holds 0 JSON files"):
        build("vg-pos", {"relationships": tmp_path / "empty.zip"}, tmp_path / "other")


def test_faults_of_the_annotations_name_what_is_wrong(
    sources: dict[str, Path], save: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    def fault(message: str, document: Any) -> None:
        with pytest.raises(ValueError, match=message):
            build("vg-pos", {**sources, "relationships": save("bad.json", document)}, tmp_path / "set")
        assert not (tmp_path / "set").exists()

    fault("must hold a list of images with their relationships, not dict", {"a": 1})
    fault("has no 'relationships'; it has: image_id", [{"image_id": 3}])
    fault("Image 3 of .* has a relationship of another form", [{"image_id": 3, "relationships": [{"predicate": "on"}]}])
    odd = relation((1, "man"), "on", (2, "street"))
    odd["subject"]["object_id"] = [1]
    fault("has a relationship of another form", [{"image_id": 3, "relationships": [odd]}])
    (tmp_path / "alias.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        build("vg-pos", {**sources, "predicate_alias": tmp_path / "alias.txt"}, tmp_path / "set")
