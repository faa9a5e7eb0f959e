"""The scenes data set (written by `python -m training.scenes`): retrieval, zero-shot classes, fine-grained tasks.

    python -m eval run --models DIR --tasks scenes --data scenes=SCENES_DIR --output OUT_DIR

Its layout is all that is known of it here: SPLIT-*.parquet, tasks/*.parquet and manifest.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .choice import choice_benchmark
from .data import Table, open_table
from .embed import Encoder
from .results import Benchmark
from .retrieval import Captioned, retrieval_benchmark
from .zero_shot import Classes, Labelled, zero_shot_benchmark

LANGUAGES = ("zh", "en")
# Captions 0 and 1 of a test image describe it in full and fit no other one; the rest are true of many images.
FULL_CAPTIONS = 2
# For names such as "a red star" and 一个红色星星. The data's own captions use these wordings.
TEMPLATES = {
    "zh": ("{}", "图中有{}", "图片里有{}"),
    "en": ("{}", "a picture of {}", "The picture shows {}."),
}


def evaluate_scenes(
    model: torch.nn.Module,
    processor: Any,
    scenes_dir: str | Path,
    limit: int | None = None,
    split: str = "test",
    batch_size: int = 128,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """All benchmarks on a scenes folder, as `{"scenes/attribute/zh/accuracy": fraction, ...}` for a training log.

    See `score_scenes` for the other arguments and errors.

    Args:
        group: the processes that share the embedding: each of them makes this call with the same arguments, and each
            gets the result. None: this process works alone.
    """
    from .models import adapt

    encoder = Encoder(adapt(model, processor), batch_size=batch_size, group=group)
    benchmarks = score_scenes(encoder, scenes_dir, limit=limit, split=split)
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
    data = Captioned(table, "image", captions, tuple(table.column("image_id")))
    benchmarks = [
        retrieval_benchmark("scenes/retrieval", encoder, data, image_embeds=embeds, paired=True),
        *_zero_shot(encoder, table, embeds, manifest["vocabulary"]),
    ]
    if split == "test":
        known = dict(zip(table.column("image_id"), embeds, strict=True))
        for task in manifest["tasks"]:
            questions = open_table([folder / "tasks" / f"{task}.parquet"]).limited(limit)
            benchmarks.append(choice_benchmark(f"scenes/{task}", encoder, questions, known))
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
    data = Labelled(table.select(single), "image", labels, classes)
    return [zero_shot_benchmark("scenes/zero-shot", encoder, data, image_embeds=embeds[single])]


def _name(language: str, colour: str, shape: str) -> str:
    if language == "zh":
        return f"一个{colour}{shape}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
