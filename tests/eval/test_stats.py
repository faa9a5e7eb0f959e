"""Intervals and paired tests: by hand, against a plain loop and scipy, and their coverage where the truth is known."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.stats
import torch

from eval import stats
from eval.ranks import RECALL_AT, RetrievalRanks, retrieval_ranks
from eval.stats import Interval, Sample, accuracy_sample, bootstrap, paired_bootstrap, retrieval_sample

NAMES = [f"{direction}_R@{k}" for direction in ("text_to_image", "image_to_text") for k in RECALL_AT]


def embeddings(images: int = 61, *, noise: float = 1.2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Images, texts and owners: one to six texts per image, in no order; the last image has none."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(images, 16, generator=generator)
    owner = torch.repeat_interleave(torch.arange(images - 1), torch.arange(images - 1) % 6 + 1)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    return embeds, embeds[owner] + noise * torch.randn(len(owner), 16, generator=generator), owner


def system(**kwargs) -> tuple[RetrievalRanks, torch.Tensor]:
    images, texts, owner = embeddings(**kwargs)
    return retrieval_ranks(images, texts, owner), owner


def sample(**kwargs) -> Sample:
    return retrieval_sample(*system(**kwargs))


def correct(*hits: float) -> Sample:
    return accuracy_sample({"accuracy": np.array(hits)})


def test_values_are_those_of_the_scorer():
    ranks, owner = system()
    intervals = bootstrap(retrieval_sample(ranks, owner), resamples=10)
    assert list(intervals) == [*NAMES, "mean_recall"]
    for k in RECALL_AT:
        for direction in ("text_to_image", "image_to_text"):
            expected = getattr(ranks.recall(k), direction)
            assert intervals[f"{direction}_R@{k}"].value == pytest.approx(expected, abs=1e-12)
    assert intervals["mean_recall"].value == pytest.approx(ranks.mean_recall(), abs=1e-12)


def test_two_images_by_hand():
    """One hit, one miss: resamples score 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4."""
    for seed in range(5):
        wide = bootstrap(correct(1, 0), seed=seed)["accuracy"]
        assert wide == Interval(value=0.5, low=0.0, high=1.0, confidence=0.95)
        narrow = bootstrap(correct(1, 0), confidence=0.4, seed=seed)["accuracy"]  # the 30th and 70th percentiles
        assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_all_resamples_of_four_images_by_hand():
    """Images with 1 to 4 questions: percentiles of all 4^4 equally likely resamples."""
    hits, questions = np.array([1.0, 0.0, 2.5, 4.0]), np.array([1.0, 2.0, 3.0, 4.0])
    drawn = np.array(list(itertools.product(range(4), repeat=4)))
    scores = hits[drawn].sum(1) / questions[drawn].sum(1)
    # Percentiles at which the distribution is flat, so that sampling error cannot move the result.
    steady = [c for c in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95) if _flat(scores, (1 - c) / 2) and _flat(scores, (1 + c) / 2)]
    assert steady
    answers = accuracy_sample(
        {"accuracy": [1, 0, 0, 1, 1, 0.5, 1, 1, 1, 1]}, torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    )
    assert answers.hits[:, 0].tolist() == hits.tolist() and answers.queries[:, 0].tolist() == questions.tolist()
    for confidence in steady:
        expected = np.quantile(scores, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
        interval = bootstrap(answers, resamples=20_000, confidence=confidence)["accuracy"]
        assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=1e-9)


def _flat(values: np.ndarray, quantile: float) -> bool:
    ends = np.quantile(values, [quantile - 0.01, quantile + 0.01], method="inverted_cdf")
    return ends[1] - ends[0] < 1e-9


def loop(ranks: RetrievalRanks, owner: torch.Tensor, resamples: int, seed: int) -> np.ndarray:
    """Draw images, lay their queries side by side, and score those. [R, 7]"""
    generator = np.random.default_rng(seed)
    asking = np.flatnonzero(ranks.captions.numpy())
    texts_of = [np.flatnonzero(owner.numpy() == image) for image in range(len(ranks.captions))]
    rows = []
    for _ in range(resamples):
        images = asking[generator.integers(len(asking), size=len(asking))]
        texts = np.concatenate([texts_of[image] for image in images])
        # Without ties a hit at K has fewer than K wrong answers above it.
        row = [
            np.mean(greater.numpy()[queries] < k)
            for greater, queries in ((ranks.text_greater, texts), (ranks.image_greater, images))
            for k in RECALL_AT
        ]
        rows.append([*row, np.mean(row)])
    return np.array(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_plain_loop(seed: int):
    ranks, owner = system()
    assert ranks.num_tied_queries == 0 and ranks.num_images_without_text == 1
    _same_as_loop(ranks, owner, resamples=300, seed=seed)


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "DRAWS_AT_ONCE", 500)  # 8 resamples of 60 images
    ranks, owner = system(seed=2)
    _same_as_loop(ranks, owner, resamples=101, seed=3)


def _same_as_loop(ranks: RetrievalRanks, owner: torch.Tensor, *, resamples: int, seed: int) -> None:
    expected = loop(ranks, owner, resamples, seed)
    intervals = bootstrap(retrieval_sample(ranks, owner), resamples=resamples, confidence=0.9, seed=seed)
    for column, interval in enumerate(intervals.values()):
        percentiles = np.percentile(expected[:, column], [5, 95])
        assert (interval.low, interval.high) == pytest.approx(tuple(percentiles), abs=1e-12)


def test_paired_equals_a_plain_loop():
    (first, owner), (second, _) = system(noise=1.0), system(noise=1.3)
    resamples = 400
    differences = loop(first, owner, resamples, 7) - loop(second, owner, resamples, 7)
    found = paired_bootstrap(retrieval_sample(first, owner), retrieval_sample(second, owner), resamples=400, seed=7)
    assert list(found) == [*NAMES, "mean_recall"]
    for column, (name, difference) in enumerate(found.items()):
        values = differences[:, column]
        assert (difference.low, difference.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-12)
        turned = min((values < 1e-9).sum(), (values > -1e-9).sum())
        assert difference.p_value == pytest.approx(min(1, 2 * (turned + 1) / (resamples + 1)), abs=1e-12), name
    assert found["mean_recall"].value == pytest.approx(first.mean_recall() - second.mean_recall(), abs=1e-12)
    assert found["mean_recall"].value > 0.02 and found["mean_recall"].p_value < 0.05


def test_agrees_with_scipy():
    """Another implementation, other draws: the ends agree within their sampling error (about 0.03 standard errors)."""
    ranks, owner = system()
    found = retrieval_sample(ranks, owner)
    hits, queries = found.hits[:-1, 0], found.queries[:-1, 0]  # the last image has no text
    result = scipy.stats.bootstrap(
        (hits, queries),
        lambda h, q, axis: h.sum(axis) / q.sum(axis),
        paired=True,
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(123),
    )
    interval = bootstrap(found, resamples=9999)["text_to_image_R@1"]
    expected = result.confidence_interval
    close = 0.15 * result.standard_error
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=close)


def test_identical_systems_do_not_differ():
    for difference in paired_bootstrap(sample(), sample(), resamples=200).values():
        assert (difference.value, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)


def test_paired_p_value_by_hand():
    """Of two images the first system has both and the second has one: the difference is 0 in a quarter of all draws,
    and never negative, so p is 2 x 1/4 up to sampling error. Turned round it changes sign and nothing else."""
    better = paired_bootstrap(correct(1, 1), correct(1, 0), resamples=10_000)["accuracy"]
    assert (better.value, better.low, better.high) == (0.5, 0.0, 1.0)
    assert better.p_value == pytest.approx(0.5, abs=0.03)
    worse = paired_bootstrap(correct(1, 0), correct(1, 1), resamples=10_000)["accuracy"]
    assert (worse.value, worse.low, worse.high, worse.p_value) == (-0.5, -1.0, 0.0, better.p_value)
    # A difference that no draw can take away: the smallest p-value that so many resamples allow.
    assert paired_bootstrap(correct(1, 1), correct(0, 0), resamples=99)["accuracy"].p_value == pytest.approx(0.02)


def test_pairing_narrows_the_interval():
    """Two systems that fail on the same images: paired, the difference is far better known than either score."""
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5
    first, second = correct(*np.where(hard, 0, 1)), correct(*np.where(hard | (rng.random(500) < 0.05), 0, 1))
    alone, paired = bootstrap(first)["accuracy"], paired_bootstrap(first, second)["accuracy"]
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)
    assert paired.p_value < 0.01


def test_languages_may_have_different_numbers_of_captions():
    """One language with every caption five times: the same recalls, so no difference in any resample."""
    rng = np.random.default_rng(1)
    hit, image = rng.random(40), np.arange(40)
    once = accuracy_sample({"accuracy": hit}, image)
    five = accuracy_sample({"accuracy": np.repeat(hit, 5)}, np.repeat(image, 5))
    difference = paired_bootstrap(once, five)["accuracy"]
    assert abs(difference.value) < 1e-12 and abs(difference.low) < 1e-12 and difference.p_value == 1
    # And repeating an image's captions makes nobody surer: the cluster is the image.
    alone, repeated = bootstrap(once)["accuracy"], bootstrap(five)["accuracy"]
    assert dataclasses.astuple(repeated) == pytest.approx(dataclasses.astuple(alone), abs=1e-12)


def test_order_of_texts_changes_nothing_and_the_seed_decides():
    images, texts, owner = embeddings()
    shuffled = torch.randperm(len(owner), generator=torch.Generator().manual_seed(1))
    straight = bootstrap(retrieval_sample(retrieval_ranks(images, texts, owner), owner))
    other = retrieval_sample(retrieval_ranks(images, texts[shuffled], owner[shuffled]), owner[shuffled].numpy())
    assert bootstrap(other) == straight == bootstrap(sample(), seed=0)
    assert bootstrap(other, seed=1) != straight


def test_ties_count_in_expectation():
    """A constant model has a hit probability and no luck: every image the same score, an interval of no width."""
    owner = torch.arange(20) // 2
    ranks = retrieval_ranks(torch.ones(10, 4), torch.ones(20, 4), owner)
    interval = bootstrap(retrieval_sample(ranks, owner))["text_to_image_R@1"]
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)


def test_texts_that_are_right_for_several_images_or_for_none():
    """By pairs: the values are the scorer's, and a text without a right image is no query."""
    images, texts, _ = embeddings()
    pairs = torch.tensor([[t, i] for t in range(0, len(texts) - 5) for i in (t % 61, (3 * t) % 40)])
    ranks = retrieval_ranks(images, texts, pairs)
    assert ranks.num_texts_without_image == 5
    found = bootstrap(retrieval_sample(ranks, torch.arange(len(texts)) % 61), resamples=10)
    for k in RECALL_AT:
        assert found[f"text_to_image_R@{k}"].value == pytest.approx(ranks.recall(k).text_to_image, abs=1e-12)
        assert found[f"image_to_text_R@{k}"].value == pytest.approx(ranks.recall(k).image_to_text, abs=1e-12)


