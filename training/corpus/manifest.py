"""What lies beside the shards: the index, and the manifest, which says what became of every row of every source."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.files import read_json, sha256_of, write_json, write_text

from .config import STAGES, CorpusConfig
from .engine import KEPT, Counts, Report, read_report
from .shard_task import VALIDATION
from .shard_writers import LANGUAGES

INDEX_FORMAT = 1
_PACKAGES = ("datatrove", "datasets", "huggingface_hub", "numpy", "pillow", "pyarrow", "torch", "transformers", "ray")
_GOES_ON = {"score": ("low",)}
"""stage -> outcomes beside KEPT that are read by a later stage, if that stage is in the file."""


@dataclass(frozen=True)
class Ledger:
    """What became of the rows of one source: `rows_in + translated == sum of lost + train + validation`."""

    source: str
    rows_in: dict[str, int]
    """language -> rows that the source gave, as the source says."""
    translated: int
    """Rows that the stage `translate` made of the source's English ones."""
    lost: dict[str, dict[str, int]]
    """stage -> reason -> rows."""
    pairs: dict[str, dict[str, int]]
    """split -> language -> pairs in the shards."""

    @property
    def kept(self) -> int:
        """Pairs in all shards."""
        return sum(number for languages in self.pairs.values() for number in languages.values())

    def missing(self) -> int:
        """Rows of which nothing is known; 0 unless a stage has a fault."""
        lost = sum(number for reasons in self.lost.values() for number in reasons.values())
        return sum(self.rows_in.values()) + self.translated - lost - self.kept


def write(config: CorpusConfig, shards: Report, title: str, name: str | None) -> None:
    """Writes index.json, manifest.json and README.md.

    Args:
        title: of the card.
        name: `owner/name` of the data set on the Hub, or None.

    Raises:
        RuntimeError: if the rows that went in and those that were lost or kept do not add up.
    """
    from .card import card  # takes `datasets` with it, which the workers that import this module do not need

    folder = config.output / "shards"
    reports = {stage: read_report(config.output / stage) for stage in STAGES[:-2] if config.has(stage)}
    reports["shards"] = shards
    ledgers = [ledger(source, reports) for source in _sources(reports)]
    if wrong := {entry.source: entry.missing() for entry in ledgers if entry.missing()}:
        raise RuntimeError(f"The totals of the stages do not add up, rows missing by source: {wrong}.")
    index, licences = gathered(folder, shards.tasks)
    document = {
        "config": {"seed": config.seed, **{name: config.sections[name] for name in STAGES if config.has(name)}},
        "versions": versions(),
        "stages": {
            name: {
                "fingerprint": report.fingerprint,
                "settings": report.settings,
                "outcomes": report.counts.outcomes(),
                "counts": report.counts.as_dict(),
            }
            for name, report in reports.items()
        },
        "sources": [
            {**vars(entry), "kept": entry.kept, "licences": licences.get(entry.source, {})} for entry in ledgers
        ],
        "totals": index["totals"],
    }
    write_json(folder / "index.json", index)
    write_json(folder / "manifest.json", document)
    write_text(folder / "README.md", card(title, name or str(folder), index, ledgers, licences))


def ledger(source: str, reports: dict[str, Report]) -> Ledger:
    """The entry of one source from the reports of all stages that ran."""
    first = next(iter(reports.values())).counts
    lost: dict[str, dict[str, int]] = {}
    for stage, report in reports.items():
        if stage == "translate":  # what could not be translated is still there in English
            continue
        going_on = (KEPT, VALIDATION, *(_GOES_ON.get(stage, ()) if "rewrite" in reports else ()))
        reasons = {outcome: report.counts.total(outcome, source) for outcome in report.counts.outcomes()}
        lost[stage] = {reason: n for reason, n in reasons.items() if n and reason not in going_on}
    shards = reports["shards"].counts
    return Ledger(
        source,
        {language: n for language in _languages(first) if (n := first.total(source=source, language=language))},
        reports["translate"].counts.total(KEPT, source) if "translate" in reports else 0,
        {stage: reasons for stage, reasons in lost.items() if reasons},
        {
            split: {language: shards.total(outcome, source, language) for language in LANGUAGES}
            for split, outcome in (("train", KEPT), ("validation", VALIDATION))
        },
    )


def gathered(folder: Path, buckets: int) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """The index, and source -> licence -> pairs, from what the tasks wrote."""
    shards: list[dict[str, Any]] = []
    licences: dict[str, Counter[str]] = {}
    for number in range(buckets):
        document = read_json(folder / "write" / "index" / f"{number:05d}.json")
        shards += document["shards"]
        for source, licence, pairs in document["licences"]:
            licences.setdefault(source, Counter())[licence or "unknown"] += pairs
    shards.sort(key=lambda shard: shard["file"])
    totals: dict[str, dict[str, Any]] = {}
    formats = {shard["file"].rpartition(".")[2] for shard in shards}
    for shard in shards:
        if shard["file"].endswith(min(formats)):  # of two formats, each with everything, one counts
            total = totals.setdefault(shard["split"], {"images": 0, "pairs": dict.fromkeys(LANGUAGES, 0), "bytes": 0})
            total["images"] += shard["rows"]
            total["bytes"] += shard["bytes"]
            for language in LANGUAGES:
                total["pairs"][language] += shard["pairs"][language]
    if not totals:
        raise ValueError(f"Nothing was kept for {folder}: the stages before dropped every row; see their report.json.")
    return {"format": INDEX_FORMAT, "totals": totals, "shards": shards}, {k: dict(v) for k, v in licences.items()}


def verify(folder: Path) -> list[str]:
    """What is wrong with the shards of a folder, one sentence per file; empty if each is what the index says.

    Raises:
        ValueError: without a readable index.
    """
    shards = _listed(folder / "index.json")
    wrong = []
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file():
            wrong.append(f"{shard['file']} is missing.")
        elif path.stat().st_size != shard["bytes"]:
            wrong.append(f"{shard['file']} has {path.stat().st_size} bytes; the index says {shard['bytes']}.")
        elif sha256_of(path) != shard["sha256"]:
            wrong.append(f"{shard['file']} has other content than the index says (SHA-256).")
    known = {shard["file"] for shard in shards}
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("*.tar")]):
        if path.name not in known:
            wrong.append(f"{path.name} is not in the index.")
    return wrong


def _listed(path: Path) -> list[dict[str, Any]]:
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != INDEX_FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"{path} has format {found!r}; expected {INDEX_FORMAT}.")
    shards = index.get("shards")
    for shard in shards if isinstance(shards, list) else [None]:
        if not isinstance(shard, dict) or not {"file", "bytes", "sha256"} <= shard.keys():
            raise ValueError(f"{path} is damaged: {str(shard)[:100]} is no entry of a shard.")
    return shards


def versions() -> dict[str, str]:
    """Of Python and of the packages that can change a byte or a score."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _sources(reports: dict[str, Report]) -> list[str]:
    names: dict[str, None] = {}
    for report in reports.values():
        names.update(dict.fromkeys(report.counts.as_dict()))
    return list(names)


def _languages(counts: Counts) -> list[str]:
    return sorted({language for languages in counts.as_dict().values() for language in languages})
