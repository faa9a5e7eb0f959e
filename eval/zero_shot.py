"""Zero-shot classification: an image belongs to the class whose averaged prompts it is nearest to.

    python -m eval run --models DIR --tasks imagenet,imagenet-cn --output OUT_DIR
    python -m eval run --model DIR --zero-shot FILE --classes eval/tasks/tiny_imagenet.yaml --output OUT_DIR

Letters: N images, C classes, E embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .data import Source, Table, open_data
from .embed import Encoder
from .prompts import best_top1, collisions, names_of_column, read_listed
from .ranks import hit_probability, retrieval_ranks
from .results import Benchmark, Score
from .stats import accuracy_sample
from .tasks import Listed, Task

TOP = (1, 5)


@dataclass(frozen=True)
class Classes:
    """The classes in one language: `names[label]`, and templates in which `{}` stands for the name."""

    names: dict[int, str]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Labelled:
    """Images, their classes, and what the classes are called in each language."""

    table: Table
    image_column: str
    labels: list[int]
    classes: dict[str, Classes]
    image_ids: tuple[str, ...] | None = None


def read_labelled(task: Task, source: Source | None = None, table: Table | None = None) -> Labelled:
    """The images and classes of a classification task, whole.

    Args:
        source: where the data lie, see `eval.data.open_data`.
        table: the rows, if they are open already.

    Raises:
        ValueError: for data that are missing or lack a column, labels that are no integers or have no name, languages
            that name different labels, names or templates that are not there.
    """
    columns = task.columns
    table = next(iter(open_data(task.data, columns, source).values())) if table is None else table
    table.require(columns.image)
    labels = table.column(str(columns.label))
    odd = next((label for label in labels if not isinstance(label, int)), None)
    if odd is not None or not labels:
        raise ValueError(f"Column {columns.label!r} of {table.files[0]} must hold integers, not e.g. {odd!r}.")
    folder = _folder(source)
    classes = {
        language: Classes(
            _names(texts.names, table, labels, folder),
            read_listed(texts.templates, folder) if isinstance(texts.templates, Listed) else texts.templates,
        )
        for language, texts in ((language, task.classes[language]) for language in task.languages)
    }
    check_classes(task.name, labels, classes)
    ids = tuple(map(str, table.column(columns.image_id))) if columns.image_id else None
    return Labelled(table, columns.image, labels, classes, ids)


def zero_shot_benchmark(
    name: str,
    encoder: Encoder,
    data: Labelled,
    *,
    image_embeds: torch.Tensor | None = None,
    protocol: str = "prompt-ensemble/fp32",
    paired: bool = True,
) -> Benchmark:
    """Score images against the classes of each language: top-1, top-5, and the accuracy of every class.

    Classes that no image belongs to stay in the gallery. Classes with equal embeddings (colliding names) share the hit.

    Args:
        image_embeds: [N, E] if they are there already.

    Raises:
        ValueError: for labels without a name, or languages that name different labels.
    """
    check_classes(name, data.labels, data.classes)
    if image_embeds is None:
        image_embeds = encoder.images(data.table, data.image_column)
    known = sorted(next(iter(data.classes.values())).names)
    index = {label: i for i, label in enumerate(known)}
    owner = torch.tensor([index[label] for label in data.labels])
    counts = {"images": len(image_embeds), "classes": len(known)}
    benchmark = Benchmark(name, protocol, data.table.files, counts, {}, paired=paired, revision=data.table.revision)
    for language, entry in data.classes.items():
        gallery = class_embeddings(encoder, [entry.names[label] for label in known], entry.templates)
        # Classes are the gallery and images the queries: accuracy is the "text to image" side of the ranks.
        ranks = retrieval_ranks(gallery, image_embeds, owner)
        greater, equal = ranks.text_greater, ranks.text_equal
        hits = {f"top-{k}": hit_probability(greater, equal, torch.ones_like(equal), k) for k in TOP}
        for k in TOP:
            score = Score(hits[f"top-{k}"].mean().item(), min(k, len(known)) / len(known))
            benchmark.metrics.setdefault(f"top-{k}", {})[language] = score
        benchmark.samples[language] = (accuracy_sample(hits, image_ids=data.image_ids),)
        benchmark.ranks[f"{language}/greater"], benchmark.ranks[f"{language}/equal"] = greater.numpy(), equal.numpy()
        benchmark.details.setdefault("classes", {})[language] = per_class(hits["top-1"], data.labels, entry.names)
        _note_collisions(benchmark, language, entry, data.labels)
    return benchmark


def per_class(hits: torch.Tensor, labels: Sequence[int], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The top-1 accuracy of every class that has an image, in the order of the labels."""
    totals: dict[int, list[float]] = {}
    for label, hit in zip(labels, hits.tolist(), strict=True):
        totals.setdefault(label, []).append(hit)
    return [
        {"label": label, "name": names[label], "images": len(own), "top-1": sum(own) / len(own)}
        for label, own in sorted(totals.items())
    ]


def check_classes(name: str, labels: Sequence[int], classes: Mapping[str, Classes]) -> None:
    """Raises ValueError for labels without a name, and for languages that name different labels."""
    known = set(next(iter(classes.values())).names)
    for language, entry in classes.items():
        odd = sorted(known ^ set(entry.names))
        if odd:
            raise ValueError(
                f"{name}: every language must name the same labels; {language} differs from the first in {odd[:5]}."
            )
    unknown = sorted(set(labels) - known)
    if unknown:
        raise ValueError(f"{name} has labels without a name: {unknown[:5]} (named: {len(known)} labels).")


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """[C, E] of length 1: for each name the normalised mean of its prompts' normalised embeddings."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    return F.normalize(encoder.texts(prompts).view(len(names), len(templates), -1).mean(dim=1), dim=-1)


def _names(
    names: tuple[str, ...] | dict[int, str] | Listed, table: Table, labels: list[int], folder: Path | None
) -> dict[int, str]:
    if isinstance(names, Listed) and names.column is not None:
        column = table.column(names.column)
        if odd := [one for one in column if not isinstance(one, str) or not one.strip()]:
            seen = repr(odd[0])[:80]
            raise ValueError(f"Column {names.column!r} of {table.files[0]} must hold class names, not e.g. {seen}.")
        return names_of_column(labels, column, table.locate)
    if isinstance(names, Listed):
        names = read_listed(names, folder)
    return names if isinstance(names, dict) else dict(enumerate(names))


def _note_collisions(benchmark: Benchmark, language: str, entry: Classes, labels: Sequence[int]) -> None:
    shared = collisions(entry.names)
    if shared:
        best = 100 * best_top1(entry.names, labels)
        listed = ", ".join(f"{name} ({'/'.join(map(str, own))})" for name, own in shared.items())
        benchmark.notes[f"{language} names of several classes"] = f"{listed}: top-1 is at most {best:.2f} %"


def limited_labelled(data: Labelled, limit: int | None) -> Labelled:
    """At most `limit` images, evenly spaced; all classes stay, so that it does not become easier."""
    table = data.table.limited(limit)
    if table is data.table:
        return data
    rows = [i * len(data.table) // len(table) for i in range(len(table))]
    ids = None if data.image_ids is None else tuple(data.image_ids[row] for row in rows)
    return replace(data, table=table, labels=[data.labels[row] for row in rows], image_ids=ids)


def _folder(source: Source | None) -> Path | None:
    """The folder that data lie in, for files of names beside them."""
    if source is None:
        return None
    path = Path(source if isinstance(source, str | Path) else source[0])
    return path if path.is_dir() else path.parent
