"""results.json as pictures: a dot with its 95 % interval for every system and language, hollow where published."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import replaced, slug
from .picture import DPI, INK, RULE, SOFT
from .tables import by_benchmark, main_metric, published_of

COLOURS = {"zh": "#c8452d", "en": "#2f6db3"}
OTHER = "#6a737d"
# Where the paper's Figure 1 looks: benchmark, language, metric.
FIGURE_1 = (
    ("imagenet-cn", "zh", "top-1"),
    ("imagenet", "en", "top-1"),
    ("flickr30k-cn", "zh", "mean_recall"),
    ("flickr30k", "en", "mean_recall"),
)
# Metrics that get a panel of their own, where a benchmark has them; else its first four.
PANELS = ("text_to_image_R@1", "image_to_text_R@1", "mean_recall", "top-1", "top-5")


@dataclass(frozen=True)
class Dot:
    """One system's score in one language."""

    system: str
    language: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    published: bool = False
    parameters: float | None = None


def benchmark_plots(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """One picture per benchmark: a panel for each of its main metrics, a line for each system."""
    paths = []
    for name, found in by_benchmark(document).items():
        metrics = [metric for metric in PANELS if metric in found[0][2]["metrics"]] or list(found[0][2]["metrics"])[:4]
        systems = list(dict.fromkeys(dot.system for metric in metrics for dot in dots(document, name, metric)))
        figure = Figure(figsize=(1.6 + 2.6 * len(metrics), 1.3 + 0.36 * len(systems)), facecolor="white")
        axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            _panel(axis, metric, dots(document, name, metric), systems)
        counts = ", ".join(f"{count:,} {what}" for what, count in found[0][2]["counts"].items())
        title = found[0][1]["task"]["title"] if name == found[0][1]["task"]["name"] else name
        figure.suptitle(f"{title}: {counts}", x=0.01, ha="left", fontsize=9, color=SOFT)
        _legend(figure, [dot for metric in metrics for dot in dots(document, name, metric)])
        paths.append(_save(figure, folder / f"{slug(name)}.png"))
    return paths


def overview_plot(document: Mapping[str, Any], path: Path) -> list[Path]:
    """Score against size, as the paper's Figure 1; its four panels, or those benchmarks that were scored instead."""
    scored = by_benchmark(document)
    panels = [panel for panel in FIGURE_1 if panel[0] in scored]
    if not panels:
        panels = [
            (name, language, metric)
            for name, found in scored.items()
            if (metric := main_metric(found[0][2]))
            for language in found[0][2]["metrics"][metric]
        ][:4]
    if not panels:
        return []
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.4), facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    shown: list[Dot] = []
    for axis, (name, language, metric) in zip(axes, panels, strict=False):
        own = [dot for dot in dots(document, name, metric) if dot.language == language and dot.parameters]
        title = next((task["task"]["title"] for _, task, b in scored[name] if b["name"] == task["task"]["name"]), name)
        _scatter(axis, own, f"{title}, {language}", metric)
        shown += own
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _legend(figure, shown, chance=":")
    return [_save(figure, path)]


def dots(document: Mapping[str, Any], name: str, metric: str) -> list[Dot]:
    """Every score of a benchmark and metric: measured ones first, then those that others published."""
    found = []
    for model, _, benchmark in by_benchmark(document)[name]:
        for language, score in benchmark["metrics"].get(metric, {}).items():
            found.append(
                Dot(
                    short(model["name"]),
                    language,
                    100 * score["value"],
                    *(100 * score[end] if end in score else None for end in ("low", "high")),
                    chance=100 * score["chance"],
                    parameters=model["about"].get("parameters"),
                )
            )
    for system, metrics in published_of(document, name).items():
        for language, entry in metrics.get(metric, {}).items():
            found.append(Dot(system, language, 100 * entry["value"], published=True, parameters=size_in_name(system)))
    return found


def short(name: str) -> str:
    """A path's last two parts are enough to know a model by."""
    return "/".join(Path(name).parts[-2:])


