"""The plan: every number worked out by hand, its rates where they come from, the paper's list of sources."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.corpus.shard_parts import bilingual, finish
from training.corpus.__main__ import main
from training.corpus.config import STAGES, CorpusConfig, ExecutorSettings
from training.corpus.engine import KEPT, Counts
from training.corpus.plan import HERE, PlanSettings, measured_shares, numbers, plan, read_yaml

ROOT = Path(__file__).parents[3]
SOURCES = [
    {"name": "a", "language": "en", "rows": 1000, "bytes_per_image": 100, "translated": True},
    {"name": "b", "language": "zh", "rows": 200, "bytes_per_image": 200, "addresses": False},
    {"name": "c", "language": "zh", "rows": 7000, "public": False},
]
SHARES = {"alive": 0.8, "clean": 0.5, "high": 0.75, "rewrite": 0.5, "translate": 0.9}
RATES = {
    "download": 10,
    "sources": 20,
    "clean": 8,
    "score": 5,
    "rewrite": 1,
    "translate": 7,
    "shards": 4,
    "tokenizer": 3,
}


def config(stages: dict[str, Any] | None = None, **settings: Any) -> CorpusConfig:
    section = {"sources": SOURCES, "shares": SHARES, "rates": RATES, "bytes": {"row": 10}, **settings}
    return CorpusConfig(Path("corpus"), 0, ExecutorSettings(), {**(stages or {}), "plan": section})


def test_rows_bytes_and_hours_by_hand():
    made = plan(config({stage: {} for stage in STAGES} | {"shards": {"zh_share": 0.4}, "tokenizer": {"texts": 500}}))
    rows = {(step.stage, step.source): (step.rows_in, step.rows_out) for step in made.steps}
    assert rows == {
        ("download", "a"): (1000, 800),
        ("sources", "a"): (800, 800),
        ("clean", "a"): (800, 400),
        ("score", "a"): (400, 300),
        ("rewrite", "a"): (100, 50),
        ("translate", "a"): (350, 315),
        ("sources", "b"): (200, 200),
        ("clean", "b"): (200, 100),
        ("score", "b"): (100, 75),
        ("rewrite", "b"): (25, 12),  # 12.5
        ("shards", "all"): (350 + 315 + 87, 583),
        ("tokenizer", "all"): (583, 500),
    }
    # English is short: 350 / 0.6 = 583.3 pairs, 233 of them Chinese.
    assert made.kept == {"en": 350, "zh": 233}
    written = {stage: total["bytes"] for stage, total in made.totals().items()}
    assert written == {
        "download": 800 * 110,
        "sources": 800 * 110 + 200 * 210,
        "clean": 400 * 110 + 100 * 210,
        "score": 400 * 110 + 100 * 210,  # high and low
        "rewrite": 50 * 110 + 12 * 210,
        "translate": 315 * 110,
        "shards": (350 * 100 + 87 * 200) * 583 // 752 + 583 * 10,  # an image once, also with two languages
        "tokenizer": 0,
    }
    assert made.disk() == sum(written.values()) + written["shards"]
    hours = made.hours()
    assert hours["machine"] == pytest.approx(1000 / 10 / 3600)
    core = 1000 / 20 + 1000 / 8 + 752 / 4 + 500 / 3
    assert hours["core"] == pytest.approx(core / 3600)
    gpu = 500 / 5 + 125 / 1 + 125 / 5 + 350 / 7  # scores, texts, their scores, translations
    assert hours["gpu"] == pytest.approx(gpu / 3600)


def test_only_the_stages_of_the_file():
    made = plan(config({"sources": {}, "clean": {}, "shards": {}}))
    assert [*made.totals()] == ["download", "sources", "clean", "shards"]
    assert made.kept == {"en": 400, "zh": 100} and made.hours()["gpu"] == 0
    chosen = plan(config({"clean": {}, "translate": {"sources": ["a"]}}, sources=[{**SOURCES[0], "translated": False}]))
    assert chosen.pairs == {"a": {"en": 400, "zh": 360}}


def test_a_source_that_is_rewritten_as_a_whole():
    source = {
        "name": "a",
        "language": "en",
        "rows": 1000,
        "bytes_per_image": 100,
        "generated": True,
        "addresses": False,
    }
    made = plan(config(None, sources=[source]))
    steps = {step.stage: (step.rows_in, step.rows_out) for step in made.steps}
    assert steps["score"] == (500, 0) and steps["rewrite"] == (500, 250)


def test_billions_are_exact():
    source = {"name": "a", "language": "en", "rows": 6 * 10**9 + 1, "addresses": False}
    made = plan(config({"clean": {}}, sources=[source], shares={"clean": 0.1}))
    assert made.steps[-1].rows_out == int((6 * 10**9 + 1) * Fraction(1, 10)) == 600_000_000


def test_the_printed_plan_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "corpus.yaml"
    settings = {"sources": SOURCES, "rates": {"score": 500}, "gpus": 4, "write": str(tmp_path / "plan.json")}
    file.write_text(yaml.safe_dump({"output": "corpus", "plan": settings}))
    main(["plan", "--config", str(file)])
    printed = capsys.readouterr().out
    assert "not public, counts nothing" in printed and "days on 4 GPUs" in printed
    assert "rates.score = 500 rows/s of a gpu (yours: the corpus file)" in printed
    assert "shares.alive = 0.8 (assumed:" in printed
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["pairs"]["by_source"].keys() == {"a", "b"}
    assert {"group", "name", "value", "kind", "source", "unit"} == document["rests_on"][0].keys()


# ---- The data of the package


def test_the_papers_sources_are_a_list_for_the_plan():
    table = read_yaml(HERE / "table_12.yaml")
    made = plan(CorpusConfig(Path("corpus"), 0, ExecutorSettings(), {}))
    assert [source.name for source in made.sources] == [source["name"] for source in table["sources"]]
    (closed,) = [source for source in made.sources if not source.public]
    assert (closed.name, closed.rows, closed.pairs_in_paper) == ("in-house", 680_000_000, 680_000_000)
    assert closed.name not in made.pairs
    assert all(source.rows_from for source in made.sources)
    assert made.pairs["laion-2b-en"]["zh"] > 0  # LAION-EN (translated)
    assert table["paper"]["en"] + table["paper"]["zh"] == table["paper"]["pairs"]
    assert 3e9 < sum(made.kept.values()) < 6e9


def test_every_rate_says_how_far_to_trust_it():
    for group in read_yaml(HERE / "rates.yaml").values():
        for name, entry in group.items():
            assert entry["kind"] in ("measured", "published", "assumed") and entry["from"], name
            if entry["kind"] == "measured":
                assert (ROOT / entry["from"]).is_file(), f"{name}: {entry['from']}"
            if entry.get("unit") == "gpu":
                assert entry["kind"] != "measured"  # no GPU was at hand


def test_measured_rates_are_those_of_the_benchmarks():
    rates = read_yaml(HERE / "rates.yaml")["rates"]
    shards = json.loads((ROOT / "benchmarks" / "corpus_shards.json").read_text())["runs"]
    assert rates["shards"]["value"] == pytest.approx(shards[-1]["rows_per_core_second"], rel=0.05)
    web = json.loads((ROOT / "benchmarks" / "corpus_web_images.json").read_text())["stages"]
    for stage, found in web.items():
        assert rates[stage]["value"] == pytest.approx(found["rows_per_core_second"], rel=0.05)
    tokenizer = json.loads((ROOT / "benchmarks" / "corpus_tokenizer.json").read_text())
    seconds = tokenizer["count_cpu_seconds"] + tokenizer["learn_cpu_seconds"]
    assert rates["tokenizer"]["value"] == pytest.approx(tokenizer["captions"] / seconds, rel=0.05)


def test_shares_of_a_small_corpus(tmp_path: Path):
    rows = bilingual(5, 5)
    finish(tmp_path, "clean", "kept", rows, Counts({"drawn": {"en": {KEPT: 30, "short_text": 10}}}))
    finish(tmp_path, "score", "high", rows, Counts({"drawn": {"en": {KEPT: 6, "low": 24}}}))
    assert measured_shares(tmp_path) == {"clean": 0.75, "high": 0.2}
    known = numbers(PlanSettings(shares_of=tmp_path, shares={"high": 0.3}))["shares"]
    assert (known["clean"].value, known["clean"].kind) == (0.75, "measured")
    assert (known["high"].value, known["high"].kind) == (0.3, "yours")
    with pytest.raises(ValueError, match="no stage from `clean` on is finished"):
        measured_shares(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": {"clean": 1.5}}, "plan.shares.clean is 1.5"),
        ({"shares": {"nothing": 0.5}}, "has no 'nothing'; there are"),
        ({"rates": {"score": 0}}, "plan.rates.score is 0"),
        ({"sources": [{"name": "a", "language": "en", "rows": -1}]}, "has -1 rows"),
        ({"sources": [{"name": "a", "language": "fr", "rows": 1}]}, "language is 'fr'"),
        ({"costs": 1}, "unknown settings"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan(config(None, **settings))
