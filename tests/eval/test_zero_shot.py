"""Zero-shot classification by hand."""

from __future__ import annotations

import pytest
import torch

from eval.results import Score
from eval.tasks import ClassTexts, Columns, Data, Listed, Task
from eval.zero_shot import class_embeddings, limited_labelled, read_labelled, zero_shot_benchmark

EN = ClassTexts(("red", "green", "blue"), ("{}", "some {} and green"))
ZH = ClassTexts({0: "红色", 1: "绿色", 2: "红色"}, ("{}",))


def task(label: str = "label", image_id: str | None = None, **classes: ClassTexts) -> Task:
    columns = Columns(label=label, image_id=image_id)
    return Task(
        "photos", "Photos", "classification", "p", Data("parquet"), columns, classes=classes or {"en": EN, "zh": ZH}
    )


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts(colour_encoder):
    # "red" is (1, 0, 0) and "red red green" is (2, 1, 0) / sqrt 5: the length of a prompt must not weigh.
    (embed,) = class_embeddings(colour_encoder, ["red"], ["{}", "{} {} green"])
    expected = torch.tensor([1 + 2 / 5**0.5, 1 / 5**0.5, 0])
    assert torch.allclose(embed, expected / expected.norm(), atol=1e-6)


def test_accuracy_by_hand(colour_encoder, write):
    file = write("photos.parquet", ["red", "green", "blue", "red"], label=[0, 1, 2, 1])
    result = zero_shot_benchmark("photos", colour_encoder, read_labelled(task(), file))
    assert result.counts == {"images": 4, "classes": 3}
    assert result.metrics["top-1"]["en"] == Score(0.75, pytest.approx(1 / 3))
    # 红色 names classes 0 and 2: the red image shares the hit; the blue one scores 0 with all three; the last is wrong.
    assert result.metrics["top-1"]["zh"] == Score(pytest.approx((0.5 + 1 + 1 / 3 + 0) / 4), pytest.approx(1 / 3))
    assert result.metrics["top-5"]["en"] == Score(1.0, 1.0)
    # A perfect model gets the images of classes 0 and 2 by a coin: (1/2 + 1 + 1/2 + 1) / 4.
    assert result.notes == {"zh names of several classes": "红色 (0/2): top-1 is at most 75.00 %"}
    assert result.details["classes"]["en"] == [
        {"label": 0, "name": "red", "images": 1, "top-1": 1.0},
        {"label": 1, "name": "green", "images": 2, "top-1": 0.5},
        {"label": 2, "name": "blue", "images": 1, "top-1": 1.0},
    ]
    document = result.as_json()
    assert document["metrics"]["top-1"]["en"]["low"] <= 0.75 <= document["metrics"]["top-1"]["en"]["high"]
    assert document["gap_zh_en"]["top-1"]["value"] == pytest.approx((0.5 + 1 + 1 / 3) / 4 - 0.75)


def test_names_from_a_column_or_a_file_and_a_limit_that_keeps_all_classes(colour_encoder, write, tmp_path):
    file = write(
        "p.parquet", ["red", "green", "blue"], wnid=[7, 9, 400], name=["red", "green", "blue"], key=list("abc")
    )
    by_column = task("wnid", "key", en=ClassTexts(Listed(column="name"), ("{}",)))
    part = limited_labelled(read_labelled(by_column, file), 1)
    result = zero_shot_benchmark("p", colour_encoder, part)
    assert result.counts == {"images": 1, "classes": 3} and part.image_ids == ("a",)
    assert result.metrics["top-1"]["en"] == Score(1.0, pytest.approx(1 / 3))
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    file = write("q.parquet", ["red"], label=[0])
    by_file = read_labelled(task(en=ClassTexts(Listed(data_file="names.txt"), ("{}",))), file)
    assert by_file.classes["en"].names == {0: "red", 1: "green", 2: "blue"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (task(en=ClassTexts(("red",), ("{}",))), r"photos has labels without a name: \[1\] \(named: 1 labels\)"),
        (task("class", en=EN), "No column 'class' in .*its columns are: image, label, name, names"),
        (task("name", en=EN), "Column 'name' of .* must hold integers, not e.g. 'red'"),
        (task(en=ClassTexts(Listed(column="name"), ("{}",))), "row 2 of .* calls label 1 'blue', .* 'green'"),
        (task(en=ClassTexts(Listed(column="names"), ("{}",))), r"Column 'names' of .* class names, not e.g. \['red'\]"),
        (task(en=ClassTexts(("a", "b"), ("{}",)), zh=EN), r"name the same labels; en differs from the first in \[2\]"),
    ],
)
def test_mistakes_are_named(colour_encoder, write, given, message):
    names = ["red", "green", "blue"]
    file = write("p.parquet", names, label=[0, 1, 1], name=names, names=[[name] for name in names])
    with pytest.raises(ValueError, match=message):
        read_labelled(given, file)
