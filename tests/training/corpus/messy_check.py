"""Compares what the pipeline made of the messy corpus with the truth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.training.corpus.messy import KEPT, Expected
from training.corpus.engine import read_report
from training.corpus.rows import parts, read_rows

TWINS = {"duplicate", "near_duplicate"}


def found(output: Path) -> list[dict[str, Any]]:
    """Every row that came out of "sources" and "clean", with its outcome as `reason`; of kept rows no pixels."""
    rows = []
    for stream in ("sources/dropped", "clean/dropped"):
        for part in parts(output / stream) if (output / stream).is_dir() else []:
            rows += read_rows(part)
    columns = ["id", "source", "language", "image_hash", "text", "width", "height"]
    for part in parts(output / "clean" / "kept"):
        rows += [row | {"reason": KEPT, "twin": None} for row in read_rows(part, columns)]
    return rows


def differences(truth: Iterable[Expected], output: Path) -> list[str]:
    """One message for each way in which the corpus in `output` is not what the truth says; none if all is well."""
    truth = {row.id: row for row in truth}
    rows = found(output)
    number = Counter(row["id"] for row in rows)
    wrong = [f"{id} is there {number[id]} times: {truth[id].what}" for id in truth if number[id] != 1]
    wrong += [f"{id} is in no source" for id in number if id not in truth]
    rows = [row for row in rows if row["id"] in truth and number[row["id"]] == 1]
    for row in rows:
        is_right = truth[row["id"]]
        if row["reason"] not in is_right.outcomes:
            said = f" ({is_right.text!r:.60})" if row["reason"] in ("wrong_language", KEPT) else ""
            wrong.append(f"{row['id']} is {row['reason']}, not {'/'.join(is_right.outcomes)}: {is_right.what}{said}")
        elif row["reason"] == KEPT:
            wrong += _altered(row, is_right)
    return wrong + _twins(truth, rows) + _totals(truth, rows, output)


def _altered(row: dict[str, Any], is_right: Expected) -> list[str]:
    seen = (row["source"], row["language"], row["image_hash"], (row["text"] or "").split())
    kept = (is_right.source, is_right.language, is_right.image_hash, (is_right.text or "").split())
    wrong = [] if seen == kept else [f"{row['id']} is {seen}, was {kept}"]
    return wrong if row["width"] and row["height"] else [*wrong, f"{row['id']} has no size"]


def _twins(truth: dict[str, Expected], rows: list[dict[str, Any]]) -> list[str]:
    """Of each group of twins one image must be kept, with all its rows; the others must name a row that is kept."""
    wrong = []
    kept = {row["id"] for row in rows if row["reason"] == KEPT}
    groups: dict[str, list[Expected]] = defaultdict(list)
    for row in truth.values():
        if row.twins:
            groups[row.twins].append(row)
    for name, group in groups.items():
        images = {row.image for row in group if row.id in kept}
        if len(images) != 1:
            wrong.append(f"twins {name}: {len(images)} images are kept of {sorted({row.image for row in group})}")
        wrong += [
            f"{row.id}: another row of its image is kept" for row in group if row.image in images and row.id not in kept
        ]
    for row in rows:
        if row["reason"] in TWINS and truth[row["id"]].twins:
            twin = truth.get(row["twin"] or "")
            if twin is None or twin.id not in kept or twin.twins != truth[row["id"]].twins:
                wrong.append(f"{row['id']} is dropped for {row['twin']}, which is not kept or not its twin")
    return wrong


def _totals(truth: dict[str, Expected], rows: list[dict[str, Any]], output: Path) -> list[str]:
    sources, clean = read_report(output / "sources").counts, read_report(output / "clean").counts
    wrong = []
    if sources.total() != len(truth):
        wrong.append(f"sources counts {sources.total()} rows of {len(truth)}")
    if sources.total(KEPT) != clean.total():
        wrong.append(f"sources kept {sources.total(KEPT)} rows, clean read {clean.total()}")
    counted: Counter[tuple[str, str, str]] = Counter()
    for counts, kept in ((sources, False), (clean, True)):
        for source, languages in counts.as_dict().items():
            for language, outcomes in languages.items():
                for outcome, count in outcomes.items():
                    if outcome != KEPT or kept:
                        counted[source, language, outcome] += count
    there = Counter((row["source"], row["language"], row["reason"]) for row in rows)
    return wrong + [
        f"{' '.join(key)}: counted {counted[key]}, there are {there[key]}"
        for key in sorted({*counted, *there})
        if counted[key] != there[key]
    ]
