"""Image-text retrieval: R@1/5/10 in both directions and their means, per language.

    python -m eval run --models DIR --tasks flickr30k,flickr8k-cn --output OUT_DIR
    python -m eval run --model DIR --retrieval FILES --captions en=caption_en zh=caption_zh --output OUT_DIR

Letters: N images, M texts, E embedding size.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from .data import Source, Table, open_data, open_table
from .embed import Encoder
from .ranks import RECALL_AT, RetrievalRanks, distinct_texts, retrieval_ranks, text_equal_pairs
from .results import Benchmark, Score
from .stats import Sample, retrieval_sample
from .tasks import Task

Positives = Literal["text-equal", "owner"]
DIRECTIONS = ("text_to_image", "image_to_text")
TEXT_COUNTS = ("images", "greater", "equal", "best")


@dataclass(frozen=True)
class Captioned:
    """Images and their captions, ready to be embedded."""

    table: Table
    image_column: str
    captions: dict[str, list[list[str]]]
    """language -> image -> captions: one list for each of the N rows of the table."""
    image_ids: tuple[str, ...] | None = None


def evaluate_retrieval(
    model: torch.nn.Module,
    processor: Any,
    files: Sequence[str | Path],
    *,
    captions: Mapping[str, str],
    image_column: str = "image",
    limit: int | None = None,
    batch_size: int = 128,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Retrieval on parquet files, as `{"NAME/zh/text_to_image_R@1": fraction, ...}` for a training log.

    NAME is the stem of the first file. See `score_retrieval` for the arguments and errors.

    Args:
        group: the processes that share the embedding: each of them makes this call with the same arguments, and each
            gets the result. None: this process works alone.
    """
    from .models import adapt

    encoder = Encoder(adapt(model, processor), batch_size=batch_size, group=group)
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
    texts = {language: table.captions(name) for language, name in captions.items()}
    for language, lists in texts.items():  # before the images are embedded, which may take hours
        if not any(lists):
            name = captions[language]
            raise ValueError(f"Column {name!r} of {table.files[0]} has no {language} caption in its {len(lists)} rows.")
    return retrieval_benchmark(Path(table.files[0]).stem, encoder, Captioned(table, image_column, texts), paired=True)


def read_captioned(task: Task, source: Source | None = None) -> Captioned:
    """The images and captions of a retrieval task, whole.

    Args:
        source: where the data lie, see `eval.data.open_data`.

    Raises:
        ValueError: for data that are missing, lack a column or split, or whose languages describe different images
            although the task is paired.
    """
    tables = open_data(task.data, task.columns, source)
    columns = task.columns
    table = next(iter(tables.values()))
    for language, column in columns.captions.items():
        tables.get(language, table).require(column)
    table.require(columns.image)
    ids = _image_ids(table, columns.image_id)
    captions = {}
    for language in task.languages:
        own = tables.get(language, table)
        lists = [_first(some, task) for some in own.captions(columns.captions[language], columns.caption_separator)]
        captions[language] = lists if own is table else _aligned(task, language, own, lists, ids or ())
    return Captioned(table, columns.image, captions, ids)


def retrieval_benchmark(
    name: str,
    encoder: Encoder,
    data: Captioned,
    *,
    image_embeds: torch.Tensor | None = None,
    protocol: str = "any-hit/text-equal/fp32",
    positives: Positives = "text-equal",
    paired: bool = False,
    gallery: Mapping[str, Sequence[str]] | None = None,
) -> Benchmark:
    """Score images against the captions of each language, not all of them empty.

    Args:
        image_embeds: [N, E] if they are there already.
        positives: see `Task.positives`.
        paired: whether the languages are to be compared.
        gallery: language -> the distinct texts of the set. A text that several images have is then one query and one
            answer (the fine-grained sets), not one for each of them (the photo sets).
    """
    if image_embeds is None:
        image_embeds = encoder.images(data.table, data.image_column)
    benchmark = Benchmark(
        name, protocol, data.table.files, {"images": len(image_embeds)}, {}, paired=paired, revision=data.table.revision
    )
    for language, lists in data.captions.items():
        texts = [text for own in lists for text in own]
        owner = torch.tensor([i for i, own in enumerate(lists) for _ in own])
        if gallery is not None:
            texts, pairs = distinct_texts(texts, owner)
            owner = _first_image(pairs, len(texts))
            lone = [text for text in gallery[language] if text not in set(texts)]
        else:
            pairs, lone = (text_equal_pairs(texts, owner) if positives == "text-equal" else owner), []
        ranks = retrieval_ranks(image_embeds, encoder.texts([*texts, *lone]), pairs)
        benchmark.counts[f"{language} texts"] = len(texts) + len(lone)
        _add(benchmark, language, ranks, owner, data.image_ids)
    return benchmark


