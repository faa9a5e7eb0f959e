"""Which rule reproduces the paper's counts? The paper says how many images and texts a set has, not how it chose them.

    print(table("coco-mcc", probe("coco-mcc", {"annotations": Path("instances_val2014.json"), ...})))

A build keeps what every rule gave in its manifest, beside the one that was taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .builders import BUILDERS, Builder, find_builder


def probe(name: str, sources: Mapping[str, str | Path], *, seed: int = 0) -> dict[str, tuple[int, int]]:
    """(images, texts) that each rule of a set gives for these annotations.

    Besides the rules that can be built this counts other readings of the paper, such as VG-POS in free-form English.

    Raises:
        ValueError: as `eval.build.build` does for names, sources and annotations.
    """
    builder, paths = find_builder(name, sources)
    if builder.count:
        return builder.count(paths, builder.rules, seed)
    built = builder.make(paths, builder.default, seed)
    return {builder.default: (len(built.images), len(built.texts))}


def choose(builder: Builder, found: Mapping[str, tuple[int, int]]) -> str:
    """The first rule that gives the paper's counts; else the default; else the only one that the annotations allow."""
    tried = [rule for rule in builder.rules if rule in found]
    if not tried or builder.default in tried:
        return next((rule for rule in tried if found[rule] == builder.paper), builder.default)
    return tried[0]


def table(name: str, found: Mapping[str, tuple[int, int]]) -> str:
    """What each rule gives, the closest to the paper first, as lines to print."""
    images, texts = BUILDERS[name].paper
    nearest = sorted(found, key=lambda rule: abs(found[rule][0] - images) + abs(found[rule][1] - texts))
    lines = [f"{'images':>8} {'texts':>8}  rule", f"{images:>8} {texts:>8}  (the paper)"]
    for rule in nearest:
        mark = "  <- the same" if found[rule] == (images, texts) else ""
        lines.append(f"{found[rule][0]:>8} {found[rule][1]:>8}  {rule}{mark}")
    return "\n".join(lines)
