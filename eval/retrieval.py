"""Image-text retrieval: R@1/5/10 in both directions and their mean, per language.

python -m eval run --model DIR --retrieval FILES --captions en=caption_en zh=caption_zh --output OUT_DIR
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .data import Table, caption_list, open_table
from .embed import Encoder
from .ranks import RECALL_AT, RetrievalRanks, retrieval_ranks
from .results import Benchmark, Score

PROTOCOL = (
    "any-hit R@K over all images and all texts of one language; a text's own image is right; equal scores count "
    "in expectation; cosine similarity in fp32, near ties resolved in fp64"
)


def evaluate_retrieval(
    model: torch.nn.Module,
    processor: Any,
    files: Sequence[str | Path],
    *,
    captions: Mapping[str, str],
    image_column: str = "image",
    limit: int | None = None,
    batch_size: int = 128,
) -> dict[str, float]:
    """Retrieval on parquet files, as `{"NAME/zh/text_to_image_R@1": fraction, ...}` for a training log.

    NAME is the stem of the first file. See `score_retrieval` for the arguments and errors.
    """
    encoder = Encoder(model, processor, batch_size)
    return score_retrieval(encoder, files, captions=captions, image_column=image_column, limit=limit).flat()


def score_retrieval(
    encoder: Encoder,
    files: Sequence[str | Path],
    *,
    captions: Mapping[str, str],
    image_column: str = "image",
    limit: int | None = None,
) -> Benchmark:
    """Retrieval over all rows of parquet files, every row one image.

    Args:
        files: files, globs or folders, together one data set.
        captions: language -> column, which holds one caption or a list of captions per row.
        limit: use so many rows, evenly spaced.

    Raises:
        ValueError: for missing files or columns, images that cannot be decoded, or a language without any caption.
    """
    table = open_table(files).limited(limit)
    table.require(image_column, *captions.values())
    if not captions:
        raise ValueError("Name a caption column for each language, e.g. en=caption_en zh=caption_zh.")
    texts = {language: [caption_list(cell) for cell in table.column(name)] for language, name in captions.items()}
    for language, lists in texts.items():  # before the images are embedded, which may take hours
        if not any(lists):
            name = captions[language]
            raise ValueError(f"Column {name!r} of {table.files[0]} has no {language} caption in its {len(lists)} rows.")
    embeds = encoder.images(table, image_column)
    return retrieval_benchmark(Path(table.files[0]).stem, encoder, table, embeds, texts)


def retrieval_benchmark(
    name: str, encoder: Encoder, table: Table, image_embeds: torch.Tensor, captions: Mapping[str, list[list[str]]]
) -> Benchmark:
    """Score embedded images [N, E] against the captions of each language: one list per image, not all of them empty."""
    counts, metrics, notes = {"images": len(image_embeds)}, {}, {}
    for language, lists in captions.items():
        texts = [text for own in lists for text in own]
        owner = torch.tensor([i for i, own in enumerate(lists) for _ in own])
        ranks = retrieval_ranks(image_embeds, encoder.texts(texts), owner)
        counts[f"{language} texts"] = len(texts)
        if ranks.num_images_without_text:
            notes[f"images without {language} text"] = ranks.num_images_without_text
        if ranks.num_tied_queries:
            notes[f"{language} queries with ties"] = ranks.num_tied_queries
        for metric, score in _scores(ranks).items():
            metrics.setdefault(metric, {})[language] = score
    return Benchmark(name, PROTOCOL, table.files, counts, metrics, notes)


def _scores(ranks: RetrievalRanks) -> dict[str, Score]:
    scores = {
        f"{direction}_R@{k}": Score(getattr(ranks.recall(k), direction), getattr(ranks.chance(k), direction))
        for direction in ("text_to_image", "image_to_text")
        for k in RECALL_AT
    }
    return {**scores, "mean_recall": Score(ranks.mean_recall(), ranks.mean_recall_chance())}