def test_one_image():
    ranks = retrieval_ranks(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]))
    interval = bootstrap(retrieval_sample(ranks, torch.tensor([0])), resamples=3)["mean_recall"]
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)


def test_coverage():
    """Images of known difficulty, five captions each that succeed or fail together: 95 % intervals hold the truth in 95
    of 100 experiments. Captions drawn one by one would hold it in about 70."""
    rng = np.random.default_rng(0)
    experiments, images, captions = 200, 120, 5
    image = np.repeat(np.arange(images), captions)
    clustered = alone = 0
    for seed in range(experiments):
        chance = rng.beta(0.6, 0.4, images)  # mean 0.6
        hits = (rng.random((images, captions)) < chance[:, None]).astype(float).ravel()
        interval = bootstrap(accuracy_sample({"x": hits}, image), resamples=200, seed=seed)["x"]
        clustered += interval.low <= 0.6 <= interval.high
        if seed < 60:
            naive = bootstrap(accuracy_sample({"x": hits}), resamples=200, seed=seed)["x"]
            alone += naive.low <= 0.6 <= naive.high
    assert 0.91 <= clustered / experiments <= 0.98  # 0.95 is 2.6 and 2 standard errors away
    assert alone / 60 < 0.85


def test_memory_does_not_grow_with_resamples_times_texts():
    """5,000 images, 25,000 texts, 1,000 resamples: a matrix of the last two would take 200 MB in fp64."""
    owner = torch.arange(25_000) // 5
    greater = torch.randint(0, 30, (30_000,), generator=torch.Generator().manual_seed(0))
    none, one = torch.zeros(5000, dtype=torch.long), torch.ones(5000, dtype=torch.long)
    texts = (one.repeat(5), greater[5000:], none.repeat(5), one.repeat(5))
    ranks = RetrievalRanks(5 * one, greater[:5000], none, one, *texts)
    found = retrieval_sample(ranks, owner)
    tracemalloc.start()
    try:
        paired_bootstrap(found, found, resamples=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, float("nan")])
