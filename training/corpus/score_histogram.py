"""How many rows of each source and language have which score, and a picture of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from eval.files import read_json, replaced, write_json
from eval.picture import cjk_font

from .scorer import ScoreSettings

EDGES = tuple(place / 40 for place in range(-40, 41))
"""Of the bins, from -1 to 1 by 0.025, so that the paper's threshold of 0.25 is one of them. A bin holds its lower edge
and not its upper one."""
_DPI = 150
_PANEL = (6.0, 3.8)  # inches


class Histogram:
    """source, language -> rows in each bin."""

    def __init__(self, counts: dict[tuple[str, str], list[int]] | None = None):
        self.counts: dict[tuple[str, str], list[int]] = counts or {}

    def add(self, source: str, language: str, score: float) -> None:
        """Counts one row. Rounding may put a cosine beyond 1; it belongs to the last bin."""
        place = min(max(bisect_right(EDGES, score) - 1, 0), len(EDGES) - 2)
        self.counts.setdefault((source, language), [0] * (len(EDGES) - 1))[place] += 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `edges`, and `counts` as source -> language -> rows in each bin."""
        nested: dict[str, dict[str, list[int]]] = {}
        for (source, language), numbers in sorted(self.counts.items()):
            nested.setdefault(source, {})[language] = numbers
        return {"edges": list(EDGES), "counts": nested}

    def write(self, folder: Path, number: int) -> None:
        """The counts of one task, for `merged`."""
        write_json(folder / f"{number:05d}.json", self.as_dict()["counts"])

    @classmethod
    def merged(cls, folder: Path, tasks: int) -> Histogram:
        """The sum over the tasks 0 .. `tasks` - 1. Raises ValueError for a file that is missing or damaged."""
        total = cls()
        for number in range(tasks):
            for source, languages in read_json(folder / f"{number:05d}.json").items():
                for language, numbers in languages.items():
                    own = total.counts.get((source, language), [0] * len(numbers))
                    total.counts[source, language] = [a + b for a, b in zip(own, numbers, strict=True)]
        return total


def draw(histogram: Histogram, settings: ScoreSettings, path: Path) -> None:
    """One panel per language, one line per source: the share of its rows in each bin, and how many are kept."""
    languages = sorted({language for _, language in histogram.counts}) or ["no rows"]
    figure = Figure((_PANEL[0] * len(languages), _PANEL[1]), layout="constrained")
    for axes, language in zip(figure.subplots(1, len(languages), squeeze=False)[0], languages, strict=True):
        threshold = settings.threshold_of(language)
        own = {source: numbers for (source, name), numbers in sorted(histogram.counts.items()) if name == language}
        for source, numbers in own.items():
            rows = sum(numbers)
            label = f"{source}: {rows:,} rows"
            if threshold in EDGES:
                label += f", {sum(numbers[EDGES.index(threshold) :]) / rows:.1%} kept"
            axes.stairs([number / rows for number in numbers], EDGES, label=label, linewidth=1.4)
        filled = [place for numbers in own.values() for place, number in enumerate(numbers) if number]
        if filled:
            axes.set_xlim(EDGES[max(min(filled) - 1, 0)], EDGES[min(max(filled) + 2, len(EDGES) - 1)])
            axes.legend(prop=_font(own), frameon=False)
        if threshold is not None:
            axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
        axes.set(title=language, xlabel="cosine of image and text", ylabel="share of the source's rows")
        axes.spines[["top", "right"]].set_visible(False)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=_DPI, format="png")


def _font(names: Iterable[str]) -> FontProperties:
    """One that has the letters of the names, if there is one."""
    font = FontProperties()
    if not all(name.isascii() for name in names):
        with suppress(ValueError):  # none is installed: boxes in the picture, and the counts stand in the report
            font = cjk_font().copy()
    font.set_size(7)
    return font
