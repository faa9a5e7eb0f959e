"""docs/corpus.md and the example files say what the code does. Its snippets run in tests/contracts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from training.corpus import clean, rewrite, score, shards, tokenizer, translate
from training.corpus.adapters import PUBLISHED
from training.corpus.config import STAGES, load_config
from training.corpus.downloads import command
from training.corpus.entries import REASONS as SOURCE_REASONS
from training.corpus.plan import PlanSettings
from training.corpus.sources import SourcesSettings

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
SETTINGS = {
    "sources": SourcesSettings,
    "clean": clean.CleanSettings,
    "score": score.ScoreSettings,
    "rewrite": rewrite.RewriteSettings,
    "translate": translate.TranslateSettings,
    "shards": shards.ShardsSettings,
    "tokenizer": tokenizer.TokenizerSettings,
    "plan": PlanSettings,
}


@pytest.mark.parametrize("name", ["laptop", "example"])
def test_the_examples_are_read_without_an_error(name: str):
    config = load_config(ROOT / "training" / "corpus" / f"{name}.yaml")
    for section in config.sections:
        config.section(section, SETTINGS[section])
    if name == "example":
        assert [*config.sections] == [*STAGES, "plan"]
        used = {entry.adapter for entry in config.section("sources", SourcesSettings).list}
        assert used == {*PUBLISHED} - {"parquet", "tar", "urls"}


def test_the_download_command_is_the_one_that_the_stage_prints():
    start = GUIDE.index("    uvx --python")
    shown = " ".join(GUIDE[start : GUIDE.index("\n\n", start)].split())
    assert shown == " ".join(command(Path("corpus/downloads/wukong")).split())


@pytest.mark.parametrize(
    "reasons", [SOURCE_REASONS, clean.REASONS, tuple(shards.REASONS)], ids=["sources", "clean", "shards"]
)
def test_every_reason_is_explained(reasons: tuple[str, ...]):
    named = {*re.findall(r"`(\w+)`", GUIDE)}
    assert not {*reasons} - named


@pytest.mark.parametrize("kind", [shards.ShardsSettings, tokenizer.TokenizerSettings, PlanSettings])
def test_settings_that_the_guide_names_exist(kind: Any):
    """And each of the shards' settings is named."""
    names = {field.name for field in dataclasses.fields(kind)}
    section = {"ShardsSettings": "shards", "TokenizerSettings": "tokenizer", "PlanSettings": "plan"}[kind.__name__]
    assert {*re.findall(rf"`{section}\.(\w+)", GUIDE)} <= names
    if kind is shards.ShardsSettings:
        assert {"format", "bytes", "zh_share", "validation", "push_to_hub", "private"} <= names
        table = GUIDE[GUIDE.index("## Shards") : GUIDE.index("*One row is one image")]
        assert names - {"title", "fan_out"} <= {*re.findall(r"`(\w+)`", table)}
