"""What a benchmark gives: scores with their chance level and interval, as JSON for programs, as a flat dict for a
training log, and the counts behind them for paired tests later.

Letters: N images, Q queries, C scores.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import replaced
from .stats import Interval, Sample, bootstrap, paired_bootstrap

VERSIONS_OF = ("torch", "transformers", "datasets", "numpy", "pillow")


class Score(NamedTuple):
    """A fraction in [0, 1], and what a random ranking or guess is expected to reach."""

    value: float
    chance: float


@dataclass(frozen=True)
class Benchmark:
    """The scores of one model on one data set under one protocol."""

    name: str
    protocol: str
    files: tuple[str, ...]
    counts: dict[str, int]
    """What was scored: images, texts per language, classes, ..."""
    metrics: dict[str, dict[str, Score]]
    """metric -> language -> score."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What a reader should know of the data: images without a text, class names that collide, ..."""
    samples: dict[str, tuple[Sample, ...]] = field(default_factory=dict)
    """language -> hits per image, from which intervals and paired tests come; together they cover all metrics."""
    paired: bool = False
    """Whether all languages speak of the very same images, so that their difference can be tested."""
    ranks: dict[str, np.ndarray] = field(default_factory=dict)
    """"zh/text_greater" and so on: the ranks of every query, from which recall at any K follows."""
    details: dict[str, Any] = field(default_factory=dict)
    """Long lists for programs, such as the accuracy of every class."""
    revision: str | None = None
    """The commit of the data set, where it is known."""

    def flat(self) -> dict[str, float]:
        """`{"name/language/metric": value}` for a training log."""
        return {
            f"{self.name}/{language}/{metric}": score.value
            for metric, scores in self.metrics.items()
            for language, score in scores.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Everything but samples and ranks: fractions unrounded, each with its chance level and the ends of its 95 %
        interval; and for paired zh and en their difference, with its interval and p-value."""
        intervals, notes = self._intervals()
        metrics = {
            metric: {
                language: {**score._asdict(), **_ends(intervals.get(language, {}).get(metric))}
                for language, score in scores.items()
            }
            for metric, scores in self.metrics.items()
        }
        plain = {name: getattr(self, name) for name in ("name", "protocol", "counts", "paired")}
        gap: dict[str, Any] = {}
        if self.paired and {"zh", "en"} <= set(self.samples):
            try:
                gap = compare_samples(self.samples["zh"], self.samples["en"])
            except ValueError as error:
                notes["no test of the gap"] = str(error)
        return {
            **plain,
            "notes": notes,
            "files": list(self.files),
            "metrics": metrics,
            **({"gap_zh_en": gap} if gap else {}),
            **({"details": self.details} if self.details else {}),
        }

    def _intervals(self) -> tuple[dict[str, dict[str, Interval]], dict[str, Any]]:
        """language -> score -> interval, and the notes. So few images may have a query that a resample holds none: then
        there is no interval, and a note says so."""
        intervals: dict[str, dict[str, Interval]] = {}
        notes = dict(self.notes)
        for language, own in self.samples.items():
            intervals[language] = {}
            for sample in own:
                try:
                    intervals[language] |= bootstrap(sample)
                except ValueError as error:
                    notes[f"no {language} intervals"] = str(error)
        return intervals, notes


def compare_samples(first: Sequence[Sample], second: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """`first` minus `second` for every score that both have: value, low, high (95 %), p_value.

    Raises:
        ValueError: for samples of different images.
    """
    others = {sample.names: sample for sample in second}
    differences: dict[str, dict[str, float]] = {}
    for sample in first:
        if sample.names not in others:
            continue
        for name, found in paired_bootstrap(sample, others[sample.names]).items():
            differences[name] = {
                "value": found.value,
                "low": found.low,
                "high": found.high,
                "p_value": found.p_value,
            }
    return differences


def environment() -> dict[str, Any]:
    """When and with which libraries."""
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in VERSIONS_OF}},
    }


def write_counts(path: Path, benchmarks: Sequence[Benchmark]) -> None:
    """The samples and ranks of some benchmarks, as one .npz file without objects.

    Raises:
        ValueError: for a place that cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for b, benchmark in enumerate(benchmarks):
        arrays |= {f"{b}/ranks/{name}": values for name, values in benchmark.ranks.items()}
        for language, own in benchmark.samples.items():
            for s, sample in enumerate(own):
                head = f"{b}/samples/{language}/{s}"
                arrays[f"{head}/hits"], arrays[f"{head}/queries"] = sample.hits, sample.queries
                arrays[f"{head}/names"] = np.array([*sample.names, sample.mean or ""])
                if sample.image_ids is not None:
                    arrays[f"{head}/image_ids"] = np.array(sample.image_ids)
    with replaced(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_samples(path: Path) -> list[dict[str, tuple[Sample, ...]]]:
    """What `write_counts` wrote: for every benchmark language -> samples.

    Raises:
        ValueError: for a file that is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        # Not what numpy says, which is how to load a pickle nevertheless.
        raise ValueError(f"{path} is not a readable file of counts. Delete it and run again.") from error
    found: dict[int, dict[str, list[Sample]]] = {}
    for name in arrays:
        b, kind, *rest = name.split("/")
        if kind == "samples" and rest[-1] == "hits":
            head = name.removesuffix("/hits")
            *names, mean = arrays[f"{head}/names"].tolist()
            ids = arrays.get(f"{head}/image_ids")
            sample = Sample(
                tuple(names),
                arrays[f"{head}/hits"],
                arrays[f"{head}/queries"],
                mean or None,
                None if ids is None else tuple(ids.tolist()),
            )
            found.setdefault(int(b), {}).setdefault(rest[0], []).append(sample)
    return [
        {language: tuple(own) for language, own in found.get(b, {}).items()} for b in range(max(found, default=-1) + 1)
    ]


def _ends(interval: Any) -> Mapping[str, float]:
    return {} if interval is None else {"low": interval.low, "high": interval.high}
