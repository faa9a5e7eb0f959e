"""The scenes data set (written by `python -m training.scenes`): retrieval, zero-shot classes, fine-grained tasks.

    python -m eval run --model DIR --scenes SCENES_DIR --output OUT_DIR

Its layout is all that is known of it here: SPLIT-*.parquet, tasks/*.parquet and manifest.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .data import Table, open_table
from .embed import Encoder
from .ranks import choice_hits
from .results import Benchmark, Score
from .retrieval import retrieval_benchmark
from .zero_shot import Classes, zero_shot_benchmark

LANGUAGES = ("zh", "en")
# Captions 0 and 1 of a test image describe it in full and fit no other one; the rest are true of many images.
FULL_CAPTIONS = 2
# For names such as "a red star" and 一个红色星星. The data's own captions use these wordings.
TEMPLATES = {
    "zh": ("{}", "图中有{}", "图片里有{}"),
    "en": ("{}", "a picture of {}", "The picture shows {}."),
}
TASK_PROTOCOL = (
    "the candidate with the highest cosine similarity; equal scores count in expectation; chance is 1 / candidates"
)


def evaluate_scenes(
    model: torch.nn.Module,
    processor: Any,
    scenes_dir: str | Path,
    limit: int | None = None,
    split: str = "test",
    batch_size: int = 128,
) -> dict[str, float]:
    """All benchmarks on a scenes folder, as `{"scenes/attribute/zh/accuracy": fraction, ...}` for a training log.

    See `score_scenes` for the arguments and errors.
    """
    benchmarks = score_scenes(Encoder(model, processor, batch_size), scenes_dir, limit=limit, split=split)
    return {name: value for benchmark in benchmarks for name, value in benchmark.flat().items()}


def score_scenes(
    encoder: Encoder, scenes_dir: str | Path, *, limit: int | None = None, split: str = "test"
) -> list[Benchmark]:
    """Retrieval with the full captions; zero-shot classification of the images with one object; on the test split also
    the four fine-grained tasks, which are made of its images.

    Args:
        limit: use so many images of the split and so many questions of each task, evenly spaced.

    Raises:
        ValueError: for a folder that is no scenes data set, or a split that it lacks.
    """
    folder = Path(scenes_dir)
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder} is not a scenes folder: it has no manifest.json. Write one: python -m training.scenes DIR."
        )
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    table = open_table([folder / f"{split}-*.parquet"]).limited(limit)
    embeds = encoder.images(table)
    captions = {name: [own[:FULL_CAPTIONS] for own in table.column(f"captions_{name}")] for name in LANGUAGES}
    benchmarks = [
        retrieval_benchmark("scenes/retrieval", encoder, table, embeds, captions),
        *_zero_shot(encoder, table, embeds, manifest["vocabulary"]),
    ]
    if split == "test":
        known = dict(zip(table.column("image_id"), embeds, strict=True))
        for task in manifest["tasks"]:
            questions = open_table([folder / "tasks" / f"{task}.parquet"]).limited(limit)
            benchmarks.append(_task(encoder, f"scenes/{task}", questions, known))
    return benchmarks


def _zero_shot(
    encoder: Encoder, table: Table, embeds: torch.Tensor, vocabulary: Mapping[str, Mapping[str, Mapping[str, str]]]
) -> list[Benchmark]:
    """Classes are all (colour, shape) pairs; on the test split the right one never occurred in training.

    Empty when no image of the split holds exactly one object (a few rows of a split may lack them).
    """
    scenes = [json.loads(scene)["objects"] for scene in table.column("scene")]
    single = [row for row, objects in enumerate(scenes) if len(objects) == 1]
    if not single:
        return []
    colours, shapes = vocabulary["colour"], vocabulary["shape"]
    pairs = list(product(colours, shapes))
    classes = {
        language: Classes(
            {i: _name(language, colours[c][language], shapes[s][language]) for i, (c, s) in enumerate(pairs)},
            TEMPLATES[language],
        )
        for language in LANGUAGES
    }
    labels = [pairs.index((scenes[row][0]["colour"], scenes[row][0]["shape"])) for row in single]
    return [zero_shot_benchmark("scenes/zero-shot", encoder, table, embeds[single], labels, classes)]


def _name(language: str, colour: str, shape: str) -> str:
    if language == "zh":
        return f"一个{colour}{shape}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def _task(encoder: Encoder, name: str, table: Table, known: Mapping[str, torch.Tensor]) -> Benchmark:
    """Accuracy of choosing the one true candidate, over all questions and per factor (what was changed)."""
    ids = table.column("image_id")
    # Questions are about images of the split, which are embedded already, unless a limit left them out.
    new = {image_id: row for row, image_id in enumerate(ids) if image_id not in known}
    if new:
        known = {**known, **dict(zip(new, encoder.images(table, rows=list(new.values())), strict=True))}
    images = torch.stack([known[image_id] for image_id in ids])
    labels, factors = torch.tensor(table.column("label")), table.column("factor")
    metrics: dict[str, dict[str, Score]] = {}
    for language in LANGUAGES:
        candidates = table.column(f"candidates_{language}")
        sizes = torch.tensor([len(own) for own in candidates])
        hits = choice_hits(images, encoder.texts([text for own in candidates for text in own]), sizes, labels)
        chances = 1 / sizes.double()
        for factor in (None, *sorted(set(factors))):
            chosen = torch.tensor([factor in (None, own) for own in factors])
            metric = "accuracy" if factor is None else f"accuracy/{factor.replace(' ', '_')}"
            metrics.setdefault(metric, {})[language] = Score(hits[chosen].mean().item(), chances[chosen].mean().item())
    return Benchmark(name, TASK_PROTOCOL, table.files, {"questions": len(table)}, metrics)
