"""What a benchmark gives, as a table for people, a JSON file for programs, and a flat dict for a training log."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

VERSIONS_OF = ("torch", "transformers", "datasets", "numpy", "pillow")


class Score(NamedTuple):
    """A fraction in [0, 1], and what a random ranking or guess is expected to reach."""

    value: float
    chance: float


@dataclass(frozen=True)
class Benchmark:
    """The scores of one model on one data set under one protocol."""

    name: str
    protocol: str
    files: tuple[str, ...]
    counts: dict[str, int]
    """What was scored: images, texts per language, classes, ..."""
    metrics: dict[str, dict[str, Score]]
    """metric -> language -> score."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What a reader should know of the data: images without a text, class names that collide, ..."""

    def flat(self) -> dict[str, float]:
        """`{"name/language/metric": value}` for a training log."""
        return {
            f"{self.name}/{language}/{metric}": score.value
            for metric, scores in self.metrics.items()
            for language, score in scores.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, fractions unrounded."""
        metrics = {
            metric: {language: score._asdict() for language, score in scores.items()}
            for metric, scores in self.metrics.items()
        }
        plain = {name: getattr(self, name) for name in ("name", "protocol", "counts", "notes")}
        return {**plain, "files": list(self.files), "metrics": metrics}


def write_results(path: Path, benchmarks: Sequence[Benchmark], *, model: torch.nn.Module, model_path: str) -> None:
    """Write results.json: beside its place first, then renamed, so that there is never half a file."""
    parameter = next(model.parameters())
    document = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "path": model_path,
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
        },
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in VERSIONS_OF}},
        "benchmarks": [benchmark.as_json() for benchmark in benchmarks],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def format_table(benchmarks: Sequence[Benchmark]) -> str:
    """An aligned table in percent: a column per language, zh and en first, the chance level, and zh - en in points."""
    languages = _languages(benchmarks)
    header = [*languages, "chance", *(["zh-en"] if {"zh", "en"} <= set(languages) else [])]
    rows: list[tuple[str, list[str]]] = []
    for benchmark in benchmarks:
        counts = ", ".join(f"{count:,} {what}" for what, count in benchmark.counts.items())
        rows += [("", []), (benchmark.name, header), (f"  ({counts})", [])]
        rows += [(f"  note: {what}: {seen}", []) for what, seen in benchmark.notes.items()]
        rows += [(_label(metric), _cells(scores, languages)) for metric, scores in benchmark.metrics.items()]
    label = max(len(name) for name, cells in rows if cells)
    width = max(7, *(len(cell) for _, cells in rows for cell in cells))
    lines = [f"{name:<{label}}" + "".join(f" {cell:>{width}}" for cell in cells) for name, cells in rows]
    return "\n".join(["All numbers in percent.", *(line.rstrip() for line in lines)])


def _label(metric: str) -> str:
    part, _, factor = metric.partition("/")
    return f"    {factor}".replace("_", " ") if factor else f"  {part}".replace("_", " ")


def _cells(scores: Mapping[str, Score], languages: Sequence[str]) -> list[str]:
    cells = [f"{100 * scores[name].value:.1f}" if name in scores else "" for name in languages]
    # One number unless the languages differ in their number of captions.
    cells.append("/".join(dict.fromkeys(_chance(scores[name].chance) for name in languages if name in scores)))
    if "zh" in scores and "en" in scores:
        points = round(100 * (scores["zh"].value - scores["en"].value), 1)
        cells.append(f"{points + 0.0:+.1f}")  # adding 0 turns -0.0 into 0.0
    return cells


def _languages(benchmarks: Sequence[Benchmark]) -> list[str]:
    seen = dict.fromkeys(name for b in benchmarks for scores in b.metrics.values() for name in scores)
    return sorted(seen, key=lambda name: ("zh", "en").index(name) if name in ("zh", "en") else 2)


def _chance(value: float) -> str:
    # R@1 over 5,000 images is 0.02 % by chance, which one decimal would call 0.0.
    percent = 100 * value
    return f"{percent:.1f}" if percent >= 0.1 or percent == 0 else f"{percent:.1g}"
