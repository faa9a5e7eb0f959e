"""The sets that eval.build writes, scored by hand: shared texts, look-alikes, classes."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.results import Score
from eval.score import score_task, verify
from eval.tasks import ClassTexts, Columns, Data, Listed, Task

TEXTS = [("red", "红色"), ("green", "绿色"), ("blue", "蓝色"), ("green blue", "绿色蓝色")]
IMAGES = [("a", "red", [0]), ("b", "red", [0]), ("c", "green", [1]), ("d", "blue", [1, 2])]
CLASSES = {name: ClassTexts(Listed(column=f"name_{name}"), ("{}",)) for name in ("zh", "en")}


def task(classes=None) -> Task:
    columns = Columns(
        captions={"zh": "captions_zh", "en": "captions_en"}, image_id="image_id", label="label" if classes else None
    )
    data = Data("built", "test-*.parquet", obtain="python -m eval build colours")
    return Task("colours", "Colours", "fine-grained", "colours/p/fp32", data, columns, True, classes=classes or {})


@pytest.fixture
def folder(write, tmp_path):
    """Four images, three texts that somebody has and one that nobody has, two questions."""
    captions = {
        f"captions_{name}": [[TEXTS[text][column] for text in own] for _, _, own in IMAGES]
        for column, name in enumerate(("en", "zh"))
    }
    labels = [own[-1] for _, _, own in IMAGES]
    write(
        "colours/test-00000-of-00001.parquet", [colour for _, colour, _ in IMAGES], image_id=list("abcd"), **captions,
        label=labels, name_en=[TEXTS[i][0] for i in labels], name_zh=[TEXTS[i][1] for i in labels],
    )  # fmt: skip
    en, zh = zip(*TEXTS, strict=True)
    pq.write_table(
        pa.table({"text_id": [0, 1, 2, 3], "text_en": en, "text_zh": zh}), tmp_path / "colours" / "texts.parquet"
    )
    questions = {
        "image_id": ["a", "d"], "candidates_en": [["red", "green"], ["red", "blue", "green"]],
        "candidates_zh": [["绿色", "红色"], ["红色", "绿色", "绿色"]], "label": [0, 1], "factor": ["hue", "hue"],
    }  # fmt: skip
    pq.write_table(pa.table(questions), tmp_path / "colours" / "choice.parquet")
    digests = {
        name: hashlib.sha256(
            "".join(f"{text}\n" for own in captions[f"captions_{name}"] for text in own).encode()
        ).hexdigest()
        for name in ("en", "zh")
    }
    manifest = {
        "name": "colours", "counts": {"images": 4, "texts": 4, "pairs": 5, "choices": 2}, "captions_sha256": digests,
        "paper": {"images": 5, "texts": 4, "reproduced": False},
    }  # fmt: skip
    (tmp_path / "colours" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "colours"


def test_shared_texts_are_one_query_and_one_answer(colour_encoder, folder):
    retrieval, choice = score_task(task(), colour_encoder, folder)
    assert retrieval.name == "colours" and retrieval.protocol == "colours/p/fp32"
    assert retrieval.counts == {"images": 4, "zh texts": 4, "en texts": 4}
    # Queries red (2 right images), green (c, d) and blue (d); "green blue" is nobody's.
    assert retrieval.metrics["text_to_image_R@1"]["en"] == Score(1.0, pytest.approx((2 + 2 + 1) / 12))
    assert retrieval.metrics["image_to_text_R@1"]["en"] == Score(1.0, pytest.approx((1 + 1 + 1 + 2) / 16))
    assert choice.name == "colours/choice" and choice.counts == {"questions": 2, "images": 2}
    # The blue image scores 0 with all three Chinese candidates: a third. And the second row's true one is 绿色.
    assert choice.metrics["accuracy"]["en"] == Score(1.0, pytest.approx((1 / 2 + 1 / 3) / 2))
    assert choice.metrics["accuracy"]["zh"].value == pytest.approx((0 + 1 / 3) / 2)
    assert colour_encoder.adapter.model.images_seen <= 4 + 2  # one padded batch at most


def test_sets_with_classes_are_classified_too(colour_encoder, folder):
    names = [benchmark.name for benchmark in score_task(task(CLASSES), colour_encoder, folder)]
    assert names == ["colours", "colours/zero-shot", "colours/choice"]
    zero_shot = score_task(task(CLASSES), colour_encoder, folder)[1]
    assert zero_shot.counts == {"images": 4, "classes": 3} and zero_shot.metrics["top-1"]["zh"].value == 1.0


def test_a_limit_keeps_the_gallery(colour_encoder, folder):
    retrieval, choice = score_task(task(), colour_encoder, folder, limit=1)
    assert retrieval.counts == {"images": 1, "zh texts": 4, "en texts": 4} and choice.counts["questions"] == 1


def test_a_folder_is_held_against_its_manifest(colour_encoder, folder, tmp_path):
    findings, _ = verify(task(), folder)
    assert [finding.level for finding in findings] == ["ok"] * 6 + ["warning"]
    assert "the paper counts 5 images and 4 texts: not reproduced" in str(findings[-1])
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"counts": {"images": 5}}, "5 images expected, 4 seen"),
        ({"captions_sha256": {"zh": "0" * 64}}, "the zh captions have the checksum"),
        ({"name": "other"}, "holds the set 'other', not 'colours'"),
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            score_task(task(), colour_encoder, folder)
    with pytest.raises(ValueError, match="is not a built set: it has no manifest.json. Make one: python -m eval build"):
        score_task(task(), colour_encoder, tmp_path)
    with pytest.raises(ValueError, match="not on the Hub. To get them: python -m eval build"):
        score_task(task(), colour_encoder)


def test_a_set_that_was_built_without_images_is_named(colour_encoder, folder):
    file = folder / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns("image"), file)
    with pytest.raises(ValueError, match="was built without images: build it again with --sources images=FOLDER"):
        score_task(task(), colour_encoder, folder)


def test_a_question_about_an_image_that_is_not_there_is_named(colour_encoder, folder):
    questions = pq.read_table(folder / "choice.parquet").to_pydict() | {"image_id": ["a", "zz"]}
    pq.write_table(pa.table(questions), folder / "choice.parquet")
    with pytest.raises(ValueError, match="choice.parquet asks about images that are not there, e.g. 'zz'"):
        score_task(task(), colour_encoder, folder)
