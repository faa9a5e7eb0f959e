"""Multiple choice: which of a few texts, alike but for one thing, is true of an image. The scenes' tasks and the hard
negatives of the fine-grained sets share one layout: a row holds `image_id`, `candidates_LANGUAGE` (lists of texts),
`label` (the true one) and `factor` (what was changed).

Letters: Q questions, E embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .data import Table
from .embed import Encoder
from .ranks import choice_hits
from .results import Benchmark, Score
from .stats import accuracy_sample

LANGUAGES = ("zh", "en")
# The candidate with the highest cosine similarity; equal scores count in expectation.
PROTOCOL = "multiple-choice/chance-1-over-candidates/fp32"


def choice_benchmark(name: str, encoder: Encoder, table: Table, known: Mapping[str, torch.Tensor]) -> Benchmark:
    """Accuracy of choosing the one true candidate, over all questions and per factor.

    Args:
        table: Q questions.
        known: image_id -> embedding [E]; images that are not there are taken from the table's own column `image`.

    Raises:
        ValueError: for missing columns, labels outside the candidates, or an image that is nowhere.
    """
    ids = table.column("image_id")
    new = {image_id: row for row, image_id in enumerate(ids) if image_id not in known}
    if new:
        known = {**known, **dict(zip(new, encoder.images(table, rows=list(new.values())), strict=True))}
    images = torch.stack([known[image_id] for image_id in ids])
    labels, factors = torch.tensor(table.column("label")), table.column("factor")
    names = list(dict.fromkeys(ids))
    place = {image_id: i for i, image_id in enumerate(names)}
    owner = torch.tensor([place[image_id] for image_id in ids])
    benchmark = Benchmark(name, PROTOCOL, table.files, {"questions": len(table), "images": len(names)}, {}, paired=True)
    for language in LANGUAGES:
        candidates = table.column(f"candidates_{language}")
        sizes = torch.tensor([len(own) for own in candidates])
        hits = choice_hits(images, encoder.texts([text for own in candidates for text in own]), sizes, labels)
        samples = []
        for factor in (None, *sorted(set(factors))):
            metric = "accuracy" if factor is None else f"accuracy/{factor.replace(' ', '_')}"
            asked = torch.tensor([row for row, own in enumerate(factors) if factor in (None, own)])
            score = Score(hits[asked].mean().item(), (1 / sizes[asked].double()).mean().item())
            benchmark.metrics.setdefault(metric, {})[language] = score
            samples.append(_sample(metric, hits[asked], owner[asked], names))
        benchmark.samples[language] = tuple(samples)
    return benchmark


def _sample(metric: str, hits: torch.Tensor, owner: torch.Tensor, names: list[str]):
    """Only the images that are asked about: the others are no part of this score."""
    kept, place = torch.unique(owner, return_inverse=True)
    return accuracy_sample({metric: hits}, place, image_ids=[names[i] for i in kept.tolist()])
