"""The tokenizer's stage: who is sampled, the same vocabulary as from one process, and what it is measured to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tests.training.corpus.shard_parts import corpus, row
from tests.training.test_pretrain import log_of
from training.configs import nano_smoke
from training.corpus import shards, tokenizer
from training.corpus.config import CorpusConfig, ExecutorSettings
from training.corpus.engine import KEPT, read_report
from training.corpus.tokenizer import HELD_OUT, NOT_SAMPLED, TokenizerSettings, captions, measure, sample
from training.pretrain import pretrain
from training.tokenizer import train_tokenizer

COLOURS = {"en": "red green blue yellow black white".split(), "zh": "红色 绿色 蓝色 黄色 黑色 白色".split()}
SHAPES = {"en": "circle square triangle star".split(), "zh": "圆形 正方形 三角形 星形".split()}


def caption(number: int, language: str) -> str:
    colour, shape = COLOURS[language][number % 6], SHAPES[language][number // 6 % 4]
    return f"a {colour} {shape} number {number}" if language == "en" else f"第{number}个{colour}的{shape}"


def build(output: Path, english: int = 120, chinese: int = 120, **settings: Any) -> CorpusConfig:
    rows = [row("a", n, "en", text=caption(n, "en")) for n in range(english)]
    rows += [row("b", n, "zh", drawn=n, text=caption(n, "zh")) for n in range(chinese)]
    executor = ExecutorSettings(workers=settings.pop("workers", 1))
    made = settings.pop("shards", {"bytes": 12_000})
    sections = {"shards": made, "tokenizer": {"vocab_size": 150, **settings}}
    config = corpus(output, rows, sections, executor=executor)
    shards.run(config)
    return config


def files(output: Path) -> dict[str, bytes]:
    return {name: (output / "tokenizer" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


def test_the_vocabulary_is_that_of_all_sampled_captions_in_one_process(tmp_path: Path):
    config = build(tmp_path)
    report = tokenizer.run(config)
    held = {
        one["text"]
        for part in (tmp_path / "tokenizer" / "count" / "held_out").iterdir()
        for one in pq.read_table(part).to_pylist()
    }
    texts = [
        text
        for shard in sorted((tmp_path / "shards").glob("train-*"))
        for _, _, _, text in captions(shard)
        if text not in held
    ]
    assert len(texts) + len(held) == 240 and 0 < len(held) < 30
    assert report.counts.outcomes() == {KEPT: len(texts), HELD_OUT: len(held)}
    train_tokenizer(texts, 150).save_pretrained(tmp_path / "expected")
    for name, data in files(tmp_path).items():
        assert data == (tmp_path / "expected" / name).read_bytes()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(loaded) == report.extra["vocab_size"] <= 150
    assert loaded("a red circle")["input_ids"][0] == loaded.cls_token_id


def test_the_same_bytes_with_two_workers_from_tar_shards_and_again(tmp_path: Path):
    first = build(tmp_path / "parquet")
    tokenizer.run(first)
    tokenizer.run(build(tmp_path / "tar", workers=2, shards={"bytes": 12_000, "format": "tar"}))
    assert files(tmp_path / "parquet") == files(tmp_path / "tar")
    before = files(tmp_path / "parquet")
    report = tokenizer.run(first)
    assert files(tmp_path / "parquet") == before
    assert read_report(tmp_path / "parquet" / "tokenizer").extra == report.extra


def test_sampled_in_the_shares_that_were_asked_for(tmp_path: Path):
    report = tokenizer.run(build(tmp_path, 400, 200, texts=150, zh_share=0.25))
    english, chinese = (report.counts.total(KEPT, language=name) for name in ("en", "zh"))
    # 112.5 and 37.5, by hashes: standard deviations of 9.0 and 5.5
    assert 85 < english < 140 and 22 < chinese < 54
    assert report.counts.total(NOT_SAMPLED) == 600 - english - chinese - report.counts.total(HELD_OUT)


PLACES = 2**64


@pytest.mark.parametrize(
    ("pairs", "settings", "shares"),
    [
        # Of 1,000 each a twentieth is held out; 950 and 950 are enough for 400.
        ({"en": 1000, "zh": 1000}, {"texts": 400}, {"en": (0.2, 0.95), "zh": (0.2, 0.95)}),
        # 95 Chinese ones in 95 + 95.
        ({"en": 1000, "zh": 100}, {"texts": 4000}, {"en": (0.095, 0.95), "zh": (0.95, 0.95)}),
        # As in the corpus, all of it.
        ({"en": 1000, "zh": 100}, {"texts": 4000, "zh_share": None}, {"en": (0.95, 0.95), "zh": (0.95, 0.95)}),
        # 20,000 of a million are held out; a quarter of 100,000 is Chinese.
        (
            {"en": 10**6, "zh": 10**6},
            {"texts": 100_000, "zh_share": 0.25},
            {"en": (0.075, 0.98), "zh": (0.025, 0.98)},
        ),
        ({"en": 1000, "zh": 0}, {"zh_share": None, "texts": 475}, {"en": (0.475, 0.95), "zh": (0.0, 0.95)}),
    ],
)
def test_sample_by_hand(pairs: dict[str, int], settings: dict[str, Any], shares: dict[str, tuple[float, float]]):
    found = sample(pairs, TokenizerSettings(**settings))
    for language, (learned, held) in shares.items():
        assert found[language][0] / PLACES == pytest.approx(learned, abs=1e-9)
        assert found[language][1] / PLACES == pytest.approx(held, abs=1e-9)


def test_measure_by_hand():
    learned = train_tokenizer(["a red star", "红色的星"] * 5, 200, max_length=5)
    one = len(learned("red", add_special_tokens=False)["input_ids"])
    found = measure(learned, [("en", "red"), ("en", "red ☃"), ("zh", "红")])
    assert found["en"]["texts"] == 2 and found["en"]["characters"] == 3 + 5
    unknown = learned("red ☃", add_special_tokens=False)["input_ids"].count(learned.unk_token_id)
    assert unknown == 1
    tokens = one + len(learned("red ☃", add_special_tokens=False)["input_ids"])
    assert found["en"]["unknown_tokens"] == 1 / tokens
    assert found["en"]["tokens_per_character"] == tokens / 8 and found["en"]["tokens_per_text"] == tokens / 2
    # With [CLS] and the end token a text of more than three tokens is longer than five.
    assert found["zh"]["unknown_tokens"] == 0 and found["zh"]["truncated"] == 0
    assert measure(learned, [("en", "a a a"), ("en", "a a a a")])["en"]["truncated"] == 0.5


def test_pretraining_takes_it(tmp_path: Path):
    config = build(tmp_path)
    report = tokenizer.run(config)
    preset = nano_smoke()
    data = dataclasses.replace(preset.data, files=(f"{tmp_path}/shards/*.parquet",))
    pretrain(
        dataclasses.replace(preset, output_dir=str(tmp_path / "run"), data=data, tokenizer=str(tmp_path / "tokenizer"))
    )
    assert len(log_of(tmp_path / "run")) == 4
    trained = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert len(trained) == report.extra["vocab_size"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 20}, "vocab_size must be at least"),
        ({"texts": 0}, "tokenizer.texts is 0"),
        ({"zh_share": 0.0}, "tokenizer.zh_share is 0.0"),
        ({"vocabulary": 20}, "unknown settings"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str):
    config = build(tmp_path, 20, 20, **settings)
    with pytest.raises((ValueError, RuntimeError), match=message):
        tokenizer.run(config)
    assert not (tmp_path / "tokenizer" / "tokenizer.json").exists()


def test_a_language_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match="zh_share is 0.5, but the shards have {'en': 20, 'zh': 0}: set it to null"):
        tokenizer.run(build(tmp_path / "half", 20, 0))
    tokenizer.run(build(tmp_path / "none", 20, 0, zh_share=None))
    assert (tmp_path / "none" / "tokenizer" / "tokenizer.json").is_file()


def test_the_shards_must_be_there(tmp_path: Path):
    config = CorpusConfig(tmp_path, 0, ExecutorSettings(workers=1), {"tokenizer": {}})
    with pytest.raises(ValueError, match="Run the stage `shards` first"):
        tokenizer.run(config)