def test_confidence_is_a_fraction(confidence: float):
    with pytest.raises(ValueError, match="confidence is a fraction"):
        bootstrap(correct(1, 0), confidence=confidence)
    with pytest.raises(ValueError, match="confidence is a fraction"):
        paired_bootstrap(correct(1, 0), correct(1, 0), confidence=confidence)


def test_bad_input_is_named():
    ranks, owner = system()
    with pytest.raises(ValueError, match="at least 1 resample, not 0"):
        bootstrap(correct(1), resamples=0)
    with pytest.raises(ValueError, match=r"one integer for each of the \d+ texts: torch.int64 \[3\]"):
        retrieval_sample(ranks, owner[:3])
    with pytest.raises(ValueError, match="float"):
        retrieval_sample(ranks, owner.float())
    with pytest.raises(ValueError, match="from 1 to 61, for 61 images"):
        retrieval_sample(ranks, owner + 1 + (owner == 59))
    with pytest.raises(ValueError, match="gives image 1 3 texts, but it was ranked with 2"):
        retrieval_sample(ranks, torch.where(owner == 0, 1, owner))
    with pytest.raises(ValueError, match="61 images but 2 image_ids"):
        retrieval_sample(ranks, owner, image_ids=["a", "b"])
    for hits in ({}, {"a": []}, {"a": [1.0], "b": [1.0, 0.0]}, {"a": [[1.0]]}):
        with pytest.raises(ValueError, match="one fraction for each of at least one question"):
            accuracy_sample(hits)
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"hits of a must lie in \[0, 1\]"):
            accuracy_sample({"a": [value]})
    for images in ([0], [0.0, 1.0], [-1, 0]):
        with pytest.raises(ValueError, match="query_image must hold an integer"):
            accuracy_sample({"a": [1.0, 0.0]}, images)
    with pytest.raises(ValueError, match="none of the 2 images has a query"):
        bootstrap(Sample(("a",), np.zeros((2, 1)), np.zeros((2, 1))))


def test_only_the_same_images_are_paired():
    with pytest.raises(ValueError, match="scored on 2, the other on 3"):
        paired_bootstrap(correct(1, 0), correct(1, 0, 1))
    with pytest.raises(ValueError, match="Only the same scores"):
        paired_bootstrap(correct(1), accuracy_sample({"top-5": [1.0]}))
    named = [accuracy_sample({"a": [1.0, 0.0]}, image_ids=ids) for ids in (["x", "y"], ["x", "z"])]
    with pytest.raises(ValueError, match="image 1 is 'y' and 'z'"):
        paired_bootstrap(*named)
    assert paired_bootstrap(named[0], named[0])["a"].value == 0
    # Each image has questions in one of two languages only: two draws in four leave a language without any.
    one = accuracy_sample({"a": [1.0]}, [0])
    first = Sample(one.names, np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]]))
    second = Sample(one.names, np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]]))
    with pytest.raises(ValueError, match="no query for a: only 1 of 2 images"):
        paired_bootstrap(first, second)
