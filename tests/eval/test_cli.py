"""`python -m eval`: the commands, on a tiny random model; and one line for a mistake."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import yaml

from eval.__main__ import main, parse_pairs


@pytest.fixture
def photos(write):
    names = ["red", "green", "blue"] * 4
    ids = [str(i) for i in range(12)]
    return write(
        "photos.parquet",
        names,
        en=names,
        zh=[[name, name + " 色"] for name in names],
        label=[0, 1, 2] * 4,
        image_id=ids,
    )


@pytest.fixture
def colours(tmp_path):
    """The task file of a zero-shot benchmark."""
    task = {
        "name": "colours", "title": "Colours", "kind": "classification", "protocol": "colours/p/fp32",
        "data": {"format": "parquet"}, "columns": {"label": "label"},
        "classes": {"en": {"names": ["red", "green", "blue"], "templates": ["a {}"]}},
    }  # fmt: skip
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "colours.yaml"


@pytest.fixture
def own_task(tmp_path):
    """The task file of a retrieval benchmark."""
    task = {
        "name": "mine", "title": "Mine", "kind": "retrieval", "protocol": "mine/p/fp32", "paired": True,
        "data": {"format": "parquet"}, "columns": {"captions": {"zh": "zh", "en": "en"}, "image_id": "image_id"},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "mine.yaml"


def call(*arguments) -> None:
    main([str(argument) for argument in arguments])


def test_run_on_your_own_files(checkpoint, photos, colours, tmp_path, capsys):
    output = tmp_path / "out"
    call(
        "run", "--model", checkpoint, "--output", output, "--retrieval", photos, "--captions", "en=en", "zh=zh",
        "--zero-shot", photos, "--classes", colours, "--batch-size", "5",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "## photos" in printed and "text to image R@10" in printed and "## Colours" in printed
    document = json.loads((output / "results.json").read_text(encoding="utf-8"))
    (model,) = document["models"]
    assert model["about"]["class"] == "M2EncoderModel"
    zero_shot, retrieval = (task["benchmarks"][0] for task in model["tasks"])
    assert retrieval["counts"] == {"images": 12, "en texts": 12, "zh texts": 24}
    # Each colour is shared by four images: any of them is right for its texts.
    assert retrieval["metrics"]["text_to_image_R@1"]["zh"]["chance"] == pytest.approx(4 / 12)
    assert zero_shot["metrics"]["top-1"]["en"]["chance"] == pytest.approx(1 / 3)


def test_run_report_and_compare(checkpoint, photos, own_task, tmp_path, capsys):
    output = tmp_path / "out"
    models = f"a={checkpoint},b={checkpoint}"
    arguments = ["run", "--models", models, "--tasks", own_task, "--data", f"mine={photos}", "--output", output]
    call(*arguments)
    assert capsys.readouterr().err.count("done: mine with") == 2
    call(*arguments)
    assert capsys.readouterr().err.splitlines() == ["kept: mine with a", "kept: mine with b"]
    call("report", output)
    assert (output / "plots" / "mine.png").stat().st_size > 1000
    call("compare", "a", "b", "--output", output)
    assert "a minus b, in points" in capsys.readouterr().out
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(photos.parent)
    with pytest.raises(SystemExit, match="error: 1 of 2 could not be done; the first: No checkpoint at"):
        call("run", "--models", f"b={tmp_path / 'none'},c={checkpoint}", "--tasks", own_task, "--data-dir",
             tmp_path / "data", "--limit", "6", "--output", tmp_path / "new")  # fmt: skip
    done = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [model["name"] for model in done["models"]] == ["c"] and done["failures"][0]["model"] == "b"
    assert done["models"][0]["tasks"][0]["limit"] == 6


def test_verify_records_and_then_refuses(photos, own_task, tmp_path, capsys):
    call("verify", "--tasks", own_task, "--data", f"mine={photos}", "--write")
    assert "warning: 12 images" in capsys.readouterr().out
    call("verify", "--tasks", own_task, "--data", f"mine={photos}")
    printed = capsys.readouterr().out
    assert "ok: 12 images" in printed and "warning" not in printed
    own_task.write_text(own_task.read_text().replace("images: 12", "images: 13"))
    for arguments in (("mine", photos), ("mine", tmp_path / "none.parquet")):
        with pytest.raises(SystemExit, match="1"):
            call("verify", "--tasks", own_task, "--data", "=".join(map(str, arguments)))
        assert "wrong: " in capsys.readouterr().out


def test_picture(checkpoint, photos, tmp_path):
    output = tmp_path / "found.png"
    call("picture", "--model", checkpoint, "--data", photos, "--output", output, "--query", "a star", "--query",
         "一颗星星", "--top", "2")  # fmt: skip
    assert output.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to run"),
        (["--tasks", "flickr8k"], r"Unknown task 'flickr8k'. Did you mean flickr8k-cn\?"),
        (["--tasks", "coco", "--data", "cocoo=x"], "--data names cocoo, but the tasks are coco"),
        (["--tasks", "coco", "--data", "coco"], "--data takes one TASK=PATH"),
        (["--retrieval", "{photos}", "--captions", "english"], "--captions takes one LANGUAGE=COLUMN"),
        (["--scenes", "x", "--tasks", "scenes"], "scenes is asked for twice"),
        (["--zero-shot", "{photos}"], "--zero-shot and --classes belong together"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(checkpoint, photos, tmp_path, arguments, message):
    arguments = [argument.format(photos=photos) for argument in arguments]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        call("run", "--model", checkpoint, "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_pairs():
    assert parse_pairs("--data", "TASK=PATH", ["en=a", "zh=b=c"]) == {"en": "a", "zh": "b=c"}
    for bad in (["en"], ["=a"], ["en="], ["en=a", "en=b"]):
        with pytest.raises(ValueError, match="--data takes one TASK=PATH for each name"):
            parse_pairs("--data", "TASK=PATH", bad)


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval", "run", "--help"])
    monkeypatch.delitem(sys.modules, "eval.__main__")
    with pytest.raises(SystemExit) as done:
        runpy.run_module("eval", run_name="__main__", alter_sys=True)
    assert done.value.code == 0 and "--retrieval" in capsys.readouterr().out
