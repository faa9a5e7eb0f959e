"""Stage `score`: the cosine of image and text of every clean row, and two streams, at or above the threshold and below.

    score/high/part-*      rows with their score, from the threshold on (paper, section 2.2: 0.25)
    score/low/part-*       the others, which the stage `rewrite` reads
    score/dropped/part-*   rows that cannot be scored: LOST
    score/histogram.png    the scores by source and language; the counts stand in report.json

CLIP is the real cost of a corpus: a ViT-B/32 scores 13 pairs/s on two CPU cores, all rules before it 880 images/s.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from .config import CorpusConfig
from .engine import KEPT, Counts, Report, run_stage, write_report
from .rows import PartWriter, parts, read_rows
from .score_histogram import Histogram, draw
from .scorer import Scorer, ScoreSettings

LOST = pa.schema([(name, pa.string()) for name in ("id", "source", "language", "reason")])
LOW = "low"
_SUSPICIOUS = 10  # pairs of NaN and no other score: fewer may be chance, in a short part


def run(config: CorpusConfig) -> Report:
    """Scores all parts of clean/kept.

    Raises:
        ValueError: for wrong settings, a model that cannot be loaded, or one that gives nothing but NaN.
    """
    settings = config.section("score", ScoreSettings)
    inputs = parts(config.output / "clean" / "kept")
    task = _Task(config.output, settings)
    report = run_stage(config, "score", len(inputs), task, settings.identity(), after=["clean"])
    histogram = Histogram.merged(config.output / "score" / "histogram", len(inputs))
    draw(histogram, settings, config.output / "score" / "histogram.png")
    report = dataclasses.replace(report, extra={"histogram": histogram.as_dict()})
    write_report(config.output / "score", report)
    return report


@dataclass(frozen=True)
class _Task:
    output: Path
    settings: ScoreSettings

    def __call__(self, number: int) -> Counts:
        name = f"part-{number:05d}.parquet"
        counts, histogram, scorer = Counts(), Histogram(), Scorer(self.settings)
        rows = read_rows(self.output / "clean" / "kept" / name)
        folder = self.output / "score"
        with (
            PartWriter(folder / "high" / name) as high,
            PartWriter(folder / "low" / name) as low,
            PartWriter(folder / "dropped" / name, LOST) as lost,
        ):
            for row, (score, reason) in scorer.scored(rows):
                outcome = reason
                if score is None:
                    lost.write({**{key: row[key] for key in ("id", "source", "language")}, "reason": reason})
                else:
                    histogram.add(row["source"], row["language"], score)
                    kept = scorer.passes(row["language"], score)
                    outcome = KEPT if kept else LOW
                    (high if kept else low).write({**row, "score": score})
                counts.add(row["source"], row["language"], outcome)
            _refuse_nothing_but_nan(counts, name)
        histogram.write(folder / "histogram", number)
        return counts


def _refuse_nothing_but_nan(counts: Counts, name: str) -> None:
    nan = counts.total("not_finite")
    if nan >= _SUSPICIOUS and not counts.total(KEPT) + counts.total(LOW):
        raise ValueError(
            f"The model gives NaN or infinity for all {nan} pairs of {name}: damaged weights, or a dtype too narrow "
            "for it (try float32)."
        )
