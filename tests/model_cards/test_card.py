"""Model cards: what they say comes from files, what the Hub reads is valid, and what they show runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from conversion.card import main, render_card
from conversion.card_settings import CARDS, FOLDER, load_settings
from conversion.card_sources import of_these_weights
from conversion.push import push
from eval.files import write_json
from eval.fingerprints import weights_fingerprint
from eval.tasks import load_task
from modeling_m2encoder import SIZES
from modeling_m2encoder.hub_folder import save_hub_folder
from tests.hub_card_rules import validate_card
from tests.hub_double import HubDouble
from tests.snippets import blocks

REPO = "user/tiny"
SECTIONS = ["Results", "Use it", "What a score means", "Intended use", "Limits", "Bias", "Training data",
            "How to make it again", "Licence", "Citation"]  # fmt: skip


@pytest.fixture
def folder(model, processor, tmp_path) -> Path:
    return save_hub_folder(model, processor, tmp_path / "private" / "model")


def score(value: float, chance: float = 0.5) -> dict[str, float]:
    return {"value": value, "chance": chance, "low": value - 0.02, "high": value + 0.02}


def results_of(model, *, data: str | None = None, **changes) -> dict:
    """As `python -m eval run` writes it: two models on ImageNet-CN, one of which is `model`."""

    def entry(name: str, weights: str, zh: float, en: float) -> dict:
        metrics = {"top-1": {"zh": score(zh), "en": score(en)}, "top-5": {"zh": score(0.9), "en": score(0.9)}}
        benchmark = {
            "name": "imagenet-cn", "protocol": "p/fp32", "counts": {"images": 1234}, "notes": {}, "metrics": metrics,
        }  # fmt: skip
        task = {
            "name": "imagenet-cn", "title": "ImageNet-CN", "kind": "classification", "protocol": "p", "data": data,
            "split": "test", "notes": ["a note of the task"],
        }  # fmt: skip
        own = {"task": task, "revision": None, "limit": 50, "benchmarks": [benchmark], "created": "2026-11-24T00:00:00+00:00"}  # fmt: skip  # noqa: E501
        return {"name": name, "about": {"weights": weights, "dtype": "float32"}, "tasks": [own]}

    models = [
        entry("/home/somebody/other-model", "0" * 64, 0.25, 0.35),
        entry("/home/somebody/mine", weights_fingerprint(model), 0.6124, 0.4),
    ]
    return {"created": "2026-11-24T00:00:00+00:00", "models": models, "failures": [], "published": [], **changes}


def rows(readme: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if line[:2] == "| "]


# ---- Every card


@pytest.mark.parametrize("card", CARDS)
def test_every_card_is_whole_and_valid(folder, card):
    readme = render_card(folder, REPO, size=card).readme
    page = ModelCard(readme)
    assert validate_card(readme) == {"errors": [], "warnings": []}
    data = page.data.to_dict()
    assert data["language"] == ["zh", "en"] and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "zero-shot-image-classification" and "arxiv:2401.15896" in data["tags"]
    assert re.findall(r"^## (.*)$", page.text, re.MULTILINE) == SECTIONS
    assert not re.search(r"\{[{%#]|None|Undefined|\bnan\b", page.text)
    assert readme == render_card(folder, REPO, size=card).readme
    first_screen = page.text.split("\n## ")[0]
    assert f'name = "{REPO}"' in first_screen and len(first_screen.splitlines()) < 30
    if card != "trained":
        labels = [example["candidate_labels"] for example in data["widget"]]
        assert any(re.search("[\u4e00-\u9fff]", one) for one in labels) and any(one.isascii() for one in labels)


def test_no_result_is_typed_into_the_template():
    text = (FOLDER / "template.md").read_text(encoding="utf-8")
    text = text.replace("BM-6B", "")
    outside = re.sub(r"```.*?```|`[^`]*`|\{[{%#].*?[}%#]\}", "", text, flags=re.DOTALL)
    assert set(re.findall(r"\d[\d.,]*\d|\d", outside)) == {"95", "1"}  # of "the 95 % interval", "-1 and 1"


@pytest.mark.parametrize("card", ["0.4B", "1B", "10B"])
def test_a_published_size_shows_the_paper_s_numbers_as_the_paper_s(folder, card):
    settings = load_settings(card)
    page = render_card(folder, REPO, size=card)
    table = [row for row in rows(page.readme) if row[-1].startswith("arXiv") or row[-1] == "not measured here"]
    published = [
        (task.title, entry)
        for task in map(load_task, ("cub", "flickr30k-m2paper", "imagenet", "imagenet-cn", "coco"))
        for entry in task.published
        if entry.system == settings.system
    ]
    assert published
    for title, entry in published:
        column = 3 if entry.language == "zh" else 4
        own = [row for row in rows(page.readme) if row[0] == title and row[1] == entry.metric.replace("_", " ")]
        if entry.metric.endswith(("R@5", "R@10")):  # details: in the metadata alone
            assert not own
            continue
        assert own[0][2:3] + own[0][column : column + 1] == [settings.name, f"{entry.value:.1f}"]
        assert own[0][6] == entry.source and own[1][2] == settings.name and own[1][column] == "not measured here"
        assert all(row[2] != settings.name for row in own[2:])
    assert table and ["in-house", "zh", "no", "680 million", "none"] in rows(page.readme)
    assert "Apache-2.0" in page.readme and "CC-BY-4.0" in page.readme
    index = ModelCard(page.readme).data.eval_results
    assert {(one.metric_value, one.source_name) for one in index} == {(e.value, e.source) for _, e in published}
    assert all("published, not measured here" in one.metric_name for one in index)
    entries = [one for text in page.eval_results.values() for one in parse_eval_result_entries(yaml.safe_load(text))]
    assert all("published" in one.notes and one.source_url for one in entries)
    with_data = [e for t, e in published if t in ("Flickr30K, one caption", "COCO Captions", "ImageNet")]
    assert card != "0.4B" or [one.value for one in entries] == [e.value for e in with_data]


# ---- Results


def test_measured_numbers_come_from_results_json(folder, model, tmp_path):
    write_json(tmp_path / "results.json", results_of(model, data="org/imagenet-cn"))
    page = render_card(folder, REPO, size="10B", results=tmp_path / "results.json")
    own = [row for row in rows(page.readme) if row[0] == "ImageNet-CN"]
    assert own[:3] == [
        ["ImageNet-CN", "top-1", "M2-Encoder-10B", "80.7", "", "", "arXiv 2401.15896, abstract"],
        ["ImageNet-CN", "top-1", "M2-Encoder-10B", "61.2 [59.2, 63.2]", "40.0 [38.0, 42.0]", "50.0", "measured here"],
        ["ImageNet-CN", "top-1", "other-model", "25.0 [23.0, 27.0]", "35.0 [33.0, 37.0]", "50.0", "measured here"],
    ]
    assert "a note of the task" in page.readme and "only 50 rows were used" in page.readme
    assert "1,234 images" in page.readme
    assert "/home/somebody" not in page.readme and str(tmp_path) not in page.readme
    measured = [one for one in ModelCard(page.readme).data.eval_results if "not measured" not in one.metric_name]
    assert {(one.metric_type, one.metric_value) for one in measured} == {("accuracy", 61.24), ("accuracy", 40.0), ("accuracy", 90.0)}  # fmt: skip  # noqa: E501
    entries = parse_eval_result_entries(yaml.safe_load(page.eval_results[".eval_results/imagenet-cn.yaml"]))
    assert {one.value for one in entries} == {61.24, 40.0, 90.0}
    assert all(one.dataset_id == "org/imagenet-cn" for one in entries)


def test_benchmarks_of_one_data_set_stay_apart_in_model_index(folder, model, tmp_path):
    document = results_of(model)
    task = document["models"][1]["tasks"][0]
    task["task"] = {**task["task"], "name": "scenes", "title": "Scenes", "kind": "scenes"}
    (benchmark,) = task["benchmarks"]
    task["benchmarks"] = [
        {**benchmark, "name": f"scenes/{name}", "metrics": {"accuracy": {"zh": score(value), "en": score(value)}}}
        for name, value in (("counting", 0.25), ("spatial", 0.75))
    ]
    write_json(tmp_path / "results.json", document)
    page = ModelCard(render_card(folder, REPO, size="nano", results=tmp_path / "results.json").readme)
    seen = {(one.dataset_name, one.metric_name): one.metric_value for one in page.data.eval_results}
    assert seen == {
        (f"Scenes ({language})", f"scenes/{name} accuracy ({language})"): value
        for language in ("zh", "en")
        for name, value in (("counting", 25.0), ("spatial", 75.0))
    }
    assert page.data.metrics == ["accuracy"]


def test_results_of_other_weights_are_refused(folder, model, tmp_path):
    write_json(tmp_path / "results.json", results_of(model))
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] + 0.1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="measured with other weights"):
        render_card(folder, REPO, size="nano", results=tmp_path / "results.json")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["5GB", "100KB"])
def test_files_have_the_fingerprint_of_the_model_they_load_as(model, processor, tmp_path, stored, shards):
    folder = save_hub_folder(model.to(stored), processor, tmp_path / "m", max_shard_size=shards)
    loaded = AutoModel.from_pretrained(folder, dtype=torch.float32)
    one = {"about": {"weights": weights_fingerprint(loaded), "dtype": "float32"}}
    assert of_these_weights(folder, [one], "x") is one


def test_results_that_lack_an_entry_name_it(folder, model, tmp_path):
    path = tmp_path / "results.json"

    def refused(document, message):
        write_json(path, document)
        with pytest.raises(ValueError, match=message):
            render_card(folder, REPO, size="nano", results=path)

    refused([], "has no models")
    refused(results_of(model, models=[]), "has no models")
    for keys, message in (
        (("about",), r"models\[1\] lacks the entry 'about'"),
        (("about", "weights"), "about lacks the entry 'weights'"),
        (("tasks", 0, "task", "title"), "lacks the entry 'title'"),
        (("tasks", 0, "benchmarks", 0, "metrics", "top-1", "zh", "chance"), "zh lacks the entry 'chance'"),
    ):
        document = results_of(model)
        inner = document["models"][1]
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        refused(document, message)
    document = results_of(model)
    document["models"][1]["tasks"][0]["benchmarks"][0]["metrics"]["top-1"]["zh"]["value"] = "good"
    refused(document, "zh.value must be a number, not 'good'")
    path.write_text("{")
    with pytest.raises(ValueError, match="not a readable JSON file"):
        render_card(folder, REPO, size="nano", results=path)


def test_thresholds_come_from_measured_pairs(folder, model, tmp_path):
    path = tmp_path / "cosines.json"
    pairs = {
        "right_pairs": 1000, "wrong_pairs": 5000, "right": [0.5, 0.75], "wrong": [-0.25, 0.125],
        "thresholds": [{"asked": 0.01, "threshold": 0.375, "wrong": 0.011, "right": 0.987}],
    }  # fmt: skip
    document = {
        "about": {"weights": weights_fingerprint(model), "dtype": "float32"}, "data": "photos/val.parquet",
        "held_out": None, "quantiles": [0.05, 0.95], "languages": {"zh": pairs, "en": pairs},
    }  # fmt: skip
    write_json(path, document)
    readme = render_card(folder, REPO, size="nano", cosines=path).readme
    assert ["zh", "0.38", "1.1 %", "98.7 %"] in rows(readme)
    assert ["right pairs, en", "0.50", "0.75"] in rows(readme) and "photos/val.parquet" in readme
    assert "recommends no threshold" in render_card(folder, REPO, size="nano").readme
    write_json(path, {**document, "about": {"weights": "0" * 64, "dtype": "float32"}})
    with pytest.raises(ValueError, match="other weights"):
        render_card(folder, REPO, size="nano", cosines=path)
    write_json(path, {**document, "languages": {"zh": {**pairs, "thresholds": None}}})
    with pytest.raises(ValueError, match="zh.thresholds must be a list"):
        render_card(folder, REPO, size="nano", cosines=path)


# ---- Which card, and what it was trained on


def config_of(size: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SIZES[size], "max_text_length": 52}))


def record(folder: Path, **values) -> None:
    """The config.json that a training leaves beside its model."""
    run = {
        "data": {"files": [str(folder.parent / "scenes" / "train-*.parquet")]}, "steps": 1300, "batch_size": 128,
        "init_from": None, "seed": 7, "optimizer": {"name": "adamw", "lr": 0.0012, "weight_decay": 0.05},
        "objective": {"cmlm_weight": 0.3, "cmim_weight": 0.0},
    }  # fmt: skip
    write_json(folder.parent / "config.json", {**run, **values})


def test_auto_looks_at_measures_and_at_the_record_of_the_training(folder):
    from conversion.card_settings import choose_card

    def chosen() -> str:
        return choose_card(folder, json.loads((folder / "config.json").read_text()))[0]

    with pytest.raises(ValueError, match="Name one with --size"):
        chosen()
    for size in ("0.4B", "1B", "10B"):
        config_of(size, folder)
        assert chosen() == size
    record(folder)
    assert chosen() == "trained"
    config_of("nano", folder)
    assert chosen() == "trained"  # nano's measures, but nobody knows on what
    settings = {"twins": 0, "train": 40, "validation": 8, "test": 8, "image_size": 64, "seed": 0}
    manifest = {"version": 3, "settings": settings, "held_out_pairs": [["red", "star"]]}
    write_json(folder.parent / "scenes" / "manifest.json", manifest)
    assert chosen() == "nano"


def test_a_trained_model_says_what_it_was_trained_on(folder, tmp_path):
    first = tmp_path / "lessons" / "model"
    first.mkdir(parents=True)
    record(first, steps=700, data={"files": ["/secret/place/photos/a.parquet"]})
    record(folder, init_from=str(first))
    readme = render_card(folder, REPO, size="auto").readme
    data = readme.split("## Training data\n")[1].split("\n## ")[0]
    assert "1. From random weights: 700 steps of 128 pairs (89,600 in all) of `photos/a.parquet`" in data
    assert "2. From the weights of `lessons/model`: 1,300 steps of 128 pairs (166,400 in all)" in data
    assert "ITC + 0.3 CMLM; adamw, learning rate 0.0012, weight decay 0.05; seed 7" in data
    assert "/secret" not in readme and "BM-6B" not in readme and str(tmp_path) not in readme
    assert "These are not the weights that the paper measured." in readme


# ---- Settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not a readable YAML file"),
        ("- a", "must be a mapping"),
        ("name: x", "the entry origin is missing"),
        ("limitz: []", "unknown entry limitz. Did you mean limits"),
        (None, "not a readable YAML file"),
    ],
)
def test_bad_settings_are_named(tmp_path, text, message):
    (tmp_path / "common.yaml").write_text("{}")
    if text is not None:
        (tmp_path / "nano.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_settings("nano", tmp_path)


def test_settings_have_the_types_that_the_template_takes(tmp_path):
    for name in ("common", "nano"):
        (tmp_path / f"{name}.yaml").write_text((FOLDER / f"{name}.yaml").read_text())
    nano = yaml.safe_load((FOLDER / "nano.yaml").read_text())
    (tmp_path / "nano.yaml").write_text(yaml.safe_dump({**nano, "limits": "none"}))
    with pytest.raises(ValueError, match="limits must be a list, not 'none'"):
        load_settings("nano", tmp_path)
    (tmp_path / "nano.yaml").write_text(yaml.safe_dump({**nano, "origin": "found"}))
    with pytest.raises(ValueError, match="published or trained"):
        load_settings("nano", tmp_path)


def test_the_command_writes_the_card_or_says_what_is_wrong(folder, tmp_path, capsys):
    main([str(folder), "--size", "nano", "--repo-id", REPO, "--output", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == render_card(folder, REPO, size="nano").readme
    with pytest.raises(SystemExit, match="error: .*not a readable JSON file"):
        main([str(folder), "--size", "nano", "--results", str(tmp_path / "none.json")])


# ---- Snippets

RUN = """
import sys
sys.modules["modeling_m2encoder"] = None
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*.py")):
    exec(compile(path.read_text(encoding="utf-8"), path.name, "exec"), {})
"""


def test_the_snippets_of_the_nano_card_run_for_whoever_copies_them(folder, tmp_path, monkeypatch):
    """Each on its own, against the page that was pushed, in a process that does not know of this project."""
    pytest.importorskip("sentence_transformers", reason="one snippet is for sentence-transformers")
    with HubDouble(tmp_path / "hub") as hub:
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        push(folder, REPO, size="nano", token=hub.token, load_check=False)
        (tmp_path / "README.md").write_bytes(hub.files(REPO)["README.md"])
        snippets = [block for block in blocks(tmp_path / "README.md") if block.language == "python"]
        assert len(snippets) == 4
        (tmp_path / "snippets").mkdir()
        for i, block in enumerate(snippets):
            (tmp_path / "snippets" / f"{i}.py").write_text(block.text, encoding="utf-8")
        command = [sys.executable, "-I", "-c", RUN, str(tmp_path / "snippets")]
        environment = hub.environment(tmp_path / "home", token=None)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"tensor\(", done.stdout)) == 3 and "'label': '红色'" in done.stdout
