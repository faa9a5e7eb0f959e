"""results.json as markdown for people: every number with its 95 % interval and its chance level, zh beside en."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .tasks import ordered_languages

CAPTION = (
    "All numbers in percent. Intervals: 95 %, bootstrap over whole images (1,000 resamples). A paired gap is zh minus "
    "en on the same images, tested on the same resamples. *published*: not run here, taken from the source below the "
    "table."
)


def markdown(document: Mapping[str, Any]) -> str:
    """The whole of results.json: an overview, then a table for each benchmark."""
    sections = [f"# Evaluation\n\n{CAPTION}", _overview(document)]
    sections += [_section(document, name, found) for name, found in by_benchmark(document).items()]
    sections.append(_others(document))
    failures = [f"- {one['task']} with {one['model']}: {one['error']}" for one in document["failures"]]
    if failures:
        sections.append("## Not done\n\n" + "\n".join(failures))
    return "\n\n".join(section for section in sections if section) + "\n"


def by_benchmark(document: Mapping[str, Any]) -> dict[str, list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]]:
    """benchmark name -> (model, task, benchmark) of every model that was scored on it."""
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]] = {}
    for model in document["models"]:
        for task in model["tasks"]:
            for benchmark in task["benchmarks"]:
                found.setdefault(benchmark["name"], []).append((model, task, benchmark))
    return found


def main_metric(benchmark: Mapping[str, Any]) -> str:
    """The one number that stands for a benchmark."""
    metrics = benchmark["metrics"]
    return next(name for name in ("mean_recall", "top-1", "accuracy", *metrics) if name in metrics)


def published_of(document: Mapping[str, Any], task: str) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """system -> metric -> language -> entry, of the numbers that others published on a task."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for entry in document.get("published", ()):
        if entry["task"] == task:
            found.setdefault(entry["system"], {}).setdefault(entry["metric"], {})[entry["language"]] = entry
    return found


