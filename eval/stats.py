"""How far a score can be trusted: bootstrap intervals over images, and paired tests of models and of languages.

    zh, en = retrieval_sample(zh_ranks, zh_owner), retrieval_sample(en_ranks, en_owner)
    bootstrap(zh)["mean_recall"].low, paired_bootstrap(zh, en)["mean_recall"].p_value

Letters: N images, Q queries, C scores, R resamples.

The captions of one image succeed and fail together, so whole images are drawn, with all their queries ("cluster
bootstrap": Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). The gallery is the
benchmark's and stays as it is: ranks are not counted again. All that a resample then needs are sums over the images
drawn, so it is one row of a [R, N] @ [N, C] product, cut into blocks of R: no [R, Q] matrix exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .ranks import RECALL_AT, RetrievalRanks, hit_probability

# Draws held at a time: three arrays of this size and 8 bytes, 24 MB.
DRAWS_AT_ONCE = 2**20

# Two scores are the same if they differ by less: rounding of fp64 sums. One more hit in a million queries is 1e-6.
SAME = 1e-12


@dataclass(frozen=True)
class Sample:
    """The scores of one system on one benchmark, as sums over each image: all that resampling images needs."""

    names: tuple[str, ...]
    """[C] what each column is, e.g. "text_to_image_R@1"."""
    hits: np.ndarray
    """[N, C] fp64 >= 0: the sum of the queries of each image that were hits (fractions where answers tie)."""
    queries: np.ndarray
    """[N, C] fp64 >= 0: the number of queries of each image. A score is total hits / total queries."""
    mean: str | None = None
    """The name of one more score, the mean of the C others (the mean recall); None for none."""
    image_ids: tuple[str, ...] | None = None
    """[N] which images they are; systems of which both say so are compared on the same images only."""


@dataclass(frozen=True)
class Interval:
    """A score in [0, 1] and the percentile interval around it. All hits or no hits give an interval of width 0."""

    value: float
    """The score on the images as they are, in [0, 1]; not the mean of the resamples."""
    low: float
    high: float
    confidence: float
    """In (0, 1): 0.95 if `low` and `high` are the 2.5th and 97.5th percentiles of the resamples."""


@dataclass(frozen=True)
class Difference:
    """One system's score minus another's on the same images, in [-1, 1], and the percentile interval around it."""

    value: float
    """The difference on the images as they are, in [-1, 1]."""
    low: float
    high: float
    confidence: float
    """In (0, 1), as for `Interval`."""
    p_value: float
    """Two-sided, in [2 / (R + 1), 1]: how readily resampling turns the sign of the difference round; 1 for systems
    that score the same in every resample. It is below 1 - confidence where the interval leaves 0 out (up to one
    resample)."""


def retrieval_sample(
    ranks: RetrievalRanks, text_to_image: torch.Tensor | np.ndarray, *, image_ids: Sequence[str] | None = None
) -> Sample:
    """R@1, R@5 and R@10 of both directions and "mean_recall", as `RetrievalRanks.recall` gives them.

    Args:
        ranks: of N images and M texts. Images without a right text are distractors: they are in the gallery of every
            resample, and are not drawn. Texts without a right image are no queries.
        text_to_image: [M] integers in [0, N): the image that each text is drawn with, as for `retrieval_ranks`; of a
            text that is right for several images (`ranks.distinct_texts`) one of them, e.g. the first.
        image_ids: [N] strings that name the images, so that `paired_bootstrap` can refuse to pair different ones.

    Raises:
        ValueError: if `text_to_image` or `image_ids` do not fit the ranks.
    """
    owner = torch.as_tensor(text_to_image).cpu()
    if owner.is_floating_point() or owner.dtype == torch.bool or owner.shape != ranks.text_greater.shape:
        seen = f"{owner.dtype} {list(owner.shape)}"
        raise ValueError(
            f"text_to_image must hold one integer for each of the {len(ranks.text_greater)} texts: {seen}."
        )
    images = len(ranks.captions)
    asks = (ranks.captions > 0).nonzero().flatten()
    if int(owner.amin()) < 0 or int(owner.amax()) >= images:
        raise ValueError(f"text_to_image goes from {int(owner.amin())} to {int(owner.amax())}, for {images} images.")
    wrong = (torch.bincount(owner.long(), minlength=images) > ranks.captions).nonzero().flatten().tolist()
    if wrong:
        owned = int((owner == wrong[0]).sum())
        raise ValueError(
            f"text_to_image gives image {wrong[0]} {owned} texts, but it was ranked with "
            f"{int(ranks.captions[wrong[0]])}: these are the ranks of another data set or language."
        )
    image_counts = ranks.image_greater[asks], ranks.image_equal[asks], ranks.image_best[asks]
    queries = ranks.text_images > 0
    text_counts = ranks.text_greater[queries], ranks.text_equal[queries], ranks.text_best[queries]
    directions = (("text_to_image", text_counts, owner[queries]), ("image_to_text", image_counts, asks))
    columns = {
        f"{direction}_R@{k}": _per_image(hit_probability(*counts, k), query_image, images)
        for direction, counts, query_image in directions
        for k in RECALL_AT
    }
    return _sample(columns, mean="mean_recall", image_ids=image_ids)


def accuracy_sample(
    hits: Mapping[str, torch.Tensor | np.ndarray],
    query_image: torch.Tensor | np.ndarray | None = None,
    *,
    image_ids: Sequence[str] | None = None,
) -> Sample:
    """Accuracies of questions about images: zero-shot classification, multiple choice (`ranks.choice_hits`).

    Args:
        hits: score name -> [Q] fractions in [0, 1], one for each question; the same questions under every name.
        query_image: [Q] integers >= 0: the image that each question is about; one image per question if left out.
        image_ids: [N] strings that name the images, N being the largest of `query_image` plus one.

    Raises:
        ValueError: for no scores or questions, other shapes, or hits outside [0, 1].
    """
    values = {name: torch.as_tensor(value).detach().cpu().double() for name, value in hits.items()}
    shapes = {tuple(value.shape) for value in values.values()}
    if len(shapes) != 1 or len(*shapes) != 1 or not next(iter(values.values())).numel():
        raise ValueError(f"Hits must be one fraction for each of at least one question, not of shapes {shapes or {}}.")
    for name, value in values.items():
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"The hits of {name} must lie in [0, 1], not {value.amin():.4g} to {value.amax():.4g}.")
    questions = len(next(iter(values.values())))
    owner = torch.arange(questions) if query_image is None else torch.as_tensor(query_image).cpu()
    if owner.is_floating_point() or owner.dtype == torch.bool or len(owner) != questions or int(owner.amin()) < 0:
        raise ValueError(f"query_image must hold an integer >= 0 for each of the {questions} questions.")
    images = int(owner.amax()) + 1
    return _sample({name: _per_image(value, owner, images) for name, value in values.items()}, image_ids=image_ids)


def bootstrap(sample: Sample, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> dict[str, Interval]:
    """The percentile interval of every score of a sample.

    Args:
        resamples: R; the ends of a 95 % interval from 1,000 are steady to about a twentieth of its width.
        confidence: in (0, 1).
        seed: the same seed gives the same draws for any two samples of as many images.

    Returns:
        score name -> interval, in the order of the sample, the mean last.

    Raises:
        ValueError: for no queries, `resamples` < 1 or `confidence` outside (0, 1).
    """
    _check(resamples, confidence)
    values, resampled = _scores([sample], resamples, seed)
    low, high = _percentiles(resampled[0], confidence)
    return {
        name: Interval(float(values[0, c]), float(low[c]), float(high[c]), confidence)
        for c, name in enumerate(_names(sample))
    }


def paired_bootstrap(
    first: Sample, second: Sample, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """`first` minus `second`, both scored on the same draws of images: two models, or two languages of one model.

    How hard an image is counts for both and cancels, so that the interval is narrower than two intervals laid side by
    side suggest. The p-value is the achieved significance level of the percentile interval,
    2 min(P(difference <= 0), P(difference >= 0)), with the images as they are counted among the resamples so that it
    is never 0 (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 15.4; Davison and Hinkley,
    equation 4.11).

    Args:
        first, second: samples of the same images, in the same order, with the same scores. The number of queries per
            image may differ, as it does between languages.
        resamples: R; the p-value is a multiple of 2 / (R + 1).
        confidence: in (0, 1).
        seed: as for `bootstrap`.

    Returns:
        score name -> difference.

    Raises:
        ValueError: for different images or scores, and as for `bootstrap`.
    """
    _check(resamples, confidence)
    _check_paired(first, second)
    values, resampled = _scores([first, second], resamples, seed)
    value, differences = values[0] - values[1], resampled[0] - resampled[1]
    low, high = _percentiles(differences, confidence)
    turned = np.minimum((differences <= SAME).sum(0), (differences >= -SAME).sum(0))
    p_value = np.minimum(1.0, 2 * (1 + turned) / (resamples + 1))
    return {
        name: Difference(float(value[c]), float(low[c]), float(high[c]), confidence, float(p_value[c]))
        for c, name in enumerate(_names(first))
    }


def _per_image(hits: torch.Tensor, query_image: torch.Tensor, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Total hits and queries of every image, [N] each."""
    owner = query_image.numpy()
    return np.bincount(owner, hits.numpy(), images), np.bincount(owner, minlength=images).astype(np.float64)


