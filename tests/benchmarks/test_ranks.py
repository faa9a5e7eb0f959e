"""The approaches that the benchmark of the scorer times agree, and its processes do what they are told."""

from __future__ import annotations

import pytest

from benchmarks import ranks


def test_the_approaches_agree_on_a_small_set():
    data = ranks.features(200)
    recalls = {name: approach(*data) for name, approach in ranks.APPROACHES.items()}
    assert recalls["official"] == recalls["brute force"] == recalls["ours"]
    assert 0 < recalls["ours"]["text_to_image_R@1"] < recalls["ours"]["text_to_image_R@10"] < 1


def test_a_run_reports_medians_and_quotients(monkeypatch, capsys):
    """Two repeats of each approach but brute force, which is there for its recalls; processes are replaced."""
    seconds = {"official": iter([8.0, 12.0]), "brute force": iter([50.0]), "ours": iter([1.0, 0.6])}
    monkeypatch.setattr(ranks, "IMAGES", (7,))
    monkeypatch.setattr(
        ranks,
        "in_own_process",
        lambda name, images, kernel: {
            "cpu_seconds": next(seconds[name]), "wall_seconds": 3.0, "peak_mb": 100.0, "recalls": {"R@1": 0.5},
        },
    )  # fmt: skip
    (size,) = ranks.run(2, "free")
    ours = size["approaches"]["ours"]
    assert (size["images"], size["texts"], size["recalls"]) == (7, 35, {"R@1": 0.5})
    assert ours["cpu_seconds"] == 0.8 and ours["all_cpu_seconds"] == [1.0, 0.6]
    assert ours["times_faster_than_official"] == 12.5 and ours["times_faster_least_to_least"] == 13.33
    assert "12.5x" in capsys.readouterr().out


def test_approaches_that_disagree_end_the_run(monkeypatch):
    monkeypatch.setattr(ranks, "IMAGES", (7,))
    monkeypatch.setattr(
        ranks,
        "in_own_process",
        lambda name, images, kernel: {
            "cpu_seconds": 1.0,
            "wall_seconds": 1.0,
            "peak_mb": 1.0,
            "recalls": {"R@1": name},
        },
    )
    with pytest.raises(SystemExit, match="differ"):
        ranks.run(1, "free")
