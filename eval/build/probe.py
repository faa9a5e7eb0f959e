"""Which rule reproduces the counts of the paper ?

A rule is frozen in the manifest of a build together with what the others gave, so that a reader can see the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .layout import FineGrainedSet

Build = Callable[[Mapping[str, Path], str, int], FineGrainedSet]
Count = Callable[[Mapping[str, Path], Sequence[str], int], dict[str, tuple[int, int]]]


def choose(found: Mapping[str, tuple[int, int]], rules: Sequence[str], paper: tuple[int, int], default: str) -> str:
    """The first rule that gives the paper's (images, texts), else the default, else the only one that was tried."""
    tried = [rule for rule in rules if rule in found]
    return next((rule for rule in tried if found[rule] == paper), default if default in tried else tried[0])


def table(found: Mapping[str, tuple[int, int]], paper: tuple[int, int]) -> str:
    """What each rule gives, the closest to the paper first, as lines to print."""
    nearest = sorted(found, key=lambda rule: sum(abs(a - b) for a, b in zip(found[rule], paper, strict=True)))
    lines = [f"{'images':>8} {'texts':>8}  rule", f"{paper[0]:>8} {paper[1]:>8}  (the paper)"]
    for rule in nearest:
        lines.append(f"{found[rule][0]:>8} {found[rule][1]:>8}  {rule}{'  <-' if found[rule] == paper else ''}")
    return "\n".join(lines)
