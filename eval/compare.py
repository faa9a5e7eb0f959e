"""Two models on the same images: the difference of every score with its interval and p-value.

compare(Path("runs/evaluation"), "nano", "OFA-Sys/chinese-clip-vit-base-patch16")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json, slug
from .results import compare_samples, read_samples
from .tables import aligned, percent


def compare(output: Path | None, first: str, second: str) -> dict[str, Any]:
    """`first` minus `second` on every benchmark and language that both were scored on: {"first", "second",
    "benchmarks": [{"name", "language", "protocol", "differences": {metric: {value, low, high, p_value}}}]}.

    Args:
        output: the output folder of `run`; None if `first` and `second` are two output folders of one model each.

    Raises:
        ValueError: for a model that was not scored there, no benchmark in common, or scores of different images.
    """
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
         f"[{percent(found['low'], True)}, {percent(found['high'], True)}]", f"{found['p_value']:.3f}"]
        for one in document["benchmarks"]
        for metric, found in one["differences"].items()
    ]  # fmt: skip
    header = ["benchmark", "metric", "language", "difference", "interval", "p"]
    title = (
        f"{document['first']} minus {document['second']}, in points; 95 % interval and two-sided p-value of a paired "
        "bootstrap over images."
    )
    return f"{title}\n\n{aligned(header, rows, left=3)}"


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
    folder = output / "scores" / slug(name)
    if not folder.is_dir():
        there = sorted(path.name for path in (output / "scores").glob("*") if path.is_dir())
        raise ValueError(f"No scores of {name} in {output}; there are: {', '.join(there) or 'none'}.")
    return folder
