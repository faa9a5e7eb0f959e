"""What the objectives do for nano on photos: ITC against Grouped-ITC and GBA-ITC at equal samples (the paper's Figure
4), and the full objective against ITC alone at equal steps.

    python -m benchmarks.pretraining_objectives TRAIN.parquet VALIDATION.parquet

The parquet files have the columns image, caption_en, caption_zh. Writes benchmarks/pretraining_objectives.json,
and beside it a picture of the curves. Two processes on one machine; about seven minutes on two CPU cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from training.plot import plot_runs
from training.run_log import read_log

# Each with B = 64 pairs of a micro-batch on each of n = 2 processes: N = 128, N = 64 (g = 1), N = 128 (g = 1, k = 2).
GROUPINGS = {
    "ITC": ["--batch-size", "128", "--steps", "{samples/128}"],
    "Grouped-ITC": ["--batch-size", "128", "--steps", "{samples/128}", "--itc.group-size", "1"],
    "GBA-ITC": [
        *("--batch-size", "256", "--steps", "{samples/256}"),
        *("--itc.group-size", "1", "--itc.bank-steps", "2"),
    ],
}
OBJECTIVES = {
    "ITC-alone": ["--batch-size", "128"],
    "full": [*("--batch-size", "128", "--objective.cmlm-weight", "0.3", "--objective.cmim-weight", "0.3")],
}


@dataclass(frozen=True)
class Settings:
    train: tyro.conf.Positional[str]
    """Parquet files to train on."""
    validation: tyro.conf.Positional[str]
    """Parquet files to score on."""
    output: str = "benchmarks/pretraining_objectives.json"
    samples: int = 15_360
    """Pairs that each of the three groupings sees."""
    steps: int = 160
    """Optimizer steps of both objectives."""


def run(name: str, options: list[str], settings: Settings, folder: Path, tokenizer: Path) -> dict[str, Any]:
    """Trains and scores once; returns the last losses and the scores."""
    output = folder / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "training.pretrain", "nano", "--output-dir", str(output), "--tokenizer", str(tokenizer)]
    command += ["--data.files", settings.train, "--data.captions", "en", "caption_en", "zh", "caption_zh"]
    command += ["--data.augment", "crop", "--data.flip", "--data.neighbours", "1", "--data.num-workers", "0"]
    command += ["--optimizer.warmup-steps", "30", "--log-every", "10"]
    command += [
        option.replace("{samples/128}", str(settings.samples // 128)).replace(
            "{samples/256}", str(settings.samples // 256)
        )
        for option in options
    ]
    subprocess.run(command, check=True)
    score = [sys.executable, "-m", "eval", "run", "--model", str(output / "model"), "--output", str(output / "scores")]
    score += ["--retrieval", settings.validation, "--captions", "zh=caption_zh", "en=caption_en"]
    subprocess.run(score, check=True)
    log = read_log(output / "log.jsonl")
    assert all(record["processes"] == 2 for record in log)
    results = json.loads((output / "scores" / "results.json").read_text(encoding="utf-8"))
    benchmarks = [b for model in results["models"] for task in model["tasks"] for b in task["benchmarks"]]
    return {
        "options": options,
        "curve": [{key: record[key] for key in record if key.startswith(("samples", "loss"))} for record in log],
        "benchmarks": benchmarks,
    }


def main(settings: Settings) -> None:
    """Runs all five and writes the JSON and the picture."""
    output = Path(settings.output)
    results: dict[str, Any] = {"samples": settings.samples, "steps": settings.steps}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = folder / "tokenizer"
        learn = [sys.executable, "-m", "training.tokenizer", str(tokenizer), "--data", settings.train]
        learn += ["--columns", "caption_en", "caption_zh", "--vocab-size", "4000"]
        subprocess.run(learn, check=True)
        results["groupings"] = {
            name: run(name, options, settings, folder, tokenizer) for name, options in GROUPINGS.items()
        }
        plot_runs([folder / name for name in GROUPINGS], output.with_suffix(".png"), "samples")
        results["objectives"] = {
            name: run(name, [*options, "--steps", str(settings.steps)], settings, folder, tokenizer)
            for name, options in OBJECTIVES.items()
        }
    output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Settings))
