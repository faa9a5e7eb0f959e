"""Retrieval by hand: four images of one colour each, and captions that name it."""

from __future__ import annotations

import pytest

from eval.data import open_table
from eval.results import Score
from eval.retrieval import (
    Captioned,
    evaluate_retrieval,
    limited,
    read_captioned,
    retrieval_benchmark,
    score_retrieval,
)
from eval.stats import bootstrap, paired_bootstrap
from eval.tasks import Columns, Data, Task

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
    # 红色 stands with the red and the blue image: either is right for both of its texts, and chance is 2/4 there.
    assert result.metrics["text_to_image_R@1"]["zh"] == Score(1.0, pytest.approx((2 + 1 + 2 + 1) / 16))
    # The blue image scores 0 with both 红色 and with 绿色, below 红色绿色蓝色; the other three find a right text.
    assert result.metrics["image_to_text_R@1"]["zh"] == Score(0.75, pytest.approx((2 + 1 + 2 + 1) / 16))
    assert result.metrics["text_to_image_R@5"]["zh"] == Score(1.0, 1.0)
    assert result.metrics["image_to_text_mean_recall"]["zh"].value == pytest.approx((0.75 + 1 + 1) / 3)
    assert result.notes == {"zh queries with ties": 1}


def test_a_text_may_be_right_for_its_own_image_only(colour_encoder, file):
    """The owner protocol: the blue image's 红色 is wrong for the red image, which has two equal answers."""
    table = open_table([file])
    data = Captioned(table, "image", {"zh": [list(own) for own in ZH]})
    result = retrieval_benchmark("x", colour_encoder, data, positives="owner")
    assert result.metrics["text_to_image_R@1"]["zh"] == Score(0.75, 0.25)
    assert result.metrics["image_to_text_R@1"]["zh"] == Score((0.5 + 1 + 0 + 1) / 4, pytest.approx(0.25))
    assert result.notes == {"zh queries with ties": 3}


def test_a_gallery_merges_equal_texts_and_holds_texts_of_no_image(colour_encoder, file):
    data = Captioned(open_table([file]), "image", {"zh": [list(own) for own in ZH]}, ("a", "b", "c", "d"))
    gallery = {"zh": ["红色", "绿色", "红色绿色蓝色", "蓝色"]}
    result = retrieval_benchmark("x", colour_encoder, data, gallery=gallery)
    assert result.counts == {"images": 4, "zh texts": 4}
    # Three queries (蓝色 is nobody's), of which 红色 has two right images.
    assert result.metrics["text_to_image_R@1"]["zh"] == Score(1.0, pytest.approx((2 + 1 + 1) / 12))
    # The blue image finds 蓝色, which is wrong for it.
    assert result.metrics["image_to_text_R@1"]["zh"] == Score(0.75, 0.25)
    # With so few images a resample may hold none that a text is drawn with: no interval, and a note.
    document = result.as_json()
    assert "low" not in document["metrics"]["mean_recall"]["zh"]
    assert "only 3 of 4 images ask one" in document["notes"]["no zh intervals"]


def test_intervals_and_the_paired_gap_are_those_of_the_statistics(colour_encoder, file):
    result = score_retrieval(colour_encoder, [file], captions={"en": "en", "zh": "zh"})
    document = result.as_json()
    zh, en = result.samples["zh"][-1], result.samples["en"][-1]
    for name, interval in bootstrap(zh).items():
        score = document["metrics"][name]["zh"]
        assert (score["value"], score["low"], score["high"]) == pytest.approx(
            (interval.value, interval.low, interval.high)
        )
    gap = paired_bootstrap(zh, en)["image_to_text_R@1"]
    assert document["gap_zh_en"]["image_to_text_R@1"] == {
        "value": pytest.approx(-0.25), "low": gap.low, "high": gap.high, "p_value": gap.p_value,
    }  # fmt: skip
    assert set(document["gap_zh_en"]) == set(document["metrics"])


def test_languages_in_files_of_their_own_are_joined_by_image(colour_encoder, write, tmp_path):
    """As XM3600 has them: the rows of the two languages stand in different orders."""
    write("d/en-0.parquet", ["red", "green", "blue"], image_id=["r", "g", "b"], captions=[["red"], ["green"], ["blue"]])
    write("d/zh-0.parquet", ["blue", "red", "green"], image_id=["b", "r", "g"], captions=[["蓝色"], ["红色"], ["绿色"]])
    task = Task(
        "x", "X", "retrieval", "p", Data("parquet", {"zh": "zh-*.parquet", "en": "en-*.parquet"}),
        Columns(captions={"zh": "captions", "en": "captions"}, image_id="image_id"), paired=True,
    )  # fmt: skip
    data = read_captioned(task, tmp_path / "d")
    assert data.image_ids == ("b", "r", "g")  # of zh, the first language
    assert data.captions == {"zh": [["蓝色"], ["红色"], ["绿色"]], "en": [["blue"], ["red"], ["green"]]}
    assert retrieval_benchmark("x", colour_encoder, data).metrics["mean_recall"]["en"].value == 1.0
    write(
        "d/en-0.parquet", ["red", "green", "white"], image_id=["r", "g", "w"], captions=[["red"], ["green"], ["blue"]]
    )
    with pytest.raises(ValueError, match=r"x is paired, but en has no row for 1 of 3 images \(b\) and 1 rows of other"):
        read_captioned(task, tmp_path / "d")


def test_captions_are_cut_parted_and_limited_as_the_task_says(write, tmp_path):
    file = write("a.parquet", ["red"] * 4, txt=["a\nb\nc", "d\n\ne", "f", "g"], image_id=list("pqrs"))
    columns = Columns(captions={"en": "txt"}, caption_separator="\n", image_id="image_id")
    task = Task("x", "X", "retrieval", "p", Data("parquet"), columns, captions_per_image=2)
    data = read_captioned(task, file)
    assert data.captions == {"en": [["a", "b"], ["d", "e"], ["f"], ["g"]]}
    half = limited(data, 2)
    assert half.captions == {"en": [["a", "b"], ["f"]]} and half.image_ids == ("p", "r") and len(half.table) == 2
    assert limited(data, 9) is data
    write("twice.parquet", ["red"] * 2, txt=["a", "b"], image_id=["p", "p"])
    with pytest.raises(ValueError, match="image 'p' stands in 2 rows of column 'image_id'"):
        read_captioned(task, tmp_path / "twice.parquet")


def test_the_flat_dict_for_a_training_log(colour_encoder, file):
    model, processor = colour_encoder.adapter.model, colour_encoder.adapter.processor
    flat = evaluate_retrieval(model, processor, [file], captions={"zh": "zh"}, batch_size=3)
    assert len(flat) == 9 and all(type(value) is float for value in flat.values())
    assert flat["colours/zh/image_to_text_R@1"] == 0.75


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
