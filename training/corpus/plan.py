"""`python -m training.corpus plan --config FILE`: what a corpus will hold and cost, before anything is run.

From a list of sources with their rows, and shares and rates that are data (rates.yaml): rows and bytes after every
stage, hours of machines, cores and GPUs, and disk. Every number that a result rests on is printed with where it comes
from; those that nobody measured are marked as assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from eval.files import write_json

from .config import STAGES, CorpusConfig, build
from .engine import KEPT, read_report
from .tokenizer import TokenizerSettings

HERE = Path(__file__).parent
UNITS = {"machine": "machine-hours", "core": "core-hours", "gpu": "GPU-hours"}


@dataclass(frozen=True)
class PlannedSource:
    """One source as it will be downloaded."""

    name: str
    language: Literal["en", "zh"]
    rows: int
    bytes_per_image: int | None = None
    """None: the `image` of rates.yaml."""
    addresses: bool = True
    """Whether its images must be downloaded, and some of them will be gone."""
    translated: bool = False
    """Whether its English pairs are translated to Chinese as well."""
    generated: bool = False
    """Whether it gets new texts from the rewriter whatever its scores are."""
    public: bool = True
    """Sources that are not public are listed, and count nothing."""
    rows_from: str = ""
    pairs_in_paper: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 0 or (self.bytes_per_image or 1) < 1:
            raise ValueError(f"source {self.name!r} has {self.rows} rows of {self.bytes_per_image} bytes.")


@dataclass(frozen=True)
class Number:
    """A number of rates.yaml."""

    value: float
    kind: str
    source: str
    unit: str = ""


@dataclass(frozen=True)
class PlanSettings:
    """`plan:` of the corpus file."""

    sources: tuple[PlannedSource, ...] | None = None
    """None: those of the paper's Table 12 (table_12.yaml)."""
    rates: dict[str, float] = field(default_factory=dict)
    """Rows per second of one machine, core or GPU, instead of those of rates.yaml."""
    shares: dict[str, float] = field(default_factory=dict)
    """Shares of rows that go on, instead of those of rates.yaml."""
    shares_of: Path | None = None
    """A corpus whose finished stages give the shares that `shares` does not: build a small one first."""
    bytes: dict[str, int] = field(default_factory=dict)
    """`image` and `row`, instead of those of rates.yaml."""
    cores: int | None = None
    """How many there are; then days are printed too."""
    gpus: int | None = None
    machines: int | None = None
    """That download."""
    write: Path | None = None
    """A JSON file for the plan."""


def run(config: CorpusConfig) -> None:
    """Prints the plan of a corpus, and writes it if the settings say so; see `plan`."""
    settings = config.section("plan", PlanSettings)
    made = plan(config)
    print(made.text(settings))
    if settings.write is not None:
        write_json(settings.write, made.as_dict())


def plan(config: CorpusConfig) -> Plan:
    """The plan of a corpus, for the stages that the file has (all of them, if it has none).

    Raises:
        ValueError: for a share outside of (0, 1], a number that is not positive, or one that rates.yaml does not have.
    """
    settings = config.section("plan", PlanSettings)
    stages = [stage for stage in STAGES if config.has(stage)] or list(STAGES)
    sources = settings.sources
    if sources is None:
        sources = build(tuple[PlannedSource, ...], read_yaml(HERE / "table_12.yaml")["sources"], "table_12.yaml")
    translated = (config.sections.get("translate") or {}).get("sources") or []
    zh_share = (config.sections.get("shards") or {}).get("zh_share")
    texts = (config.sections.get("tokenizer") or {}).get("texts", TokenizerSettings.texts)
    return Plan(sources, numbers(settings), stages, frozenset(translated), zh_share, texts)


def numbers(settings: PlanSettings) -> dict[str, dict[str, Number]]:
    """Shares, bytes and rates: those of rates.yaml, those of `shares_of`, those of the settings, the last one wins."""
    document = read_yaml(HERE / "rates.yaml")
    found = {
        group: {
            name: Number(entry["value"], entry["kind"], entry["from"], entry.get("unit", ""))
            for name, entry in entries.items()
        }
        for group, entries in document.items()
    }
    if settings.shares_of is not None:
        for name, value in measured_shares(settings.shares_of).items():
            found["shares"][name] = Number(value, "measured", str(settings.shares_of))
    for group in ("shares", "bytes", "rates"):
        for name, value in getattr(settings, group).items():
            if name not in found[group]:
                raise ValueError(f"plan.{group} has no {name!r}; there are {list(found[group])}.")
            if not value > 0 or (group == "shares" and value > 1):
                raise ValueError(f"plan.{group}.{name} is {value}; expected more than 0{_most(group)}.")
            found[group][name] = Number(value, "yours", "the corpus file", found[group][name].unit)
    return found


