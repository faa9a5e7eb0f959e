"""Cosines of right and wrong pairs: which pairs are which, and what a threshold costs, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from benchmarks.pair_cosines import Cosines, main, measure, quantiles, thresholds
from modeling_m2encoder.hub_folder import save_hub_folder


def test_a_threshold_is_a_quantile_of_the_wrong_pairs_and_its_cost_is_counted_elsewhere():
    chosen = Cosines(torch.tensor([0.9]), torch.arange(1001) / 1000)  # wrong: 0.000, 0.001, ... 1.000
    tried = Cosines(torch.tensor([0.94, 0.96, 0.98, 0.995]), torch.tensor([0.5, 0.955, 0.5, 0.5]))
    found = thresholds(chosen, tried)
    assert [one["asked"] for one in found] == [0.05, 0.01, 0.001]
    assert [one["threshold"] for one in found] == pytest.approx([0.95, 0.99, 0.999])
    assert [one["right"] for one in found] == [0.75, 0.25, 0.0]
    assert [one["wrong"] for one in found] == [0.25, 0.0, 0.0]


def test_quantiles_are_values_that_occur():
    values = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert quantiles(values, [0, 0.25, 0.5, 1]) == [1.0, 2.0, 3.0, 5.0]


@pytest.fixture
def photos(images, tmp_path):
    """Four pictures; the second and third share a caption, the last has two in English and none in Chinese."""
    rows = {
        "image": images[:4],
        "en": [["a red circle"], ["a star"], ["a star"], ["two stars", "a blue square"]],
        "zh": [["红色的圆"], ["星星"], ["方块"], []],
    }
    texts = List(Value("string"))
    path = tmp_path / "photos" / "val.parquet"
    path.parent.mkdir()
    Dataset.from_dict(rows, features=Features({"image": Image(), "en": texts, "zh": texts})).to_parquet(path)
    return path


def test_every_image_makes_a_wrong_pair_with_every_text_that_is_none_of_its_own(model, processor, photos, tmp_path):
    folder = save_hub_folder(model, processor, tmp_path / "model")
    document = measure(str(folder), [str(photos)], captions={"en": "en", "zh": "zh"})
    en, zh = document["languages"]["en"], document["languages"]["zh"]
    # 5 texts x 4 images; "a star" twice is right for two images each time.
    assert (en["right_pairs"], en["wrong_pairs"]) == (7, 13)
    assert (zh["right_pairs"], zh["wrong_pairs"]) == (3, 9)
    assert measure(str(folder), [str(photos)], captions={"en": "en"}, first=1)["languages"]["en"]["right_pairs"] == 6
    assert document["data"] == "photos/val.parquet" and document["held_out"] is None
    assert all(-1 - 1e-6 <= value <= 1 + 1e-6 for own in (en, zh) for kind in ("right", "wrong") for value in own[kind])

    with torch.no_grad():
        inputs = processor(text=["红色的圆", "星星", "方块"], return_tensors="pt", padding=True)
        texts = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output)
        table = Dataset.from_parquet(str(photos))
        pixels = processor(images=[row["image"] for row in table], return_tensors="pt")
        pictures = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output)
    scores = texts @ pictures.T
    right = sorted(scores.diagonal().tolist())
    assert math.isclose(zh["right"][3], right[1], abs_tol=1e-5)  # the median
    wrong = sorted(scores[~torch.eye(3, 4, dtype=torch.bool)].tolist())
    assert math.isclose(zh["wrong"][3], wrong[4], abs_tol=1e-5)


def test_the_command_writes_what_the_card_reads_or_one_line(model, processor, photos, tmp_path, capsys):
    folder = save_hub_folder(model, processor, tmp_path / "model")
    options = ["--model", str(folder), "--data", str(photos), "--output", str(tmp_path / "c.json")]
    main([*options, "--captions", "en=en"])
    assert "en: a threshold of " in capsys.readouterr().out
    assert list(json.loads((tmp_path / "c.json").read_text())["languages"]) == ["en"]
    for captions in (["en"], ["en=nothing"]):
        with pytest.raises(SystemExit, match="error: .*"):
            main([*options, "--captions", *captions])
