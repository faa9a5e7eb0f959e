"""Task files: those that are shipped are sound, and a mistake in one is named by file and entry."""

from __future__ import annotations

import re

import pytest

from eval.tasks import Listed, load_task, select_tasks, task_files, task_names

VALID = """
name: mine
title: Mine
kind: retrieval
protocol: mine/all/any-hit/text-equal/fp32
data: {format: parquet}
columns: {captions: {en: text}}
"""
CLASSES = """
name: mine
title: Mine
kind: classification
protocol: p
data: {format: parquet}
columns: {label: label}
classes: {en: {names: [cat, dog], templates: ["a {}"]}}
"""


@pytest.fixture
def write_task(tmp_path):
    def write(text: str):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "mine.yaml"

    return write


def test_every_benchmark_of_the_paper_has_a_file():
    tasks = {task.name: task for task in select_tasks(["all"])}
    assert {
        "imagenet", "imagenet-cn", "flickr30k", "flickr30k-m2paper", "coco", "coco-25k", "flickr30k-cn", "coco-cn",
        "xm3600", "flickr8k-cn", "coco-mcc", "coco-count", "vg-pos", "hoi-pos", "cub", "dogs", "cars", "scenes",
    } <= set(tasks)  # fmt: skip
    assert tasks["coco"].expected.texts == {"en": 25010} and tasks["coco-25k"].expected.texts == {"en": 25000}
    assert tasks["flickr30k"].captions_per_image is None and tasks["flickr30k-m2paper"].captions_per_image == 1
    assert tasks["coco-cn"].expected.texts == {"zh": 1053}
    assert all(
        tasks[name].paired and tasks[name].languages == ("zh", "en") for name in ("xm3600", "flickr8k-cn", "cub")
    )


@pytest.mark.parametrize("task", select_tasks(["all"]), ids=lambda task: task.name)
def test_shipped_files_say_what_their_numbers_rest_on(task):
    protocols = [other.protocol for other in select_tasks(["all"])]
    assert protocols.count(task.protocol) == 1, "a protocol id names one protocol"
    assert task.protocol.endswith("/fp32")
    assert task.data.id or task.data.obtain, "where do the data come from?"
    for entry in task.published:
        assert entry.source and 0 < entry.value <= 100 and entry.language in task.languages
        assert re.fullmatch(r"(text_to_image|image_to_text)_(R@\d+|mean_recall)|mean_recall|top-[15]", entry.metric)


def test_a_file_by_its_path(write_task):
    task = load_task(write_task(VALID))
    assert (task.name, task.columns.captions, task.columns.image, task.paired) == (
        "mine",
        {"en": "text"},
        "image",
        False,
    )
    names = load_task(write_task(CLASSES.replace("[cat, dog]", "{3: cat, 7: dog}"))).classes["en"].names
    assert names == {3: "cat", 7: "dog"}
    listed = load_task(write_task(CLASSES.replace("[cat, dog]", "{column: name}"))).classes["en"].names
    assert listed == Listed(column="name")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Mine", "tilte: Mine", r"mine.yaml: unknown entry tilte. Did you mean title\? Known are: name, title"),
        ("title: Mine\n", "", "mine.yaml: the entry title is missing"),
        ("title: Mine", "title: 7", "mine.yaml: title must be a string, not 7"),
        ("kind: retrieval", "kind: search", "mine.yaml: kind must be one of retrieval, .* not 'search'"),
        ("{format: parquet}", "{format: parquet, revison: x}", "data: unknown entry revison. Did you mean revision"),
        ("{format: parquet}", "{format: parquet, revision: main}", r"data.revision must be a full commit \(40 hex"),
        ("{format: parquet}", "{format: csv}", "data.format must be one of parquet, webdataset"),
        ("{format: parquet}", "{}", "data: the entry format is missing"),
        ("{format: parquet}", "parquet", "data must be a mapping, not 'parquet'"),
        ("{format: parquet}", "{format: parquet, files: 3}", "data.files must be a string or a mapping, not 3"),
        ("{format: parquet}", "{format: parquet, files: {zh: a}}", "data.files per language needs the languages of"),
        ("{captions: {en: text}}", "{captions: {en: [text]}}", r"columns.captions.en must be a string, not \['text'\]"),
        ("{captions: {en: text}}", "{}", "a retrieval task needs columns.captions"),
        ("title: Mine", "title: Mine\nexpected: {images: many}", "expected.images must be a whole number or null"),
        ("title: Mine", "title: Mine\npaired: 1", "paired must be true or false, not 1"),
        ("title: Mine", "title: Mine\ncaptions_per_image: 0", "captions_per_image must be at least 1"),
        ("title: Mine", "title: Mine\npublished: [{system: x}]", r"published\[0\]: the entry language is missing"),
        ("name: mine", "name: other", "name must be the file's own, 'mine', not 'other'"),
        ("kind: retrieval", "kind: scenes", "a scenes task needs data.format: scenes"),
        ("name: mine", "name: [", "mine.yaml is not a readable YAML file"),
        (VALID, "- a list", r"mine.yaml must be a mapping, not \['a list'\]"),
    ],
)
def test_mistakes_are_named_by_file_and_entry(write_task, old, new, message):
    assert old in VALID
    with pytest.raises(ValueError, match=message):
        load_task(write_task(VALID.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("columns: {label: label}\n", "", "a classification task needs columns.label"),
        ("[cat, dog]", "[cat, 3]", r"classes.en.names\[1\] must be a string, not 3"),
        ("[cat, dog]", "[cat, ' ']", "classes.en.names must hold at least one string, none of them blank"),
        ("[cat, dog]", "cat", "classes.en.names must be a list or a mapping or a mapping, not 'cat'"),
        ("[cat, dog]", "{column: a, data_file: b}", "classes.en.names must name one of column, data_file and package"),
        ("[cat, dog]", "{package: open_clip}", "package, file and entry belong together"),
        ('["a {}"]', "[a cat]", r"templates need a \{\} where the name stands"),
        ('["a {}"]', "{column: a}", "templates cannot come from a column"),
    ],
)
def test_mistakes_in_classes_are_named(write_task, old, new, message):
    assert old in CLASSES
    with pytest.raises(ValueError, match=message):
        load_task(write_task(CLASSES.replace(old, new)))


def test_an_unknown_task_is_named_beside_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown task 'flickr30'. Did you mean flickr30k\? Known are: cars, coco"):
        select_tasks(["flickr30"])
    with pytest.raises(ValueError, match="No task file at .*none.yaml"):
        load_task(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="Name at least one task"):
        select_tasks([])


def test_tasks_are_chosen_once_and_in_order(write_task, tmp_path):
    assert [task.name for task in select_tasks(["xm3600", "coco", "xm3600"])] == ["xm3600", "coco"]
    assert len(task_files(["all"])) == len(task_names())
    first = write_task(VALID)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.yaml").write_text(VALID)
    with pytest.raises(ValueError, match="Two tasks are called 'mine'"):
        select_tasks([first, tmp_path / "b" / "mine.yaml"])
