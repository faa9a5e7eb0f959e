"""The scenes benchmarks: by hand on four images of our own, and on what training.scenes writes."""

from __future__ import annotations

import json

import pytest

from eval.embed import Encoder
from eval.models import adapt
from eval.results import Score
from eval.scenes import evaluate_scenes, score_scenes
from eval.score import verify
from eval.tasks import load_task
from training.scenes import ScenesConfig, write_scenes


def objects(*pairs):
    return json.dumps({"background": "white", "objects": [{"colour": c, "shape": s} for c, s in pairs]})


@pytest.fixture
def folder(write, tmp_path):
    """Two scenes of one object, two of two; one task of three questions, the last about an image of no split."""
    for split in ("test", "validation"):
        write(
            f"scenes/{split}-00000-of-00001.parquet",
            ["red", "green", "blue", "white"],
            image_id=["a", "b", "c", "d"],
            captions_en=[["red", "one red", "blue"], ["green"] * 3, ["blue"] * 3, ["red green blue"] * 3],
            captions_zh=[["红色"] * 3, ["绿色"] * 3, ["蓝色"] * 3, ["红色绿色蓝色"] * 3],
            scene=[
                objects(("red", "dot")),
                objects(("green", "dot"), ("green", "dot")),
                objects(("blue", "dot")),
                objects(("red", "dot"), ("green", "dot"), ("blue", "dot")),
            ],
        )
    write(
        "scenes/tasks/attribute.parquet",
        ["red", "blue", "red"],
        image_id=["a", "c", "new"],
        candidates_en=[["red", "green"], ["red", "green", "blue", "red red"], ["blue", "green"]],
        candidates_zh=[["绿色", "红色"], ["红色", "绿色", "蓝色", "红色绿色"], ["蓝色", "绿色"]],
        label=[0, 2, 1],
        factor=["colour", "shape", "colour"],
    )
    vocabulary = {
        "colour": {name: {"en": name, "zh": zh} for name, zh in (("red", "红色"), ("green", "绿色"), ("blue", "蓝色"))},
        "shape": {"dot": {"en": "dot", "zh": "圆点"}},
    }
    manifest = {"tasks": ["attribute"], "vocabulary": vocabulary}
    (tmp_path / "scenes" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "scenes"


def test_by_hand(colour_encoder, folder):
    retrieval, zero_shot, attribute = score_scenes(colour_encoder, folder)
    assert retrieval.name == "scenes/retrieval" and retrieval.counts == {"images": 4, "zh texts": 8, "en texts": 8}
    assert retrieval.metrics["text_to_image_R@1"] == {"zh": Score(1.0, 0.25), "en": Score(1.0, 0.25)}
    assert zero_shot.counts == {"images": 2, "classes": 3}
    assert zero_shot.metrics["top-1"]["en"] == Score(1.0, pytest.approx(1 / 3))
    # The third question: both candidates score 0 on a red image.
    assert attribute.counts == {"questions": 3, "images": 3}
    chance = pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert attribute.metrics["accuracy"] == {"zh": Score(0.5, chance), "en": Score(2.5 / 3, chance)}
    assert attribute.metrics["accuracy/colour"] == {"zh": Score(0.25, 0.5), "en": Score(0.75, 0.5)}
    assert attribute.metrics["accuracy/shape"]["zh"] == Score(1.0, 0.25)


def test_the_flat_dict_for_a_training_log(colour_encoder, folder):
    flat = evaluate_scenes(colour_encoder.adapter.model, colour_encoder.adapter.processor, folder)
    assert flat["scenes/attribute/en/accuracy"] == pytest.approx(2.5 / 3)
    assert flat["scenes/retrieval/zh/text_to_image_R@1"] == 1.0
    assert all(type(value) is float for value in flat.values())


def test_other_splits_have_no_tasks(colour_encoder, folder):
    flat = evaluate_scenes(colour_encoder.adapter.model, colour_encoder.adapter.processor, folder, split="validation")
    assert {name.split("/")[1] for name in flat} == {"retrieval", "zero-shot"}


def test_a_limit_leaves_tasks_whose_images_are_not_embedded_yet(colour_encoder, folder):
    retrieval, _, attribute = score_scenes(colour_encoder, folder, limit=2)
    assert retrieval.counts["images"] == 2 and attribute.counts == {"questions": 2, "images": 2}
    assert attribute.metrics["accuracy"]["en"].value == 1.0


def test_mistakes_are_named(colour_encoder, folder, tmp_path):
    with pytest.raises(ValueError, match="is not a scenes folder.*training.scenes"):
        score_scenes(colour_encoder, tmp_path)
    with pytest.raises(ValueError, match=r"dev-\*.parquet; in .* there is: manifest.json, tasks, test-0"):
        score_scenes(colour_encoder, folder, split="dev")
    (folder / "tasks" / "attribute.parquet").rename(folder / "tasks" / "other.parquet")
    with pytest.raises(ValueError, match="attribute.parquet; in .* there is: other.parquet"):
        score_scenes(colour_encoder, folder)


def test_on_what_training_scenes_writes(model, processor, tmp_path):
    """The two packages agree on the folder's layout; chance levels are those of the data set's card."""
    write_scenes(tmp_path / "real", ScenesConfig(twins=2, train=1, validation=1, test=120, task_size=20, workers=1))
    findings, _ = verify(load_task("scenes"), tmp_path / "real")
    assert [finding.level for finding in findings] == ["ok"] * 5
    with pytest.raises(ValueError, match="is not a scenes folder.*python -m training.scenes"):
        verify(load_task("scenes"), tmp_path)
    flat = evaluate_scenes(model, processor, tmp_path / "real")
    assert {name.split("/")[1] for name in flat} == {
        "retrieval", "zero-shot", "attribute", "counting", "combination", "spatial",
    }  # fmt: skip
    assert all(0 <= value <= 1 for value in flat.values())
    chance = {
        benchmark.name: score["accuracy"]["zh"].chance
        for benchmark in score_scenes(Encoder(adapt(model, processor)), tmp_path / "real", limit=10)
        if "accuracy" in (score := benchmark.metrics)
    }
    assert chance == {
        "scenes/attribute": 0.5, "scenes/counting": 0.25, "scenes/combination": 0.5, "scenes/spatial": 0.5,
    }  # fmt: skip
