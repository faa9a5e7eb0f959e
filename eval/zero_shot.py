"""Zero-shot classification: an image belongs to the class whose averaged prompts it is nearest to.

    python -m eval run --model DIR --zero-shot FILE --classes eval/tasks/tiny_imagenet.yaml --output OUT_DIR

The YAML file names the integer label column and, per language, the class names and the prompt templates:

    label_column: label                       # "label" if left out
    languages:
      en:
        names: [tench, goldfish]              # in the order of the labels, or {label: name},
        # names_column: caption_en            # or a column of the data that holds each row's class name
        templates: ["a photo of a {}.", "a small picture of a {}."]
      zh: ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F

from .data import Table, open_table
from .embed import Encoder
from .ranks import retrieval_ranks
from .results import Benchmark, Score

TOP = (1, 5)
PROTOCOL = (
    "class embedding = normalised mean of the normalised embeddings of its prompts; cosine similarity; equal scores "
    "count in expectation"
)


@dataclass(frozen=True)
class Classes:
    """The classes in one language: `names[label]`, and templates in which `{}` stands for the name."""

    names: dict[int, str]
    templates: tuple[str, ...]


def score_zero_shot(
    encoder: Encoder,
    file: str | Path,
    classes_file: str | Path,
    *,
    image_column: str = "image",
    limit: int | None = None,
) -> Benchmark:
    """Zero-shot classification of the rows of a parquet file (or glob, or folder) into the classes of a YAML file.

    Args:
        limit: use so many rows, evenly spaced.

    Raises:
        ValueError: for missing files or columns, a malformed YAML file, labels that it does not name, languages that
            name different labels.
    """
    table = open_table([file])
    table.require(image_column)
    label_column, classes = read_classes(classes_file, table)  # of all rows, so that a limit does not make it easier
    table = table.limited(limit)
    labels = table.column(label_column)
    if not all(isinstance(label, int) for label in labels):
        raise ValueError(f"Column {label_column!r} of {file} must hold integers, not e.g. {labels[0]!r}.")
    name = f"{Path(table.files[0]).stem}/zero-shot"
    check_classes(name, labels, classes)  # before the images are embedded, which may take hours
    return zero_shot_benchmark(name, encoder, table, encoder.images(table, image_column), labels, classes)


def zero_shot_benchmark(
    name: str,
    encoder: Encoder,
    table: Table,
    image_embeds: torch.Tensor,
    labels: Sequence[int],
    classes: Mapping[str, Classes],
) -> Benchmark:
    """Score embedded images [N, E] with their labels against the classes of each language.

    Classes that no image belongs to stay in the gallery. Classes with equal embeddings (colliding names) share the hit.

    Raises:
        ValueError: for labels without a name, or languages that name different labels.
    """
    check_classes(name, labels, classes)
    known = sorted(next(iter(classes.values())).names)
    metrics: dict[str, dict[str, Score]] = {f"top-{k}": {} for k in TOP}
    notes: dict[str, Any] = {}
    for language, entry in classes.items():
        gallery = class_embeddings(encoder, [entry.names[label] for label in known], entry.templates)
        index = {label: i for i, label in enumerate(known)}
        # Classes are the gallery and images the queries, so accuracy is the "text to image" side of the ranks.
        ranks = retrieval_ranks(gallery, image_embeds, torch.tensor([index[label] for label in labels]))
        for k in TOP:
            metrics[f"top-{k}"][language] = Score(ranks.recall(k).text_to_image, ranks.chance(k).text_to_image)
        repeated = [text for text, count in Counter(entry.names.values()).items() if count > 1]
        if repeated:
            notes[f"{language} names of several classes"] = repeated
    counts = {"images": len(image_embeds), "classes": len(known)}
    return Benchmark(name, PROTOCOL, table.files, counts, metrics, notes)


def check_classes(name: str, labels: Sequence[int], classes: Mapping[str, Classes]) -> None:
    """Raises ValueError for labels without a name, and for languages that name different labels."""
    known = set(next(iter(classes.values())).names)
    for language, entry in classes.items():
        odd = sorted(known ^ set(entry.names))
        if odd:
            raise ValueError(
                f"Every language must name the same labels; {language} differs from the first in {odd[:5]}."
            )
    unknown = sorted(set(labels) - known)
    if unknown:
        raise ValueError(f"{name} has labels without a name: {unknown[:5]} (named: {len(known)} labels).")


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """[C, E] of length 1: for each name the normalised mean of its prompts' normalised embeddings."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    return F.normalize(encoder.texts(prompts).view(len(names), len(templates), -1).mean(dim=1), dim=-1)


def read_classes(path: str | Path, table: Table) -> tuple[str, dict[str, Classes]]:
    """The label column and the classes of each language, as the module's docstring shows the file.

    Raises:
        ValueError: for a missing or malformed file; the message says which entry.
    """
    if not Path(path).is_file():
        raise ValueError(f"No file of class names at {path}.")
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("languages"), dict) or not document["languages"]:
        raise ValueError(f"{path} needs a mapping `languages:` of at least one language; see eval/zero_shot.py.")
    _no_other_keys(path, document, {"label_column", "languages"})
    label_column = document.get("label_column", "label")
    labels = table.column(label_column)
    return label_column, {
        language: _read_language(f"{path}, {language}", entry, table, labels)
        for language, entry in document["languages"].items()
    }


def _read_language(where: str, entry: Any, table: Table, labels: Sequence[Any]) -> Classes:
    if not isinstance(entry, dict) or ("names" in entry) == ("names_column" in entry):
        raise ValueError(f"{where}: give either `names` or `names_column`, and `templates`.")
    _no_other_keys(where, entry, {"names", "names_column", "templates"})
    templates = entry.get("templates")
    if not isinstance(templates, list) or not templates or not all(isinstance(t, str) and "{}" in t for t in templates):
        raise ValueError(
            f"{where}: `templates` must be a list of strings in which {{}} stands for the name, not {templates!r}."
        )
    names = _names_of_column(where, entry["names_column"], table, labels) if "names_column" in entry else entry["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise ValueError(
            f"{where}: `names` must be a list of strings or a mapping of labels to strings, not {names!r}."
        )
    for label, text in names.items():
        if not isinstance(label, int) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: `names` must give a string for each integer label, not {label!r}: {text!r}.")
    return Classes(names, tuple(templates))


def _names_of_column(where: str, column: str, table: Table, labels: Sequence[Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for row, (label, text) in enumerate(zip(labels, table.column(column), strict=True)):
        if names.setdefault(label, text) != text:
            raise ValueError(
                f"{where}: {table.locate(row)} calls label {label} {text!r}, an earlier row {names[label]!r}."
            )
    return names


def _no_other_keys(where: str | Path, mapping: dict[str, Any], allowed: set[str]) -> None:
    other = sorted(set(mapping) - allowed)
    if other:
        raise ValueError(
            f"{where}: unknown entry {', '.join(map(repr, other))}; known are {', '.join(sorted(allowed))}."
        )
