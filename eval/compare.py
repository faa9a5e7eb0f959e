"""Two models on the same images: the difference of every score with its interval and p-value. A system of systems.yaml
that was not run is compared by the numbers that its authors, or the paper, published.

compare(Path("runs/evaluation"), "nano", "OFA-Sys/chinese-clip-vit-base-patch16")
compare(Path("runs/evaluation"), "nano", "ERNIE-ViL 2.0")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json, slug
from .results import compare_samples, read_samples
from .systems import systems
from .tables import aligned, percent
from .tasks import load_task, task_names


def compare(output: Path | None, first: str, second: str) -> dict[str, Any]:
    """`first` minus `second` on every benchmark and language that both were scored on: {"first", "second",
    "benchmarks": [{"name", "language", "protocol", "differences": {metric: {value, low, high, p_value}}}]}.

    Args:
        output: the output folder of `run`; None if `first` and `second` are two output folders of one model each.
        second: may also be a system of systems.yaml without scores there. Then "published" is in the result too: the
            sources of its numbers. An interval is that of `first` alone, and there is no p-value.

    Raises:
        ValueError: for a model that was not scored there, no benchmark in common, scores of different images, or a
            system of which no published number on these benchmarks is at hand.
    """
    if second in systems() and not (Path(second).exists() if output is None else _scored(output, second).is_dir()):
        return _against_published(_folder(output, first), first, second)
    folders = {name: _folder(output, name) for name in (first, second)}
    found: list[dict[str, Any]] = []
    for path in sorted(folders[first].glob("*.npz")):
        other = folders[second] / path.name
        if not other.is_file():
            continue
        documents = [read_json(one.with_suffix(".json")) for one in (path, other)]
        samples = [read_samples(one) for one in (path, other)]
        by_name = [
            {benchmark["name"]: (benchmark, own) for benchmark, own in zip(d["benchmarks"], s, strict=True)}
            for d, s in zip(documents, samples, strict=True)
        ]
        for name, (benchmark, own) in by_name[0].items():
            if name in by_name[1]:
                found += _differences(name, benchmark, own, *by_name[1][name])
    if not found:
        raise ValueError(f"{first} and {second} have no benchmark in common.")
    return {"first": first, "second": second, "benchmarks": found}


def comparison_table(document: Mapping[str, Any]) -> str:
    """The comparison as markdown."""
    rows = [
        [one["name"], metric.replace("_", " "), one["language"], percent(found["value"], True),
         _shown_interval(found), "" if found["p_value"] is None else f"{found['p_value']:.3f}"]
        for one in document["benchmarks"]
        for metric, found in one["differences"].items()
    ]  # fmt: skip
    header = ["benchmark", "metric", "language", "difference", "interval", "p"]
    title = f"{document['first']} minus {document['second']}, in points; "
    if "published" in document:
        title += (
            f"{document['second']} was not run: its numbers are *published*. The 95 % interval is that of "
            f"{document['first']} alone."
        )
    else:
        title += "95 % interval and two-sided p-value of a paired bootstrap over images."
    sources = "\n".join(f"- {source}" for source in document.get("published", ()))
    return "\n\n".join(part for part in (title, aligned(header, rows, left=3), sources) if part)


def _shown_interval(found: Mapping[str, Any]) -> str:
    return "" if found["low"] is None else f"[{percent(found['low'], True)}, {percent(found['high'], True)}]"


def _against_published(folder: Path, first: str, second: str) -> dict[str, Any]:
    """The scores of a folder minus the published numbers of a system, where a task file has any."""
    found: list[dict[str, Any]] = []
    sources: dict[str, None] = {}
    for path in sorted(folder.glob("*.npz")):
        document = read_json(path.with_suffix(".json"))
        task = document["task"]["name"]
        published = [one for one in (load_task(task).published if task in task_names() else ()) if one.system == second]
        for benchmark in (one for one in document["benchmarks"] if one["name"] == task):
            for language in dict.fromkeys(one.language for one in published):
                differences = {
                    one.metric: _difference(benchmark["metrics"][one.metric][language], one.value / 100)
                    for one in published
                    if one.language == language and language in benchmark["metrics"].get(one.metric, {})
                }
                if differences:
                    protocol = benchmark["protocol"]
                    found.append({"name": task, "language": language, "protocol": protocol, "differences": differences})
        sources |= {f"{one.source} ({one.note})" if one.note else one.source: None for one in published}
    if not found:
        system = systems()[second]
        why = system.published_only or f"it can be run: --models {second}"
        raise ValueError(f"No published number of {second} is at hand on what {first} was scored on ({why}).")
    return {"first": first, "second": second, "benchmarks": found, "published": list(sources)}


def _difference(score: Mapping[str, float], published: float) -> dict[str, float | None]:
    ends = {end: score[end] - published if end in score else None for end in ("low", "high")}
    return {"value": score["value"] - published, **ends, "p_value": None}


def _differences(
    name: str, first: Mapping[str, Any], own: Any, second: Mapping[str, Any], other: Any
) -> list[dict[str, Any]]:
    if first["protocol"] != second["protocol"]:
        raise ValueError(f"{name} was scored under {first['protocol']} and under {second['protocol']}: run both again.")
    found = []
    for language in own:
        if language in other:
            try:
                differences = compare_samples(own[language], other[language])
            except ValueError as error:
                raise ValueError(f"{name}, {language}: {error}") from error
            found.append(
                {"name": name, "language": language, "protocol": first["protocol"], "differences": differences}
            )
    return found


def _folder(output: Path | None, name: str) -> Path:
    """Where the scores of a model lie: in `output`, or in an output folder of its own."""
    if output is None:
        folders = sorted(path for path in (Path(name) / "scores").glob("*") if path.is_dir())
        if len(folders) != 1:
            held = ", ".join(path.name for path in folders) or "none"
            raise ValueError(
                f"{name} must be an output folder with the scores of one model (it has: {held}); or name models, and "
                "their output folder with --output."
            )
        return folders[0]
    folder = _scored(output, name)
    if not folder.is_dir():
        there = sorted(path.name for path in (output / "scores").glob("*") if path.is_dir())
        raise ValueError(f"No scores of {name} in {output}; there are: {', '.join(there) or 'none'}.")
    return folder


def _scored(output: Path, name: str) -> Path:
    return output / "scores" / slug(name)
