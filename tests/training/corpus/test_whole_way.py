"""From a crawl to a trained model: every stage of the command line on a messy corpus, with a tiny model that scores, a
chat server that rewrites and translates and fails in between, and pretraining on the shards that come out."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from modeling_m2encoder import M2EncoderConfig, M2EncoderModel, M2EncoderProcessor
from tests.training.corpus.chat_server import ChatServer, Drop, Fault, Question, Status
from tests.training.corpus.messy import KEPT, build, needed
from tests.training.corpus.messy_check import differences
from tests.training.corpus.messy_pictures import drawn
from tests.training.test_pretrain import log_of
from training.corpus.__main__ import main
from training.corpus.engine import read_report
from training.corpus.rows import parts, read_rows
from training.corpus.scorer import Scorer, ScoreSettings

ROWS = 250
TRANSLATED = ["photos-en", "镜像-en"]


def answer(question: Question) -> str:
    """Captions as a good model writes them: the numbers of the old one stay."""
    raw = re.search(r"<caption>(.*?)</caption>", question.text, re.DOTALL)[1]
    number = (re.findall(r"\d+", raw) or ["7"])[-1]
    if "Translate" in question.text:
        return f"从{number}步之外看过去，雪地里有一只小狗。"
    if "中文" in question.text:
        return f"照片里是海边的一座老房子，在{number}步之外，天色很好。"
    return f"A small house near the sea, seen from {number} steps away on a bright day."


def fails_at_times(number: int, question: Question) -> Fault | None:
    return {3: Status(503), 11: Drop(after=10), 20: Status(429, headers={"Retry-After": "0"})}.get(number)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, config: M2EncoderConfig, processor: M2EncoderProcessor
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("whole")
    messy = build(folder, drawn(**needed(ROWS), seed=1), ROWS)
    here = ["--config", str(messy.config), "--workers", "1"]  # in this process, which has torch already
    main(["sources", *here])
    main(["clean", *here])
    assert differences(messy.truth, folder / "corpus") == []
    M2EncoderModel(config).eval().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    kept = [row for part in parts(folder / "corpus" / "clean" / "kept") for row in read_rows(part)]
    scorer = Scorer(ScoreSettings(model=str(folder / "model"), device="cpu"))
    middle = statistics.median(scored.score for _, scored in scorer.scored(kept))
    with ChatServer(answer, fails_at_times) as server:
        asked = {"url": server.url, "model": "tiny", "first_wait": 0.01}
        values = yaml.safe_load(messy.config.read_text(encoding="utf-8")) | {
            "score": {"model": str(folder / "model"), "threshold": middle, "device": "cpu"},
            "rewrite": {"server": asked},
            "translate": {"server": asked, "sources": TRANSLATED},
            "shards": {"format": "both", "bytes": 400_000},
            "tokenizer": {"vocab_size": 400},
        }
        messy.config.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        main(["all", *here])
        asked_first = len(server.asked)
        main(["all", *here])
        assert len(server.asked) == asked_first  # nothing is asked twice
    yield folder / "corpus"


def ids(folder: Path) -> set[str]:
    found = [row["id"] for part in parts(folder) for row in read_rows(part, ["id"])]
    assert len(found) == len({*found})
    return {*found}


def pairs(corpus: Path) -> list[dict[str, Any]]:
    return [
        pair
        for shard in (corpus / "shards").glob("*.parquet")
        for row in pq.read_table(shard).to_pylist()
        for pair in row["pairs"]
    ]


def test_every_row_is_somewhere_and_only_once(made: Path) -> None:
    clean, high, low = ids(made / "clean" / "kept"), ids(made / "score" / "high"), ids(made / "score" / "low")
    assert high | low == clean and not high & low and min(len(high), len(low)) > 50
    rewritten, given_up = ids(made / "rewrite" / "kept"), ids(made / "rewrite" / "dropped")
    assert rewritten | given_up == low and not rewritten & given_up and rewritten
    translated, quarantined = ids(made / "translate" / "kept"), ids(made / "translate" / "quarantine")
    english = {
        row["id"]
        for stream in ("score/high", "rewrite/kept")
        for part in parts(made / stream)
        for row in read_rows(part, ["id", "source", "language"])
        if row["language"] == "en" and row["source"] in TRANSLATED
    }
    assert {id.removesuffix("#zh") for id in translated} | quarantined == english and translated
    in_shards = Counter(pair["id"] for pair in pairs(made))
    assert in_shards == Counter(high | rewritten | translated)


def test_totals_go_on_from_stage_to_stage(made: Path) -> None:
    counts = {name: read_report(made / name).counts for name in ("sources", "clean", "score", "rewrite", "shards")}
    assert counts["sources"].total(KEPT) == counts["clean"].total()
    assert counts["clean"].total(KEPT) == counts["score"].total()
    assert counts["score"].total("low") == counts["rewrite"].total()
    translated = read_report(made / "translate").counts.total(KEPT)
    going_on = counts["score"].total(KEPT) + counts["rewrite"].total(KEPT) + translated
    assert counts["shards"].total(KEPT) == going_on
    manifest = json.loads((made / "shards" / "manifest.json").read_text(encoding="utf-8"))
    assert sum(source["kept"] for source in manifest["sources"]) == going_on
    for source in manifest["sources"]:
        lost = sum(number for reasons in source["lost"].values() for number in reasons.values())
        assert sum(source["rows_in"].values()) + source["translated"] == lost + source["kept"]


def test_what_was_rewritten_and_translated_says_so(made: Path) -> None:
    origins = Counter((pair["origin"], pair["language"]) for pair in pairs(made))
    assert {*origins} >= {("raw", "en"), ("raw", "zh"), ("rewritten", "en"), ("translated", "zh")}
    for pair in pairs(made):
        assert (pair["raw_text"] is None) == (pair["origin"] == "raw")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_nano_trains_on_the_shards_with_their_tokenizer(made: Path, tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-m", "training.pretrain", "nano", "--output-dir", str(tmp_path / "run")]
    command += ["--data.files", str(made / "shards" / f"*.{kind}"), "--tokenizer", str(made / "tokenizer")]
    command += [
        "--data.neighbours",
        "1",
        "--batch-size",
        "16",
        "--steps",
        "3",
        "--log-every",
        "1",
        "--optimizer.warmup-steps",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3] and all(0 < line["loss"] < 10 for line in lines)
    assert M2EncoderModel.from_pretrained(tmp_path / "run" / "model").config.vocab_size <= 400
