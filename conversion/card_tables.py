"""The numbers of a card: what was measured, from results.json and from the cosines of pairs, and what others published,
from eval/tasks/*.yaml; each beside its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eval.tables import aligned, percent
from eval.tasks import Published, Task, load_task, task_names

# The scores of a benchmark that a card shows; all others are in model-index and in results.json.
SHOWN = ("mean_recall", "text_to_image_R@1", "image_to_text_R@1", "top-1", "accuracy")
LANGUAGES = ("zh", "en")
NOT_MEASURED = "not measured here"


@dataclass
class Section:
    """One benchmark: what was measured on it, by whom, and what was published."""

    title: str
    protocol: str
    counts: str = ""
    task: Task | None = None
    measured: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """(system, metric -> language -> score), this model first."""
    notes: list[str] = field(default_factory=list)


def sections(
    name: str, system: str | None, document: Mapping[str, Any] | None, model: Mapping[str, Any] | None
) -> dict[str, Section]:
    """benchmark -> what a card has to say of it: of all benchmarks that this model was measured on or published for."""
    found: dict[str, Section] = {}
    tasks = {task: load_task(task) for task in task_names()}
    for own in model["tasks"] if model else ():
        for benchmark in own["benchmarks"]:
            found[benchmark["name"]] = _measured(benchmark, own, tasks)
    for other in document["models"] if document else ():
        shown = name if other is model else _short(other["name"])
        for own in other["tasks"]:
            for benchmark in own["benchmarks"]:
                if benchmark["name"] in found:
                    entry = (shown, benchmark["metrics"])
                    place = 0 if other is model else len(found[benchmark["name"]].measured)
                    found[benchmark["name"]].measured.insert(place, entry)
    for task in tasks.values():
        if task.name not in found and any(entry.system == system for entry in task.published):
            found[task.name] = Section(task.title, task.protocol, task=task, notes=list(task.notes))
    return found


def results_table(name: str, system: str | None, found: Mapping[str, Section]) -> tuple[str, list[str]]:
    """The table as markdown, and the notes below it. A published number of this model stands as its authors', and what
    was measured of it, or that nothing was, in a row of its own."""
    rows, notes = [], []
    for section in found.values():
        published = list(section.task.published) if section.task else []
        metrics = dict.fromkeys([*(m for _, own in section.measured for m in own), *(p.metric for p in published)])
        for metric in [m for m in SHOWN if m in metrics] + [m for m in metrics if m not in SHOWN and not _detail(m)]:
            rows += _rows(name, system, section, metric, [p for p in published if p.metric == metric])
        about = f"; {section.counts}" if section.counts else ""
        notes.append(f"{section.title}: `{section.protocol}`{about}.")
        notes += [f"{section.title}: {note.rstrip('.')}." for note in section.notes]
        notes += [f"{section.title}, {p.system}: {p.note}." for p in published if p.note]
    if not rows:
        return "", []
    header = ["benchmark", "metric", "system", "zh", "en", "chance", "source"]
    return aligned(header, rows, left=7), list(dict.fromkeys(notes))


def _measured(benchmark: Mapping[str, Any], own: Mapping[str, Any], tasks: Mapping[str, Task]) -> Section:
    about = own["task"]
    is_task = benchmark["name"] == about["name"]
    notes = list(about.get("notes", ()))
    if own.get("limit"):
        notes.append(f"only {own['limit']} rows were used")
    counts = ", ".join(f"{count:,} {what}" for what, count in benchmark["counts"].items())
    title = about["title"] if is_task else benchmark["name"]
    return Section(title, benchmark["protocol"], counts, tasks.get(about["name"]) if is_task else None, notes=notes)


def _rows(name: str, system: str | None, section: Section, metric: str, published: list[Published]) -> list[list[str]]:
    label = metric.replace("_", " ")
    by_system: dict[str, list[Published]] = {}
    for entry in published:
        by_system.setdefault(entry.system, []).append(entry)
    rows = []
    own = by_system.pop(system, []) if system else []
    for entries in ([own] if own else []) + list(by_system.values()):
        cells = {entry.language: percent(entry.value / 100) for entry in entries}
        source = "; ".join(dict.fromkeys(entry.source for entry in entries))
        shown = name if entries is own else entries[0].system
        rows.append([section.title, label, shown, *(cells.get(one, "") for one in LANGUAGES), "", source])
    measured = [
        _measured_row(section, label, one, metrics[metric]) for one, metrics in section.measured if metric in metrics
    ]
    if own and not section.measured:
        cells = [NOT_MEASURED if any(e.language == one for e in own) else "" for one in LANGUAGES]
        measured = [[section.title, label, name, *cells, "", NOT_MEASURED]]
    place = 1 if own else 0
    return rows[:place] + measured + rows[place:]


def _measured_row(section: Section, label: str, system: str, scores: Mapping[str, Any]) -> list[str]:
    chances = dict.fromkeys(percent(scores[one]["chance"]) for one in LANGUAGES if one in scores)
    cells = [_cell(scores[one]) if one in scores else "" for one in LANGUAGES]
    return [section.title, label, system, *cells, "/".join(chances), "measured here"]


def _cell(score: Mapping[str, float]) -> str:
    interval = f" [{percent(score['low'])}, {percent(score['high'])}]" if "low" in score else ""
    return percent(score["value"]) + interval


def _detail(metric: str) -> bool:
    return "/" in metric or "_R@" in metric or metric.endswith("mean_recall") or metric == "top-5"


def _short(name: str) -> str:
    """A model of the Hub by its id, a folder by its last part: where it lay is nobody's business."""
    return (
        name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else name.rstrip("/").rsplit("/", 1)[-1]
    )


def published_number(task: str, system: str, metric: str, language: str) -> str:
    """One published number, for the text of a card.

    Raises:
        ValueError: if no file of eval/tasks has it.
    """
    for entry in load_task(task).published:
        if (entry.system, entry.metric, entry.language) == (system, metric, language):
            return percent(entry.value / 100)
    raise ValueError(f"eval/tasks has no {metric} ({language}) of {system} on {task}.")


def cosine_tables(cosines: Mapping[str, Any]) -> tuple[str, str]:
    """What `benchmarks.pair_cosines` wrote: where right and wrong pairs lie, and thresholds with what they cost."""
    header = ["", *(f"{100 * float(q):g} %" for q in cosines["quantiles"])]
    rows = [
        [f"{what} pairs, {language}", *(f"{value:.2f}" for value in own[what])]
        for language, own in cosines["languages"].items()
        for what in ("right", "wrong")
    ]
    spread = "Of each kind of pair, so many percent have a cosine below:\n\n" + aligned(header, rows, left=1)
    header = ["", "threshold", "wrong pairs kept", "right pairs kept"]
    rows = [
        [language, f"{one['threshold']:.2f}", f"{percent(one['wrong'])} %", f"{percent(one['right'])} %"]
        for language, own in cosines["languages"].items()
        for one in own["thresholds"]
    ]
    return spread, aligned(header, rows, left=1)