def size_in_name(system: str) -> float | None:
    """The paper's names end in the number of parameters: "CN-CLIP-0.2B" -> 2e8."""
    found = re.search(r"(\d+(?:\.\d+)?)\s*([BM])$", system)
    return None if found is None else float(found[1]) * {"B": 1e9, "M": 1e6}[found[2]]


def _panel(axis: Axes, metric: str, own: Sequence[Dot], systems: Sequence[str]) -> None:
    _plain(axis)
    for dot in own:
        languages = sorted({other.language for other in own}, reverse=True)
        # Languages side by side within a system's line.
        y = systems.index(dot.system) + 0.22 * (languages.index(dot.language) - (len(languages) - 1) / 2)
        _draw(axis, dot, dot.value, y, along="x")
        if dot.chance is not None:
            axis.plot([dot.chance] * 2, [y - 0.1, y + 0.1], color=SOFT, linewidth=0.8)
    axis.set_yticks(range(len(systems)), systems, fontsize=8, color=INK)
    axis.set_ylim(len(systems) - 0.5, -0.5)
    axis.set_xlabel(f"{metric.replace('_', ' ')}, %", fontsize=8, color=SOFT)
    axis.grid(axis="x", color=RULE, linewidth=0.6)


def _scatter(axis: Axes, own: Sequence[Dot], title: str, metric: str) -> None:
    _plain(axis)
    sizes = [float(dot.parameters or 0) for dot in own]
    for dot, size in zip(own, sizes, strict=True):
        _draw(axis, dot, size, dot.value, along="y")
        right = size > math.sqrt(min(sizes) * max(sizes))  # names point to the middle, where there is room
        axis.annotate(
            dot.system, (size, dot.value), xytext=(-6 if right else 6, 4), textcoords="offset points", fontsize=7,
            color=INK, ha="right" if right else "left",
        )  # fmt: skip
    for chance in {dot.chance for dot in own if dot.chance is not None}:
        axis.axhline(chance, color=SOFT, linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.margins(x=0.25, y=0.2)
    axis.tick_params(which="minor", length=0)
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    axis.set_xlabel("parameters", fontsize=8, color=SOFT)
    axis.set_ylabel(f"{metric.replace('_', ' ')}, %", fontsize=8, color=SOFT)
    axis.grid(color=RULE, linewidth=0.6)


def _draw(axis: Axes, dot: Dot, x: float, y: float, along: str) -> None:
    colour = COLOURS.get(dot.language, OTHER)
    if dot.low is not None and dot.high is not None:
        ends = [[max(0.0, dot.value - dot.low)], [max(0.0, dot.high - dot.value)]]
        axis.errorbar(x, y, **{f"{along}err": ends}, color=colour, linewidth=1.2, capsize=2, fmt="none")
    face = "white" if dot.published else colour
    axis.plot([x], [y], "o", color=colour, markerfacecolor=face, markersize=5)


def _plain(axis: Axes) -> None:
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8, colors=SOFT)
    for side, spine in axis.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=RULE)


def _legend(figure: Figure, own: Sequence[Dot], chance: str = "|") -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", linestyle="", color=COLOURS.get(language, OTHER), markersize=5, label=language)
        for language in dict.fromkeys(dot.language for dot in own)
    ]
    if any(dot.published for dot in own):
        marks.append(
            Line2D(
                [], [], marker="o", linestyle="", color=SOFT, markerfacecolor="white", markersize=5, label="published"
            )
        )
    if any(dot.chance is not None for dot in own):
        style = {"marker": "|", "linestyle": "", "markersize": 7} if chance == "|" else {"linestyle": chance}
        marks.append(Line2D([], [], color=SOFT, label="chance", **style))
    figure.legend(handles=marks, loc="upper right", ncols=len(marks), fontsize=8, frameon=False, labelcolor=SOFT)


def _save(figure: Figure, path: Path) -> Path:
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    with replaced(path) as beside:
        figure.savefig(beside, dpi=DPI, format=path.suffix.removeprefix("."))
    return path
