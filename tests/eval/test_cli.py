"""`python -m eval` on a tiny random model: one table, one file, and one line for a mistake."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from eval.__main__ import main, parse_captions


@pytest.fixture
def photos(write):
    names = ["red", "green", "blue"] * 4
    return write("photos.parquet", names, en=names, zh=[[name, name + " 色"] for name in names], label=[0, 1, 2] * 4)


@pytest.fixture
def classes(tmp_path):
    (tmp_path / "classes.yaml").write_text("languages: {en: {names: [red, green, blue], templates: ['a {}']}}")
    return tmp_path / "classes.yaml"


def test_run(checkpoint, photos, classes, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [
        "run",
        "--model",
        checkpoint,
        "--output",
        output,
        "--retrieval",
        photos,
        "--captions",
        "en=en",
        "zh=zh",
    ]
    arguments += ["--zero-shot", photos, "--classes", classes, "--batch-size", "5"]
    main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    assert "photos " in printed and "text to image R@10" in printed and "photos/zero-shot" in printed
    document = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert document["model"]["class"] == "M2EncoderModel"
    retrieval, zero_shot = document["benchmarks"]
    assert retrieval["counts"] == {"images": 12, "en texts": 12, "zh texts": 24}
    assert retrieval["metrics"]["text_to_image_R@5"]["zh"]["chance"] == pytest.approx(5 / 12)
    assert zero_shot["metrics"]["top-1"]["en"]["chance"] == pytest.approx(1 / 3)


def test_picture(checkpoint, photos, tmp_path):
    output = tmp_path / "found.png"
    arguments = ["picture", "--model", checkpoint, "--data", photos, "--output", output, "--query", "a star"]
    main([str(argument) for argument in [*arguments, "--query", "一颗星星", "--top", "2"]])
    assert output.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to run"),
        (
            ["--retrieval", "{photos}", "--captions", "en=english"],
            "No column 'english'.*its columns are: image, en, zh",
        ),
        (["--retrieval", "{photos}", "--captions", "english"], "LANGUAGE=COLUMN"),
        (["--retrieval", "nowhere.parquet"], "No parquet file at nowhere.parquet"),
        (["--scenes", "nowhere"], "nowhere is not a scenes folder"),
        (["--zero-shot", "{photos}"], "--zero-shot and --classes belong together"),
    ],
)
def test_a_mistake_is_one_line(checkpoint, photos, tmp_path, arguments, message):
    arguments = [argument.format(photos=photos) for argument in arguments]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["run", "--model", str(checkpoint), "--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for folder, seen in ((tmp_path, "notes.txt"), (tmp_path / "none", "no folder")):
        with pytest.raises(SystemExit, match=f"error: No checkpoint at {folder} .*{seen}"):
            main(["run", "--model", str(folder), "--output", str(tmp_path / "out"), "--scenes", "x"])


def test_captions_option():
    assert parse_captions(["en=a", "zh=b=c"]) == {"en": "a", "zh": "b=c"}
    for bad in (["en"], ["=a"], ["en="], ["en=a", "en=b"]):
        with pytest.raises(ValueError, match="LANGUAGE=COLUMN"):
            parse_captions(bad)


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval", "run", "--help"])
    monkeypatch.delitem(sys.modules, "eval.__main__")
    with pytest.raises(SystemExit) as done:
        runpy.run_module("eval", run_name="__main__")
    assert done.value.code == 0 and "--retrieval" in capsys.readouterr().out