def _first_image(pairs: torch.Tensor, texts: int) -> torch.Tensor:
    """[texts]: the first image of each text, with which it is drawn in a resample."""
    first = torch.full((texts,), torch.iinfo(torch.long).max)
    return first.scatter_reduce(0, pairs[:, 0], pairs[:, 1], "amin")


def _first(captions: list[str], task: Task) -> list[str]:
    return captions[: task.captions_per_image]


def _image_ids(table: Table, column: str | None) -> tuple[str, ...] | None:
    if column is None:
        return None
    values = [str(value["path"] if isinstance(value, dict) else value) for value in table.column(column)]
    twice, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{table.files[0]}: the image {twice!r} stands in {count} rows of column {column!r}.")
    return tuple(values)


def _aligned(task: Task, language: str, table: Table, lists: list[list[str]], ids: tuple[str, ...]) -> list[list[str]]:
    """The captions of another table in the order of `ids`."""
    known = dict(zip(_image_ids(table, task.columns.image_id) or (), lists, strict=True))
    missing = [image for image in ids if image not in known]
    extra = len(known) - (len(ids) - len(missing))
    if task.paired and (missing or extra):
        raise ValueError(
            f"{task.name} is paired, but {language} has no row for {len(missing)} of {len(ids)} images "
            f"({', '.join(missing[:3])}) and {extra} rows of other images."
        )
    return [known.get(image, []) for image in ids]


def _add(
    benchmark: Benchmark,
    language: str,
    ranks: RetrievalRanks,
    owner: torch.Tensor,
    image_ids: tuple[str, ...] | None,
) -> None:
    """The scores of one language, and what they come from."""
    if ranks.num_images_without_text:
        benchmark.notes[f"images without {language} text"] = ranks.num_images_without_text
    if ranks.num_tied_queries:
        benchmark.notes[f"{language} queries with ties"] = ranks.num_tied_queries
    for metric, score in _scores(ranks).items():
        benchmark.metrics.setdefault(metric, {})[language] = score
    # Texts that no image has are wrong answers and no queries: they come after the others, and nothing draws them.
    queries = {f"text_{entry}": getattr(ranks, f"text_{entry}")[: len(owner)] for entry in TEXT_COUNTS}
    sample = retrieval_sample(dataclasses.replace(ranks, **queries), owner, image_ids=image_ids)
    benchmark.samples[language] = _samples(sample)
    for name, values in dataclasses.asdict(ranks).items():
        benchmark.ranks[f"{language}/{name}"] = values.numpy()


def _scores(ranks: RetrievalRanks) -> dict[str, Score]:
    """R@K and their mean in each direction, and the mean of all six (the paper's MR; its Table 7 has the others)."""
    scores: dict[str, Score] = {}
    for direction in DIRECTIONS:
        own = {
            f"{direction}_R@{k}": Score(getattr(ranks.recall(k), direction), getattr(ranks.chance(k), direction))
            for k in RECALL_AT
        }
        values, chances = zip(*own.values(), strict=True)
        scores |= own
        scores[f"{direction}_mean_recall"] = Score(sum(values) / len(values), sum(chances) / len(chances))
    return {**scores, "mean_recall": Score(ranks.mean_recall(), ranks.mean_recall_chance())}


def _samples(both: Sample) -> tuple[Sample, ...]:
    """The sample of both directions, whose mean is the mean recall, and one of each direction for its own mean."""
    parts = []
    for direction in DIRECTIONS:
        columns = [c for c, name in enumerate(both.names) if name.startswith(direction)]
        parts.append(
            Sample(
                tuple(both.names[c] for c in columns),
                both.hits[:, columns],
                both.queries[:, columns],
                f"{direction}_mean_recall",
                both.image_ids,
            )
        )
    return (*parts, both)


def limited(data: Captioned, limit: int | None) -> Captioned:
    """At most `limit` images, evenly spaced."""
    table = data.table.limited(limit)
    if table is data.table:
        return data
    rows = [i * len(data.table) // len(table) for i in range(len(table))]
    captions = {language: [lists[row] for row in rows] for language, lists in data.captions.items()}
    ids = None if data.image_ids is None else tuple(data.image_ids[row] for row in rows)
    return Captioned(table, data.image_column, captions, ids)
