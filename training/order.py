"""Which row and which language come at a position of the endless sequence: pure functions of it.

Tested by `pytest tests/training/test_order.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import numpy as np

# Separate random streams that never meet, whatever the seed.
ORDER, SAMPLE, WINDOW = 0, 1, 2


class EpochOrder:
    """An endless sequence of rows in which every epoch is a new permutation; a pure function of the position.

    Rows n * `neighbours`, ..., (n + 1) * `neighbours` - 1 stay side by side: hard negatives that are meant to meet.
    """

    def __init__(self, num_rows: int, seed: int, neighbours: int = 1):
        self.num_rows, self.seed, self.neighbours = num_rows, seed, neighbours
        # A batch can straddle two epochs; no more than these two permutations are held.
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, ORDER, epoch))
        if self.neighbours == 1:
            return generator.permutation(self.num_rows)
        families = generator.permutation(-(-self.num_rows // self.neighbours))
        rows = families[:, None] * self.neighbours + np.arange(self.neighbours)
        # Inside a family too: the language goes by the position, and must not always be the same one for a row.
        rows = generator.permuted(rows, axis=1).reshape(-1)
        return rows[rows < self.num_rows]

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        return int(self._permutation(epoch)[place])

    def __getstate__(self) -> tuple[int, int, int]:
        return self.num_rows, self.seed, self.neighbours  # the cache is neither picklable nor worth sending to workers

    def __setstate__(self, state: tuple[int, int, int]) -> None:
        self.__init__(*state)


def language_cycle(weights: Mapping[str, float]) -> list[str]:
    """The languages in a short repeating pattern with these shares, spread as evenly as possible.

    {"en": 1, "zh": 1} gives en, zh; so every batch whose size is a multiple of the pattern's length has the exact
    shares, and every other one is off by less than one sample. Shares are taken to the nearest hundredth or simple
    fraction.

    Raises:
        ValueError: for negative weights, or none above 0.
    """
    total = math.fsum(weights.values())
    if not all(0 <= weight < math.inf for weight in weights.values()) or total <= 0:
        raise ValueError(f"Language weights must be 0 or more, and one above 0, got {dict(weights)}.")
    shares = {name: Fraction(weight / total).limit_denominator(100) for name, weight in weights.items() if weight}
    period = math.lcm(*(share.denominator for share in shares.values()))
    counts = {name: int(share * period) for name, share in shares.items()}
    # Smooth weighted round robin: who is furthest behind its share comes next.
    cycle: list[str] = []
    credit = dict.fromkeys(counts, 0)
    for _ in range(sum(counts.values())):
        for name in credit:
            credit[name] += counts[name]
        chosen = max(credit, key=credit.__getitem__)
        credit[chosen] -= sum(counts.values())
        cycle.append(chosen)
    return cycle
