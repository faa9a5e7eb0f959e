"""The order of rows and the pattern of languages, by hand and for any position."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from training.order import EpochOrder, language_cycle


@pytest.mark.parametrize(
    "weights, cycle",
    [
        ({"en": 1, "zh": 1}, ["en", "zh"]),
        ({"en": 0.5, "zh": 0.5}, ["en", "zh"]),
        ({"en": 3, "zh": 1}, ["en", "en", "zh", "en"]),
        ({"en": 1, "zh": 2, "ja": 1}, ["zh", "en", "ja", "zh"]),
        ({"en": 2, "zh": 0}, ["en"]),
        ({"en": 1 / 3, "zh": 2 / 3}, ["zh", "en", "zh"]),
    ],
)
def test_language_cycle_by_hand(weights: dict[str, float], cycle: list[str]) -> None:
    assert language_cycle(weights) == cycle


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (0.37, 0.63), (1, 2, 4)])
def test_language_shares_of_any_slice(shares: tuple[float, ...]) -> None:
    weights = {f"l{i}": share for i, share in enumerate(shares)}
    endless = language_cycle(weights) * 50
    for start in range(30):
        for length in (1, 7, 10, 64):
            counts = Counter(endless[start : start + length])
            for name, share in weights.items():
                assert abs(counts[name] - length * share / sum(shares)) < 2


@pytest.mark.parametrize("weights", [{"en": 0}, {"en": -1, "zh": 2}, {"en": float("nan")}, {"en": float("inf")}])
def test_language_weights_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Language weights"):
        language_cycle(weights)


def test_order_is_known_for_any_position() -> None:
    order = EpochOrder(7, seed=5)
    epoch = [order[10**9 * 7 + i] for i in range(7)]  # far away costs nothing
    assert sorted(epoch) == list(range(7))
    assert [pickle.loads(pickle.dumps(order))[10**9 * 7 + i] for i in range(7)] == epoch
    # The numbers themselves: a change here would break every resumed run.
    assert [order[i] for i in range(7)] == np.random.default_rng((5, 0, 0)).permutation(7).tolist()


def test_neighbours_stay_together_in_any_order() -> None:
    order = EpochOrder(10, seed=3, neighbours=4)  # families 0-3, 4-7, and 8-9, which is a short one
    for epoch in range(20):
        rows = [order[epoch * 10 + i] for i in range(10)]
        assert sorted(rows) == list(range(10))
        families = [row // 4 for row in rows]
        assert [a for a, b in zip(families, [None, *families], strict=False) if a != b] == list(dict.fromkeys(families))
    # The language goes by the position: every row must come at even and at odd ones.
    assert {(order[i], i % 2) for i in range(1000)} == {(row, parity) for row in range(10) for parity in range(2)}
