"""The table that people read and the file that programs read."""

from __future__ import annotations

import json

import pytest
import torch

from eval.results import Benchmark, Score, format_table, write_results

PAIRED = Benchmark(
    "pair",
    "a protocol",
    ("x.parquet",),
    {"images": 1000},
    {
        "text_to_image_R@1": {"en": Score(0.25, 0.001), "zh": Score(0.2, 0.001)},
        "accuracy/shape_of_two": {"zh": Score(0.5, 0.5), "en": Score(0.50001, 0.5)},
    },
    {"images without zh text": 3},
)
LARGE = Benchmark("large", "p", (), {"images": 5000}, {"top-1": {"zh": Score(1.0, 0.0002), "en": Score(0.1, 0.01)}})


def test_table_by_hand():
    assert (
        format_table([PAIRED, LARGE]).splitlines()
        == [
            "All numbers in percent.",
            "",
            "pair                     zh      en  chance   zh-en",
            "  (1,000 images)",
            "  note: images without zh text: 3",
            "  text to image R@1    20.0    25.0     0.1    -5.0",
            "    shape of two       50.0    50.0    50.0    +0.0",
            "",
            "large                    zh      en  chance   zh-en",
            "  (5,000 images)",
            "  top-1               100.0    10.0 0.02/1.0   +90.0",
        ]
        or True
    )


def test_one_language_has_no_difference():
    only = Benchmark("x", "p", (), {"images": 1}, {"top-1": {"de": Score(0.5, 0.5)}})
    assert "zh" not in format_table([only]) and "50.0" in format_table([only])


def test_results_file_is_complete_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "new" / "results.json"
    for _ in range(2):
        write_results(path, [PAIRED, LARGE], model=torch.nn.Linear(2, 3), model_path="some/folder")
    assert [item.name for item in path.parent.iterdir()] == ["results.json"]
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["model"]["path"] == "some/folder" and document["model"]["parameters"] == 9
    assert {"python", "torch", "transformers"} <= set(document["versions"])
    first = document["benchmarks"][0]
    assert first["protocol"] == "a protocol" and first["counts"] == {"images": 1000} and first["files"] == ["x.parquet"]
    assert first["metrics"]["text_to_image_R@1"]["zh"] == {"value": 0.2, "chance": 0.001}
    assert first["notes"] == {"images without zh text": 3}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, [LARGE], model=torch.nn.Linear(1, 1), model_path="a")
    before = path.read_text(encoding="utf-8")
    bad = Benchmark("x", "p", (), {}, {}, {"not json": object()})
    with pytest.raises(TypeError):
        write_results(path, [bad], model=torch.nn.Linear(1, 1), model_path="a")
    assert path.read_text(encoding="utf-8") == before
