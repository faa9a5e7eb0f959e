"""What is written can be read again, whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eval.files import read_json, replaced, slug, write_json
from eval.results import Benchmark, Score, compare_samples, read_samples, write_counts
from eval.stats import accuracy_sample, paired_bootstrap
from tests.full_disk import file_size_limit

HITS = np.array([1.0, 0.0, 1.0, 1.0, 0.5, 0.0])


def benchmark(hits=HITS, ids=tuple("abcdef")):
    sample = accuracy_sample({"top-1": hits, "top-5": np.ones(6)}, image_ids=ids)
    scores = {"top-1": {"zh": Score(float(hits.mean()), 0.1)}, "top-5": {"zh": Score(1.0, 0.5)}}
    return Benchmark(
        "x",
        "p",
        ("x.parquet",),
        {"images": 6},
        scores,
        {"odd": 3},
        {"zh": (sample,)},
        ranks={"zh/greater": np.arange(6)},
    )


def test_as_json_has_chance_and_interval_beside_every_number():
    document = json.loads(json.dumps(benchmark().as_json()))
    score = document["metrics"]["top-1"]["zh"]
    assert score["value"] == pytest.approx(3.5 / 6) and score["chance"] == 0.1
    assert 0 <= score["low"] < score["value"] < score["high"] <= 1
    assert document["metrics"]["top-5"]["zh"] == {"value": 1.0, "chance": 0.5, "low": 1.0, "high": 1.0}
    assert document["notes"] == {"odd": 3} and "gap_zh_en" not in document
    assert benchmark().flat() == {"x/zh/top-1": pytest.approx(3.5 / 6), "x/zh/top-5": 1.0}


def test_samples_come_back_and_compare_as_before(tmp_path):
    first, second = benchmark(), benchmark(HITS[::-1].copy())
    write_counts(tmp_path / "a" / "first.npz", [first, second])
    read = read_samples(tmp_path / "a" / "first.npz")
    assert [item.name for item in (tmp_path / "a").iterdir()] == ["first.npz"]
    assert len(read) == 2 and read[0]["zh"][0].image_ids == tuple("abcdef") and read[0]["zh"][0].mean is None
    expected = paired_bootstrap(first.samples["zh"][0], second.samples["zh"][0])["top-1"]
    found = compare_samples(read[0]["zh"], read[1]["zh"])["top-1"]
    assert found == {"value": expected.value, "low": expected.low, "high": expected.high, "p_value": expected.p_value}
    with np.load(tmp_path / "a" / "first.npz", allow_pickle=False) as file:
        assert file["0/ranks/zh/greater"].tolist() == [0, 1, 2, 3, 4, 5]
    other = benchmark(ids=tuple("abcxyz"))
    with pytest.raises(ValueError, match="image 3 is 'd' and 'x'"):
        compare_samples(first.samples["zh"], other.samples["zh"])


def test_a_damaged_file_of_counts_is_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("bad.npz", "half.npz", "empty.npz", "none.npz"):
        with pytest.raises(ValueError, match=f"{name} is not a readable file of counts"):
            read_samples(tmp_path / name)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json is not a readable JSON file"):
        read_json(tmp_path / "bad.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"not json": object()})
    with pytest.raises(RuntimeError), replaced(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    with file_size_limit(100), pytest.raises(ValueError, match="results.json cannot be written"):
        write_json(path, {"long": "x" * 10_000})
    assert read_json(path) == {"old": 1} and [item.name for item in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="cannot be written"):
        write_json(path / "below" / "a.json", {})


def test_file_names_of_models():
    assert slug("OFA-Sys/chinese-clip") == "OFA-Sys--chinese-clip"
    assert slug("open_clip:ViT-g-14/laion") == "open_clip--ViT-g-14--laion" and slug("../..") == "model"