def _sample(
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    mean: str | None = None,
    image_ids: Sequence[str] | None,
) -> Sample:
    hits, queries = (np.stack(parts, axis=1) for parts in zip(*columns.values(), strict=True))
    if image_ids is not None and len(image_ids) != len(hits):
        raise ValueError(f"There are {len(hits)} images but {len(image_ids)} image_ids.")
    return Sample(tuple(columns), hits, queries, mean, None if image_ids is None else tuple(image_ids))


def _names(sample: Sample) -> list[str]:
    return [*sample.names, *([] if sample.mean is None else [sample.mean])]


def _check(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise ValueError(f"The bootstrap needs at least 1 resample, not {resamples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a fraction between 0 and 1, both excluded, e.g. 0.95: not {confidence}.")


def _check_paired(first: Sample, second: Sample) -> None:
    if _names(first) != _names(second):
        raise ValueError(f"Only the same scores can be compared, not {_names(first)} and {_names(second)}.")
    if len(first.hits) != len(second.hits):
        raise ValueError(
            f"A paired test needs the same images: one system was scored on {len(first.hits)}, the other on "
            f"{len(second.hits)}."
        )
    if first.image_ids is not None and second.image_ids is not None and first.image_ids != second.image_ids:
        pairs = enumerate(zip(first.image_ids, second.image_ids, strict=True))
        i, (left, right) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise ValueError(f"A paired test needs the same images in one order, but image {i} is {left!r} and {right!r}.")


def _scores(samples: Sequence[Sample], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The scores of each system on the images as they are [systems, C], and on the resamples [systems, R, C]."""
    # Images without a query in any system are not questions, so they are not drawn.
    asks = np.any([sample.queries.any(1) for sample in samples], axis=0)
    if not asks.any():
        raise ValueError(f"There is nothing to resample: none of the {len(asks)} images has a query.")
    kept = [Sample(s.names, s.hits[asks], s.queries[asks], s.mean) for s in samples]
    values = np.concatenate([_ratios(s, np.ones((1, int(asks.sum())))) for s in kept])
    blocks = [[_ratios(s, counts) for s in kept] for counts in _draws(int(asks.sum()), resamples, seed)]
    return values, np.stack([np.concatenate(parts) for parts in zip(*blocks, strict=True)])


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, [rows, N] fp64 at a time. Row by row the draws are `integers(N, size=N)` of one
    generator, so they do not depend on where the blocks end."""
    generator = np.random.default_rng(seed)
    block = max(1, DRAWS_AT_ONCE // images)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(images, size=(rows, images))
        drawn += np.arange(rows)[:, None] * images
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)


def _ratios(sample: Sample, counts: np.ndarray) -> np.ndarray:
    """The scores of images drawn `counts` [rows, N] times: [rows, C], or [rows, C + 1] with the mean."""
    queries = counts @ sample.queries
    if not queries.all():
        column = int(np.flatnonzero((queries == 0).any(0))[0])
        few = int((sample.queries[:, column] > 0).sum())
        raise ValueError(
            f"A resample holds no query for {sample.names[column]}: only {few} of {len(sample.queries)} images ask one."
        )
    ratios = (counts @ sample.hits) / queries
    return ratios if sample.mean is None else np.concatenate([ratios, ratios.mean(1, keepdims=True)], axis=1)


def _percentiles(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The two ends of the percentile interval of [R, C] resampled scores: [C] each."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