def percent(value: float, signed: bool = False) -> str:
    """0.1234 -> "12.3", and "+12.3" where the sign matters; small chance levels keep a digit."""
    points = 100 * value
    if signed:
        return f"{round(points, 1) + 0.0:+.1f}"  # adding 0 turns -0.0 into 0.0
    return f"{points:.1f}" if points >= 0.1 or points == 0 else f"{points:.1g}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """A markdown table that is aligned as plain text as well; the first `left` columns to the left."""
    widths = [max(3, *(len(row[c]) for row in (header, *rows))) for c in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(w) if c < left else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    rule = ["-" * w if c < left else "-" * (w - 1) + ":" for c, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def _overview(document: Mapping[str, Any]) -> str:
    """One line for each model and benchmark with its main number."""
    rows = []
    for name, found in by_benchmark(document).items():
        for model, _, benchmark in found:
            metric = main_metric(benchmark)
            scores = benchmark["metrics"][metric]
            gap = benchmark.get("gap_zh_en", {}).get(metric)
            rows.append([name, model["name"], _label(metric), *_pair(scores, "zh"), *_pair(scores, "en"), *_gap(gap)])
    if not rows:
        return ""
    header = ["benchmark", "system", "metric", "zh", "interval", "en", "interval", "paired gap", "interval"]
    return "## Overview\n\n" + aligned(header, rows, left=3)


def _section(
    document: Mapping[str, Any], name: str, found: Sequence[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]
) -> str:
    _, task, first = found[0]
    languages = ordered_languages({language: 0 for _, _, b in found for m in b["metrics"].values() for language in m})
    paired = any(benchmark.get("gap_zh_en") for _, _, benchmark in found)
    header = ["system", "metric"]
    for language in languages:
        header += [language, "interval"]
    header += ["chance", *(["paired gap", "interval", "p"] if paired else [])]
    rows = []
    for metric in first["metrics"]:
        for model, _, benchmark in found:
            rows.append(_row(model["name"], metric, benchmark, languages, paired))
        rows += _published_rows(document, name, metric, languages, paired)
    counts = ", ".join(f"{count:,} {what}" for what, count in first["counts"].items())
    title = task["task"]["title"] if name == task["task"]["name"] else name
    head = f"## {title}\n\n`{first['protocol']}`: {counts}" + _shared(found)
    return "\n\n".join([head, aligned(header, rows), *_remarks(document, name, found)])


def _row(system: str, metric: str, benchmark: Mapping[str, Any], languages: Sequence[str], paired: bool) -> list[str]:
    scores = benchmark["metrics"].get(metric, {})
    row = [system, _label(metric)]
    for language in languages:
        row += _pair(scores, language)
    # One number unless the languages differ in their number of captions.
    chances = dict.fromkeys(percent(scores[language]["chance"]) for language in languages if language in scores)
    row.append("/".join(chances))
    if paired:
        gap = benchmark.get("gap_zh_en", {}).get(metric)
        row += [*_gap(gap), "" if gap is None else f"{gap['p_value']:.3f}"]
    return row


def _published_rows(
    document: Mapping[str, Any], name: str, metric: str, languages: Sequence[str], paired: bool
) -> Iterator[list[str]]:
    for system, metrics in published_of(document, name).items():
        entries = metrics.get(metric, {})
        if entries:
            cells = [
                cell
                for language in languages
                for cell in ([percent(entries[language]["value"]), ""] if language in entries else ["", ""])
            ]
            yield [f"{system} *published*", _label(metric), *cells, "", *(["", "", ""] if paired else [])]


def _remarks(document: Mapping[str, Any], name: str, found: Sequence[Any]) -> list[str]:
    """Notes of the task, of the data as they were seen, and where published numbers come from; each once."""
    lines: dict[str, None] = {}
    for model, task, benchmark in found:
        lines |= dict.fromkeys(f"- {note}" for note in (task["task"]["notes"] if name == task["task"]["name"] else ()))
        lines |= {f"- {model['name']}: {what}: {seen}": None for what, seen in benchmark["notes"].items()}
        if task.get("limit"):
            lines[f"- {model['name']}: only {task['limit']:,} evenly spaced rows (--limit): not the benchmark"] = None
        if task.get("revision"):
            lines[f"- data: {task['task']['data'] or 'local'} at revision {task['revision']}"] = None
    for system, metrics in published_of(document, name).items():
        for entries in metrics.values():
            for entry in entries.values():
                lines[f"- {system}, {_source(entry)}"] = None
    return ["\n".join(lines)] if lines else []


def _others(document: Mapping[str, Any]) -> str:
    """The systems of the comparison that were not run, with what was published of them on tasks that have no table."""
    shown = {entry["task"] for entry in document.get("published", ())}
    rows, notes = [], []
    for one in document.get("systems", ()):
        numbers = [number for number in one["published"] if number["task"] not in shown]
        told = [f"{number['what'].replace('_', ' ')} {number['value']}" for number in numbers]
        if len(numbers) < len(one["published"]):
            told.insert(0, "in the tables above")
        rows.append(
            [one["name"], ", ".join(one["languages"]), one["paper"], one["why"], "; ".join(told) or "not at hand"]
        )
        said = [f"other weights: {one['other_weights']}"] if one["other_weights"] else []
        said += dict.fromkeys(_source(number) for number in numbers)
        notes += [f"- {one['name']}: {note}" for note in (*said, *one["notes"])]
    if not rows:
        return ""
    header = ["system", "texts", "in the paper", "why", "published numbers"]
    parts = ["## Systems of the comparison that were not run", aligned(header, rows, left=5), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _source(number: Mapping[str, Any]) -> str:
    """Where a published number comes from."""
    note = f" ({number['note']})" if number.get("note") else ""
    return f"published: {number['source']}{note}"


def _shared(found: Sequence[Any]) -> str:
    protocols = {benchmark["protocol"] for _, _, benchmark in found}
    return "" if len(protocols) == 1 else f" (the systems were scored under different protocols: {sorted(protocols)})"


def _pair(scores: Mapping[str, Any], language: str) -> list[str]:
    score = scores.get(language)
    if score is None:
        return ["", ""]
    ends = f"[{percent(score['low'])}, {percent(score['high'])}]" if "low" in score else ""
    return [percent(score["value"]), ends]


def _gap(gap: Mapping[str, float] | None) -> list[str]:
    if gap is None:
        return ["", ""]
    return [percent(gap["value"], True), f"[{percent(gap['low'], True)}, {percent(gap['high'], True)}]"]


def _label(metric: str) -> str:
    return metric.replace("_", " ").replace("/", ": ")
