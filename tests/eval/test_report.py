"""Tables, files for the Hub, plots and comparisons from scores that are written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from eval.compare import compare, comparison_table
from eval.files import read_json, write_json
from eval.plots import dots, size_in_name
from eval.report import results, write_report
from eval.results import Benchmark, Score, write_counts
from eval.stats import accuracy_sample, paired_bootstrap
from eval.tables import aligned, markdown, percent

ZH = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
EN = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])


def score_file(output, model: str, zh=ZH, en=EN, *, task="tiny-imagenet", data=None, ids=tuple("abcdefgh"), notes=()):
    """As `run` writes it."""
    samples = {
        name: (accuracy_sample({"top-1": hits}, image_ids=ids),)
        for name, hits in (("zh", zh), ("en", en))
        if hits is not None
    }
    scores = {name: Score(float(own[0].hits.mean()), 0.125) for name, own in samples.items()}
    paired = len(samples) == 2
    benchmark = Benchmark(task, "p/fp32", ("x",), {"images": 8}, {"top-1": scores}, {}, samples, paired)
    about = {"name": task, "title": "Title", "kind": "classification", "protocol": "p", "data": data, "split": "test"}
    document = {
        "name": model, "model": {"name": model, "parameters": 2_000_000}, "task": {**about, "notes": list(notes)},
        "revision": "a" * 40 if data else None, "limit": None, "benchmarks": [benchmark.as_json()], "seconds": 1.0,
        "created": "2026-11-24T00:00:00+00:00", "versions": {}, "stamp": {},
    }  # fmt: skip
    folder = output / "scores" / model
    write_json(folder / f"{task}.json", document)
    write_counts(folder / f"{task}.npz", [benchmark])


def table_rows(text: str, section: str) -> list[list[str]]:
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_table_has_languages_gap_intervals_and_chance_side_by_side(tmp_path):
    score_file(tmp_path, "nano", notes=["a note of the task"])
    text = markdown(results(tmp_path))
    header, _, row = table_rows(text, "Title")
    assert header == ["system", "metric", "zh", "interval", "en", "interval", "chance", "paired gap", "interval", "p"]
    cells = dict(zip(("system", "metric", "zh", "zh interval", "en", "en interval", "chance", "gap", "gap interval", "p"), row))  # fmt: skip  # noqa: E501, B905
    assert (cells["system"], cells["metric"], cells["zh"], cells["en"]) == ("nano", "top-1", "37.5", "62.5")
    assert cells["chance"] == "12.5" and cells["gap"] == "-25.0"
    gap = paired_bootstrap(*(accuracy_sample({"top-1": hits}) for hits in (ZH, EN)))["top-1"]
    assert cells["gap interval"] == f"[{100 * gap.low:+.1f}, {100 * gap.high + 0.0:+.1f}]"
    assert cells["p"] == f"{gap.p_value:.3f}"
    low, high = (float(end) for end in cells["zh interval"].strip("[]").split(","))
    assert low < 37.5 < high
    assert "a note of the task" in text and "`p/fp32`: 8 images" in text
    assert table_rows(text, "Overview")[2][:4] == ["tiny-imagenet", "nano", "top-1", "37.5"]


def test_published_numbers_are_marked_and_keep_their_source(tmp_path):
    score_file(tmp_path, "nano", None, EN, task="imagenet", data="mteb/wds_imagenet1k")
    document = results(tmp_path)
    entry = next(one for one in document["published"] if one["system"] == "M2-Encoder-10B")
    assert (entry["task"], entry["value"], entry["source"]) == ("imagenet", 0.885, "arXiv 2401.15896, abstract")
    text = markdown(document)
    rows = {row[0]: row for row in table_rows(text, "Title")}
    assert rows["M2-Encoder-10B *published*"][2:4] == ["88.5", ""] and rows["nano"][2] == "62.5"
    assert "M2-Encoder-10B, published: arXiv 2401.15896, abstract" in text
    others = {row[0]: row for row in table_rows(text, "Systems of the comparison that were not run")}
    assert "in the tables above" in others["M2-Encoder-10B"][4] and others["BriVL"][3].startswith("no open weights")
    assert "flickr30k-m2paper, en: text to image R@1 92.2" in others["M2-Encoder-10B"][4]  # of a task that was not run
    assert "- M2-Encoder-10B: published: arXiv 2401.15896, Table 4" in text
    (listed,) = (one for one in document["systems"] if one["name"] == "ERNIE-ViL 2.0")
    assert [number["value"] for number in listed["published"]] == [70.3, 68.8, 86.32]
    assert others["BriVL"][4] == "not at hand" and others["BriVL"][2] == "one of Tables 1 to 5"
    assert others["AltCLIP-0.8B"][3] == "not run here (transformers: BAAI/AltCLIP)"
    assert others["CN-CLIP-1B"][2] == "Table 5" and others["SigLIP"][2] == "later"
    assert "has the two directions of its COCO-CN row swapped" in text
    shown = {dot.system: dot for dot in dots(document, "imagenet", "top-1")}
    assert shown["M2-Encoder-10B"].published and shown["M2-Encoder-10B"].parameters == 1e10
    assert not shown["nano"].published and shown["nano"].parameters == 2_000_000


def test_the_report_writes_what_the_hub_reads(tmp_path):
    """Read back by huggingface_hub's own parsers."""
    score_file(tmp_path, "nano", ZH, EN)
    score_file(tmp_path, "nano", None, EN, task="imagenet", data="mteb/wds_imagenet1k")
    score_file(tmp_path, "other", EN, ZH)
    written = {str(path.relative_to(tmp_path)) for path in write_report(tmp_path)}
    assert written == {
        "results.json", "results.md", "plots/tiny-imagenet.png", "plots/imagenet.png", "plots/overview.png",
        "hub/nano/model-index.yaml", "hub/nano/.eval_results/imagenet.yaml", "hub/other/model-index.yaml",
    }  # fmt: skip
    index = yaml.safe_load((tmp_path / "hub" / "nano" / "model-index.yaml").read_text())["model-index"]
    name, entries = model_index_to_eval_results(index)
    assert name == "nano" and len(entries) == 3
    entry = next(one for one in entries if one.dataset_type == "mteb/wds_imagenet1k")
    assert (entry.metric_value, entry.dataset_revision, entry.metric_type) == (62.5, "a" * 40, "accuracy")
    low, high = entry.metric_args["interval"]
    assert low < 62.5 < high and entry.metric_args["protocol"] == "p/fp32"
    text = (tmp_path / "hub" / "nano" / ".eval_results" / "imagenet.yaml").read_text()
    (parsed,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (parsed.dataset_id, parsed.task_id, parsed.value) == ("mteb/wds_imagenet1k", "imagenet_en_top-1", 62.5)
    assert "95 % interval" in parsed.notes and "chance 12.5" in parsed.notes
    for plot in (tmp_path / "plots").iterdir():
        colours = np.asarray(Image.open(plot).convert("RGB")).reshape(-1, 3).astype(int)
        assert (np.abs(colours - (0x2F, 0x6D, 0xB3)).sum(1) < 30).sum() > 50, f"no dot for en in {plot}"
    document = read_json(tmp_path / "results.json")
    assert document["models"][0]["tasks"][0]["benchmarks"][0]["metrics"]["top-1"]["en"]["value"] == 0.625


def test_two_models_are_compared_on_the_same_images(tmp_path):
    score_file(tmp_path, "a", ZH, EN)
    score_file(tmp_path, "b", EN, EN)
    document = compare(tmp_path, "a", "b")
    zh, en = sorted(document["benchmarks"], key=lambda one: one["language"] == "en")
    expected = paired_bootstrap(accuracy_sample({"top-1": ZH}), accuracy_sample({"top-1": EN}))["top-1"]
    assert zh["differences"]["top-1"] == {
        "value": -0.25, "low": expected.low, "high": expected.high, "p_value": expected.p_value,
    }  # fmt: skip
    assert en["differences"]["top-1"] == {"value": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    lines = comparison_table(document).splitlines()
    assert lines[0].startswith("a minus b, in points") and "-25.0" in lines[4] and "+0.0" in lines[5]
    # Two output folders of one model each will do as well.
    score_file(tmp_path / "x", "m", ZH, EN)
    score_file(tmp_path / "y", "m", EN, EN)
    assert compare(None, str(tmp_path / "x"), str(tmp_path / "y"))["benchmarks"] == document["benchmarks"]


def test_a_system_that_was_not_run_is_compared_by_its_published_numbers(tmp_path):
    score_file(tmp_path, "nano", None, EN, task="imagenet")
    document = compare(tmp_path, "nano", "M2-Encoder-10B")
    (one,) = document["benchmarks"]
    difference = one["differences"]["top-1"]
    assert (one["name"], one["language"]) == ("imagenet", "en") and difference["p_value"] is None
    assert difference["value"] == pytest.approx(0.625 - 0.885)
    assert difference["low"] < difference["value"] < difference["high"]
    text = comparison_table(document)
    assert "*published*" in text and "-26.0" in text and "- arXiv 2401.15896, abstract" in text
    assert compare(None, str(tmp_path), "M2-Encoder-10B")["benchmarks"] == document["benchmarks"]
    with pytest.raises(ValueError, match=r"No published number of BriVL is at hand .* \(no open weights"):
        compare(tmp_path, "nano", "BriVL")
    with pytest.raises(ValueError, match="it can be run: --models CN-CLIP-1B"):
        compare(tmp_path, "nano", "CN-CLIP-1B")


def test_what_cannot_be_compared_is_named(tmp_path):
    score_file(tmp_path, "a")
    with pytest.raises(ValueError, match="No scores of c in .*; there are: a"):
        compare(tmp_path, "a", "c")
    score_file(tmp_path, "c", task="imagenet")
    with pytest.raises(ValueError, match="a and c have no benchmark in common"):
        compare(tmp_path, "a", "c")
    score_file(tmp_path, "d", ids=tuple("abcdefgx"))
    with pytest.raises(ValueError, match="tiny-imagenet, zh: .*image 7 is 'h' and 'x'"):
        compare(tmp_path, "a", "d")
    with pytest.raises(ValueError, match=r"must be an output folder with the scores of one model \(it has: a, c, d\)"):
        compare(None, str(tmp_path), str(tmp_path))
    with pytest.raises(ValueError, match="No scores in"):
        results(tmp_path / "empty")


def test_numbers_and_alignment():
    assert [percent(value) for value in (0.1234, 0.0, 0.0002, 1.0)] == ["12.3", "0.0", "0.02", "100.0"]
    assert [percent(value, True) for value in (0.1234, -0.00001, -0.1)] == ["+12.3", "+0.0", "-10.0"]
    assert aligned(["a", "b"], [["xxxx", "1"]], left=1) == "| a    |   b |\n| ---- | --: |\n| xxxx |   1 |"
    assert [size_in_name(name) for name in ("CN-CLIP-0.2B", "CoCa", "EVA 500M")] == [2e8, None, 5e8]
