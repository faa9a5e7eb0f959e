"""The fine-grained sets that `python -m eval build` writes: retrieval over short texts that many images share, the
choice between a text and its look-alikes, and for CUB, Dogs and CARS zero-shot classification as well.

eval/build/__init__.py describes the folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .choice import choice_benchmark
from .data import Source, Table, open_data, open_table
from .embed import Encoder
from .files import read_json
from .results import Benchmark
from .retrieval import Captioned, limited, read_captioned, retrieval_benchmark
from .tasks import Task
from .zero_shot import Labelled, read_labelled, zero_shot_benchmark


@dataclass(frozen=True)
class FineGrained:
    """A built folder."""

    captions: Captioned
    labelled: Labelled | None
    choices: Table | None
    manifest: dict[str, Any]
    gallery: dict[str, list[str]]
    """language -> every text of the set once, also those that are right for no image."""
    counts: dict[str, int]
    """Images, texts, pairs and choices, as the manifest counts them."""


def read_fine_grained(task: Task, source: Source | None) -> FineGrained:
    """A folder that `eval.build.build` wrote.

    Raises:
        ValueError: for a folder that is missing, of another set, or without images.
    """
    if source is None:
        open_data(task.data, task.columns, None)  # says how to get it
    folder = Path(source if isinstance(source, str | Path) else source[0])
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is not a built set: it has no manifest.json. Make one: {task.data.obtain}.")
    manifest = read_json(folder / "manifest.json")
    if manifest.get("name") != task.name:
        raise ValueError(f"{folder} holds the set {manifest.get('name')!r}, not {task.name!r}.")
    table = open_table([folder / task.data.files])
    if task.columns.image not in table.rows.column_names:
        raise ValueError(f"{folder} was built without images: build it again with --sources images=FOLDER among them.")
    captions = read_captioned(task, folder)
    texts = open_table([folder / "texts.parquet"])
    choices = open_table([folder / "choice.parquet"]) if (folder / "choice.parquet").is_file() else None
    pairs = sum(len(own) for own in captions.captions["en"])
    counts = {"images": len(captions.table), "texts": len(texts), "pairs": pairs}
    if choices is not None:
        counts["choices"] = len(choices)
    labelled = None
    if task.classes:
        labelled = read_labelled(task, folder, captions.table)
    gallery = {language: texts.column(f"text_{language}") for language in task.languages}
    return FineGrained(captions, labelled, choices, manifest, gallery, counts)


def fine_grained_benchmarks(task: Task, encoder: Encoder, data: FineGrained, limit: int | None) -> list[Benchmark]:
    """NAME, NAME/choice and NAME/zero-shot, as far as the set has them.

    Args:
        limit: use so many images, and so many questions, evenly spaced.
    """
    captions = limited(data.captions, limit)
    # Which images and texts a set has depends on its rule: two rules are two benchmarks.
    rule = f" (rule {data.manifest['rule']})" if data.manifest.get("rule") else ""
    embeds = encoder.images(captions.table, captions.image_column)
    benchmarks = [
        retrieval_benchmark(
            task.name,
            encoder,
            captions,
            image_embeds=embeds,
            protocol=task.protocol + rule,
            positives=task.positives,
            paired=task.paired,
            gallery=data.gallery,
        )
    ]
    if data.labelled is not None:
        rows = captions.table.column("label")
        labelled = replace(data.labelled, table=captions.table, labels=rows, image_ids=captions.image_ids)
        benchmarks.append(
            zero_shot_benchmark(f"{task.name}/zero-shot", encoder, labelled, image_embeds=embeds, paired=task.paired)
        )
    if data.choices is not None:
        # All images, since a limit picks questions and images apart from each other; they are in the cache or few.
        questions = data.choices.limited(limit)
        known = dict(zip(captions.image_ids or (), embeds, strict=True))
        wanted = set(questions.column("image_id")) - set(known)
        if wanted:
            place = {image: row for row, image in enumerate(data.captions.image_ids or ())}
            lost = sorted(wanted - set(place))
            if lost:
                raise ValueError(f"{task.name}: choice.parquet asks about images that are not there, e.g. {lost[0]!r}.")
            rows = [place[image] for image in sorted(wanted)]
            more = encoder.images(data.captions.table, data.captions.image_column, rows)
            known |= dict(zip(sorted(wanted), more, strict=True))
        benchmarks.append(choice_benchmark(f"{task.name}/choice", encoder, questions, known))
    return benchmarks
