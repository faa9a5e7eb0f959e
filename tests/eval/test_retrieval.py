"""Retrieval by hand: four images of one colour each, and captions that name it."""

from __future__ import annotations

import pytest

from eval.results import Score
from eval.retrieval import evaluate_retrieval, score_retrieval

EN = [["a red one", "red"], ["green", "a green thing"], ["blue", "all blue"], ["red green blue", "blue green red"]]
ZH = [["红色"], ["绿色"], ["红色"], ["红色绿色蓝色"]]  # the third names the wrong colour


@pytest.fixture
def file(write):
    return write("colours.parquet", ["red", "green", "blue", "white"], en=EN, zh=ZH)


def test_scores_and_chance_by_hand(colour_encoder, file):
    result = score_retrieval(colour_encoder, [file], captions={"en": "en", "zh": "zh"})
    assert result.name == "colours" and result.files == (str(file),)
    assert result.counts == {"images": 4, "en texts": 8, "zh texts": 4}
    assert set(result.metrics["text_to_image_R@1"]) == {"en", "zh"}
    assert result.metrics["text_to_image_R@1"]["en"] == Score(1.0, 0.25)
    assert result.metrics["image_to_text_R@1"]["en"] == Score(1.0, pytest.approx(2 / 8))
    assert result.metrics["mean_recall"]["en"].value == 1.0
    # Three of four texts find their image. The red image has two equal texts above all others, one of them its own; the
    # blue one's own text scores 0, as the other 红色 and 绿色 do, below 红色绿色蓝色.
    assert result.metrics["text_to_image_R@1"]["zh"] == Score(0.75, 0.25)
    assert result.metrics["image_to_text_R@1"]["zh"] == Score((0.5 + 1 + 0 + 1) / 4, pytest.approx(0.25))
    assert result.metrics["text_to_image_R@5"]["zh"] == Score(1.0, 1.0)
    assert result.notes == {"zh queries with ties": 3}


def test_the_flat_dict_for_a_training_log(colour_encoder, file):
    model, processor = colour_encoder.adapter.model, colour_encoder.adapter.processor
    flat = evaluate_retrieval(model, processor, [file], captions={"zh": "zh"}, batch_size=3)
    assert len(flat) == 9 and all(type(value) is float for value in flat.values())
    assert flat["colours/zh/text_to_image_R@1"] == 0.75


def test_one_caption_as_a_string(colour_encoder, write):
    file = write("one.parquet", ["red", "green"], text=["red", "green"])
    result = score_retrieval(colour_encoder, [file], captions={"en": "text"})
    assert result.counts == {"images": 2, "en texts": 2} and result.metrics["mean_recall"]["en"].value == 1.0


def test_missing_captions_are_reported(colour_encoder, write):
    file = write("gap.parquet", ["red", "green", "blue"], text=[["red"], [], ["blue", "  "]])
    result = score_retrieval(colour_encoder, [file], captions={"en": "text"})
    assert result.counts == {"images": 3, "en texts": 2}
    assert result.notes == {"images without en text": 1}
    assert result.metrics["image_to_text_R@1"]["en"].value == 1.0


def test_a_limit_uses_fewer_images(colour_encoder, file):
    assert score_retrieval(colour_encoder, [file], captions={"en": "en"}, limit=2).counts["images"] == 2


def test_mistakes_are_named(colour_encoder, file, write):
    with pytest.raises(ValueError, match="No column 'caption_zh' in .*its columns are: image, en, zh"):
        score_retrieval(colour_encoder, [file], captions={"en": "en", "zh": "caption_zh"})
    with pytest.raises(ValueError, match="No column 'photo'"):
        score_retrieval(colour_encoder, [file], captions={"en": "en"}, image_column="photo")
    with pytest.raises(ValueError, match="no de caption in its 1 rows"):
        score_retrieval(colour_encoder, [write("e.parquet", ["red"], de=[" "])], captions={"de": "de"})
    with pytest.raises(ValueError, match="Name a caption column"):
        score_retrieval(colour_encoder, [file], captions={})
    assert colour_encoder.adapter.model.images_seen == 0, "mistakes must be found before anything is computed"