def _most(group: str) -> str:
    return " and at most 1" if group == "shares" else ""


def measured_shares(corpus: Path) -> dict[str, float]:
    """The shares of the stages of a corpus that are finished."""
    shares = {}
    for stage, name in (("clean", "clean"), ("score", "high"), ("rewrite", "rewrite"), ("translate", "translate")):
        if (corpus / stage / "report.json").is_file():
            counts = read_report(corpus / stage).counts
            if counts.total() and counts.total(KEPT):
                shares[name] = counts.total(KEPT) / counts.total()
    if not shares:
        raise ValueError(f"plan.shares_of is {corpus}, where no stage from `clean` on is finished.")
    return shares


@dataclass(frozen=True)
class Step:
    """What one stage does to one source."""

    stage: str
    source: str
    rows_in: int
    rows_out: int
    bytes_out: int
    hours: dict[str, float]
    """unit -> hours."""


class Plan:
    """The steps of all sources, and their sums.

    Rows are whole numbers, rounded down after every step, and everything else follows from them.
    """

    def __init__(
        self,
        sources: tuple[PlannedSource, ...],
        known: Mapping[str, Mapping[str, Number]],
        stages: list[str],
        translate: frozenset[str] = frozenset(),
        zh_share: float | None = None,
        texts: int = TokenizerSettings.texts,
    ):
        self.sources, self.known, self.stages, self.zh_share, self.texts = sources, known, stages, zh_share, texts
        self.steps: list[Step] = []
        self.used: dict[tuple[str, str], Number] = {}
        self.pairs: dict[str, dict[str, int]] = {}
        """source -> language -> pairs that go into the shards, before the balance of languages."""
        self._images: dict[str, int] = {}
        for source in sources:
            if source.public:
                self._follow(source, source.translated or source.name in translate)
        self.kept = self._balanced()
        self._shards()

    def _number(self, group: str, name: str) -> Fraction:
        self.used[group, name] = self.known[group][name]
        return Fraction(str(self.known[group][name].value))

    def _go_on(self, rows: int, share: str) -> int:
        return int(rows * self._number("shares", share))

    def _size(self, source: PlannedSource) -> int:
        if source.bytes_per_image is not None:
            return source.bytes_per_image
        return int(self._number("bytes", "image"))

    def _step(self, stage: str, source: str, rows: int, out: int, size: int, **work: int) -> None:
        """`work`: rate -> rows that are done at it."""
        hours: dict[str, float] = {}
        for rate, done in work.items():
            unit = self.known["rates"][rate].unit
            hours[unit] = hours.get(unit, 0.0) + float(done / self._number("rates", rate) / 3600)
        self.steps.append(Step(stage, source, rows, out, size, hours))

    def _follow(self, source: PlannedSource, translated: bool) -> None:
        name, rows = source.name, source.rows
        each = self._size(source) + int(self._number("bytes", "row"))
        if source.addresses:
            alive = self._go_on(rows, "alive")
            self._step("download", name, rows, alive, alive * each, download=rows)
            rows = alive
        if "sources" in self.stages:
            self._step("sources", name, rows, rows, rows * each, sources=rows)
        if "clean" in self.stages:
            kept = self._go_on(rows, "clean")
            self._step("clean", name, rows, kept, kept * each, clean=rows)
            rows = kept
        low = 0
        if "score" in self.stages:
            high = 0 if source.generated else self._go_on(rows, "high")
            low = rows - high
            self._step("score", name, rows, high, rows * each, score=rows)  # both streams are written
            rows = high
        if "rewrite" in self.stages and low:
            better = self._go_on(low, "rewrite")
            self._step("rewrite", name, low, better, better * each, rewrite=low, score=low)
            rows += better
        self._images[name] = rows
        self.pairs[name] = {source.language: rows}
        if "translate" in self.stages and translated and source.language == "en":
            new = self._go_on(rows, "translate")
            self._step("translate", name, rows, new, new * each, translate=rows)
            self.pairs[name]["zh"] = new

    def _balanced(self) -> dict[str, int]:
        """language -> pairs in the shards."""
        have = {name: sum(of.get(name, 0) for of in self.pairs.values()) for name in ("en", "zh")}
        if self.zh_share is None or "shards" not in self.stages or not all(have.values()):
            return have
        zh = Fraction(str(self.zh_share))
        pairs = min(have["zh"] / zh, have["en"] / (1 - zh))
        return {"en": int(pairs * (1 - zh)), "zh": int(pairs * zh)}

    def _shards(self) -> None:
        pairs, kept = sum(sum(of.values()) for of in self.pairs.values()), sum(self.kept.values())
        if "shards" in self.stages and pairs:
            sizes = {source.name: self._size(source) for source in self.sources if source.public}
            images = sum(number * sizes[name] for name, number in self._images.items())  # once, with both languages
            size = images * kept // pairs + kept * int(self._number("bytes", "row"))
            self._step("shards", "all", pairs, kept, size, shards=pairs)
        if "tokenizer" in self.stages and kept:
            texts = min(kept, self.texts)
            self._step("tokenizer", "all", kept, texts, 0, tokenizer=texts)

    def totals(self) -> dict[str, dict[str, Any]]:
        """stage -> rows_in, rows_out, bytes, and hours by unit, over all sources."""
        found: dict[str, dict[str, Any]] = {}
        for step in self.steps:
            total = found.setdefault(step.stage, {"rows_in": 0, "rows_out": 0, "bytes": 0, "hours": {}})
            total["rows_in"] += step.rows_in
            total["rows_out"] += step.rows_out
            total["bytes"] += step.bytes_out
            for unit, hours in step.hours.items():
                total["hours"][unit] = total["hours"].get(unit, 0.0) + hours
        return found

    def hours(self) -> dict[str, float]:
        """unit -> hours of the whole corpus."""
        totals = [total["hours"] for total in self.totals().values()]
        return {unit: sum(hours.get(unit, 0.0) for hours in totals) for unit in UNITS}

    def disk(self) -> int:
        """Bytes that lie on disk at most: every stage's output, and the buckets of the shuffle beside the shards."""
        totals = self.totals()
        return sum(total["bytes"] for total in totals.values()) + totals.get("shards", {"bytes": 0})["bytes"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "sources": [vars(source) for source in self.sources],
            "steps": [vars(step) for step in self.steps],
            "stages": self.totals(),
            "pairs": {"by_source": self.pairs, "in_shards": self.kept},
            "hours": self.hours(),
            "disk_bytes": self.disk(),
            "rests_on": [
                {"group": group, "name": name, **vars(number)} for (group, name), number in sorted(self.used.items())
            ],
        }

    def text(self, settings: PlanSettings = PlanSettings()) -> str:
        """What `plan` prints."""
        lines = [
            f"{'stage':<11}{'rows in':>16}{'rows out':>16}{'written':>12}{'machine-h':>12}{'core-h':>12}{'GPU-h':>12}"
        ]
        for stage, total in self.totals().items():
            hours = "".join(f"{total['hours'].get(unit, 0.0):>12,.1f}" for unit in UNITS)
            written = _bytes(total["bytes"])
            lines.append(f"{stage:<11}{total['rows_in']:>16,}{total['rows_out']:>16,}{written:>12}{hours}")
        hours = self.hours()
        lines.append(
            f"{'all':<11}{'':>16}{'':>16}{_bytes(self.disk()):>12}" + "".join(f"{h:>12,.1f}" for h in hours.values())
        )
        for unit, number in (("machine", settings.machines), ("core", settings.cores), ("gpu", settings.gpus)):
            if number:
                lines.append(f"{hours[unit] / number / 24:,.1f} days on {number:,} {UNITS[unit].split('-')[0]}s")
        lines += ["", f"{'source':<28}{'language':<10}{'rows':>16}{'pairs en':>16}{'pairs zh':>16}"]
        for source in self.sources:
            pairs = self.pairs.get(source.name, {})
            counts = "".join(f"{pairs.get(language, 0):>16,}" for language in ("en", "zh"))
            note = counts if source.public else f"{'not public, counts nothing':>32}"
            lines.append(f"{source.name:<28}{source.language:<10}{source.rows:>16,}{note}")
        lines.append(f"{'in the shards':<38}{'':>16}" + "".join(f"{number:>16,}" for number in self.kept.values()))
        lines += ["", "It rests on:"]
        for (group, name), number in sorted(self.used.items()):
            unit = f" rows/s of a {number.unit}" if number.unit else ""
            lines.append(f"  {group}.{name} = {number.value:g}{unit} ({number.kind}: {number.source})")
        return "\n".join(lines)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of this package."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"
