"""Zero-shot classification by hand, and a class file whose mistakes are named."""

from __future__ import annotations

import pytest
import torch

from eval.results import Score
from eval.zero_shot import class_embeddings, score_zero_shot

CLASSES = """
languages:
  en: {names: [red, green, blue], templates: ["{}", "some {} and green"]}
  zh: {names: {0: 红色, 1: 绿色, 2: 红色}, templates: ["{}"]}
"""


@pytest.fixture
def classes(tmp_path):
    def write_classes(text: str = CLASSES):
        (tmp_path / "classes.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "classes.yaml"

    return write_classes


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts(colour_encoder):
    # "red" is (1, 0, 0) and "red red green" is (2, 1, 0) / sqrt 5: the length of a prompt must not weigh.
    (embed,) = class_embeddings(colour_encoder, ["red"], ["{}", "{} {} green"])
    expected = torch.tensor([1 + 2 / 5**0.5, 1 / 5**0.5, 0])
    assert torch.allclose(embed, expected / expected.norm(), atol=1e-6)


def test_accuracy_by_hand(colour_encoder, write, classes):
    file = write("photos.parquet", ["red", "green", "blue", "red"], label=[0, 1, 2, 1])
    result = score_zero_shot(colour_encoder, file, classes())
    assert result.name == "photos/zero-shot" and result.counts == {"images": 4, "classes": 3}
    assert result.metrics["top-1"]["en"] == Score(0.75, pytest.approx(1 / 3))
    # 红色 names classes 0 and 2: the red image shares the hit; the blue one scores 0 with all three; the last is wrong.
    assert result.metrics["top-1"]["zh"] == Score(pytest.approx((0.5 + 1 + 1 / 3 + 0) / 4), pytest.approx(1 / 3))
    assert result.metrics["top-5"]["en"] == Score(1.0, 1.0)
    assert result.notes == {"zh names of several classes": ["红色"]}


def test_names_from_a_column_and_a_limit_that_keeps_all_classes(colour_encoder, write, classes):
    file = write("p.parquet", ["red", "green", "blue"], wnid=[7, 9, 400], name=["red", "green", "blue"])
    text = "{label_column: wnid, languages: {en: {names_column: name, templates: ['{}']}}}"
    result = score_zero_shot(colour_encoder, file, classes(text), limit=1)
    assert result.counts == {"images": 1, "classes": 3}
    assert result.metrics["top-1"]["en"] == Score(1.0, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("languages: {en: {names: [red], templates: ['{}']}}", r"labels without a name: \[1\]"),
        ("languages: {en: {names: [red, green]}}", "`templates` must be a list"),
        ("languages: {en: {names: [red, green], templates: [a photo]}}", r"\{\} stands for the name"),
        ("languages: {en: {templates: ['{}']}}", "either `names` or `names_column`"),
        ("languages: {en: {names: [red, 3], templates: ['{}']}}", "not 1: 3"),
        ("languages: {en: {names: red, templates: ['{}']}}", "must be a list of strings or a mapping"),
        ("languages: {en: {names: [a, b], template: ['{}'], templates: ['{}']}}", "unknown entry 'template'"),
        ("languages: {en: {names_column: name, templates: ['{}']}}", "row 2 of .* calls label 1 'blue', .* 'green'"),
        ("languages: {}", "needs a mapping `languages:`"),
        ("[", "is not YAML"),
        ("{label_column: class, languages: {en: {names: [a], templates: ['{}']}}}", "No column 'class'"),
        (
            "{label_column: name, languages: {en: {names: [a], templates: ['{}']}}}",
            "must hold integers, not e.g. 'red'",
        ),
        (
            "languages: {en: {names: [a, b], templates: ['{}']}, zh: {names: [a, b, c], templates: ['{}']}}",
            r"the same labels; zh differs from the first in \[2\]",
        ),
    ],
)
def test_mistakes_are_named(colour_encoder, write, classes, text, message):
    file = write("p.parquet", ["red", "green", "blue"], label=[0, 1, 1], name=["red", "green", "blue"])
    with pytest.raises(ValueError, match=message):
        score_zero_shot(colour_encoder, file, classes(text))


def test_a_missing_class_file_is_named(colour_encoder, write, tmp_path):
    with pytest.raises(ValueError, match="No file of class names at .*no.yaml"):
        score_zero_shot(colour_encoder, write("p.parquet", ["red"], label=[0]), tmp_path / "no.yaml")
