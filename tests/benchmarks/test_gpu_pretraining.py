"""The GPU benchmark's code, on the CPU with nano: every row is there, and it says when there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_pretraining import SMOKE, flops_per_pair, main
from training.configs import ObjectiveConfig


def test_smoke(tmp_path: Path):
    main(["--device", "cpu", "--smoke", "--peak-tflops", "0.1", "--output", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["smoke"] and report["device"] == "cpu"
    assert len(report["steps"]) == 2 * len(SMOKE.checkpointing) * len(SMOKE.batches) * len(SMOKE.banks)
    for row in report["steps"]:
        assert row["samples_per_second"] > 0
        assert row["mfu"] == pytest.approx(row["samples_per_second"] * row["flops_per_pair"] / 1e11)
    rows = {(row["loss"], row["pairs"]): row for row in report["loss_with_simulated_ranks"]}
    assert rows.keys() == {("grouped", 32), ("local", 32), ("naive", 32), ("grouped", 64), ("local", 64)}
    assert rows["grouped", 64]["simulated_ranks"] == 4 and rows["grouped", 64]["bank_bytes"] == 64 * 2 * 8 * 2


def test_flops_count_the_model_once():
    """nano, ITC alone, by hand: 6 per weight and token of each layer, and attention's 2 * 6 L^2 D."""
    width, layers = 128, 4
    matrices = 4 * width**2 + 2 * width * 512
    by_hand = 0.0
    for length in (17, 52):
        by_hand += layers * (6 * length * matrices + 12 * length**2 * width)
        by_hand += 6 * width * 128  # the projection of [CLS]
    by_hand += 4 * 16 * (3 * 16**2) * width  # patch embedding, which passes no gradient on to the pixels
    seen = flops_per_pair("nano", ObjectiveConfig(0, 0), torch.device("cpu"))
    assert seen == pytest.approx(by_hand, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    main(["--output", str(tmp_path / "gpu.json")])
    assert "sees no CUDA GPU" in capsys.readouterr().out and not (tmp_path / "gpu.json").exists()
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
