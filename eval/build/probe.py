"""Which rule reproduces the counts of the paper ?

A rule is frozen in the manifest of a build together with what the others gave, so that a reader can see the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .layout import FineGrainedSet

Build = Callable[[Mapping[str, Path], str, int], FineGrainedSet]
Count = Callable[[Mapping[str, Path], Sequence[str], int], dict[str, tuple[int, int]]]


def counts_by_building(build: Build) -> Count:
    """For builders whose rules are few: build each and count."""

    def count(sources: Mapping[str, Path], rules: Sequence[str], seed: int) -> dict[str, tuple[int, int]]:
        built = {rule: build(sources, rule, seed) for rule in rules}
        return {rule: (len(own.images), len(own.texts)) for rule, own in built.items()}

    return count


def choose(found: Mapping[str, tuple[int, int]], paper: tuple[int, int], default: str) -> str:
    """The first rule that gives the paper's (images, texts), else the default."""
    return next((rule for rule, counts in found.items() if counts == paper), default)


def table(found: Mapping[str, tuple[int, int]], paper: tuple[int, int]) -> str:
    """What each rule gives, the closest to the paper first, as lines to print."""
    nearest = sorted(found, key=lambda rule: sum(abs(a - b) for a, b in zip(found[rule], paper, strict=True)))
    lines = [f"{'images':>8} {'texts':>8}  rule", f"{paper[0]:>8} {paper[1]:>8}  (the paper)"]
    for rule in nearest:
        lines.append(f"{found[rule][0]:>8} {found[rule][1]:>8}  {rule}{'  <-' if found[rule] == paper else ''}")
    return "\n".join(lines)
