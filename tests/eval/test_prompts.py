"""Class names and templates come from the packages that keep them, of which nothing is run."""

from __future__ import annotations

import importlib.util
import json

import pytest

from eval.prompts import best_top1, collisions, names_of_column, read_listed
from eval.tasks import Listed, select_tasks

CODE = """
raise SystemExit("this file must not be run")
names = ["tench", 'goldfish',
         "shark"]
templates = (
    lambda c: f'a photo of a {c}.',
    lambda name: f"{name}的照片",
    "a drawing of a {}",
)
mixed = ["a", 3]
number = 3
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    folder = tmp_path / "kept_names"
    (folder / "eval").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('this package must not be imported')")
    (folder / "eval" / "names.py").write_text(CODE, encoding="utf-8")
    (folder / "names.json").write_text(json.dumps({"birds": ["鹰", "鸽"], "prompts": ["a {c}"]}), encoding="utf-8")
    (folder / "list.json").write_text("[1]")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def listed(file: str, entry: str) -> Listed:
    return Listed(package="kept_names", file=file, entry=entry)


def test_lists_lambdas_and_json_are_read_without_running_them():
    assert read_listed(listed("eval/names.py", "names")) == ("tench", "goldfish", "shark")
    assert read_listed(listed("eval/names.py", "templates")) == ("a photo of a {}.", "{}的照片", "a drawing of a {}")
    assert read_listed(listed("names.json", "birds")) == ("鹰", "鸽")
    assert read_listed(listed("names.json", "prompts")) == ("a {}",)


def test_names_in_a_file_beside_the_data(tmp_path):
    (tmp_path / "label_cn.txt").write_text("丁鲷\n金鱼\n\n", encoding="utf-8")
    assert read_listed(Listed(data_file="label_cn.txt"), tmp_path) == ("丁鲷", "金鱼")
    with pytest.raises(ValueError, match="no.txt comes with the data: name their folder with --data"):
        read_listed(Listed(data_file="no.txt"))
    with pytest.raises(ValueError, match="No readable file of class names or templates at .*no.txt"):
        read_listed(Listed(data_file="no.txt"), tmp_path)


@pytest.mark.parametrize(
    ("file", "entry", "message"),
    [
        ("eval/names.py", "mixed", "mixed in .*names.py is not a list of strings: another version of kept_names"),
        ("eval/names.py", "number", "is not a list of strings"),
        ("eval/names.py", "absent", "absent in .* is not a list of strings"),
        ("names.json", "absent", "is not a list of strings"),
        ("list.json", "a", "list.json is not a JSON object"),
        ("no.py", "a", "No readable file of class names or templates at .*no.py"),
    ],
)
def test_what_is_not_there_is_named(file, entry, message):
    with pytest.raises(ValueError, match=message):
        read_listed(listed(file, entry))


def test_an_absent_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package, command in (("open_clip", "--no-deps open_clip_torch"), ("cn_clip", "--no-deps cn_clip")):
        with pytest.raises(ValueError, match=f"package {package}, which is not installed: pip install {command}"):
            read_listed(Listed(package=package, file="a.py", entry="x"))


@pytest.mark.parametrize("name", ["imagenet", "imagenet-cn", "imagenet-cn-wukong"])
def test_the_packages_that_task_files_name_hold_what_they_say(name):
    """1,000 names, and 80 or 183 templates (evaluation.md counted them in the wheels)."""
    (task,) = select_tasks([name])
    for language, texts in task.classes.items():
        if importlib.util.find_spec(texts.templates.package) is None:
            pytest.skip(f"needs the package {texts.templates.package}: its lists are not copied into the project")
        assert len(read_listed(texts.templates)) == {"imagenet-cn": 183}.get(name, 80)
        if texts.names.package:
            names = read_listed(texts.names)
            assert len(names) == 1000
            shared = {"en": {"missile": [657, 744], "sunglasses": [836, 837]}, "zh": {"太阳镜": [836, 837]}}
            assert collisions(dict(enumerate(names))) == shared[language]


def test_names_that_classes_share_cap_the_accuracy():
    names = {0: "cat", 1: "dog", 2: "cat"}
    assert collisions(names) == {"cat": [0, 2]}
    assert best_top1(names, [0, 1, 1, 2]) == pytest.approx((0.5 + 1 + 1 + 0.5) / 4)


def test_rows_that_disagree_on_a_name_are_named():
    assert names_of_column([3, 5, 3], ["a", "b", "a"], str) == {3: "a", 5: "b"}
    with pytest.raises(ValueError, match="row 2 calls label 3 'c', an earlier row 'a'"):
        names_of_column([3, 5, 3], ["a", "b", "c"], lambda row: f"row {row}")
