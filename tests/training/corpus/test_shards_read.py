"""Shards are read by `datasets`, by training's readers and by a run of pretraining; they go to a Hub and come back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.hub_card_rules import validate_card
from tests.hub_double import HubDouble
from tests.training.corpus.shard_parts import bilingual, corpus, row
from tests.training.test_pretrain import log_of
from training.configs import nano_smoke
from training.corpus import shards
from training.corpus.config import CorpusConfig
from training.corpus.shard_writers import FEATURES, SHARD_SCHEMA
from training.data import open_source
from training.pretrain import pretrain

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """40 images, of which 20 have captions in both languages, in each format."""
    rows = [row("a", n, "en", drawn=n) for n in range(30)] + [row("b", n, "zh", drawn=10 + n) for n in range(30)]
    folders = {}
    for kind in ("parquet", "tar"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        shards.run(corpus(folders[kind], rows, {"shards": {"format": kind, "bytes": 12_000}}))
    return {kind: folder / "shards" for kind, folder in folders.items()}


def test_the_features_are_those_of_datasets():
    assert datasets.Features.from_arrow_schema(SHARD_SCHEMA) == datasets.Features.from_dict(FEATURES)
    assert datasets.Features.from_dict(FEATURES).arrow_schema == SHARD_SCHEMA.remove_metadata()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_datasets_reads_the_folder(built: dict[str, Path], tmp_path: Path, kind: str, streaming: bool):
    data = datasets.load_dataset(str(built[kind]), split="train", streaming=streaming, cache_dir=str(tmp_path))
    found = Counter()
    for one in data:
        fields = one if kind == "parquet" else one["json"]
        image = one["image" if kind == "parquet" else "jpg"]
        assert image.size == (fields["width"], fields["height"]) == (16, 16)
        found.update(pair["id"] for pair in fields["pairs"])
        assert len(fields["captions_en"]) + len(fields["captions_zh"]) == len(fields["pairs"])
    assert found == Counter([*(f"a/0/{n}" for n in range(30)), *(f"b/0/{n}" for n in range(30))])


def test_training_reads_the_same_from_both_formats(built: dict[str, Path]):
    def rows(kind: str) -> list[Any]:
        source = open_source([f"{built[kind]}/*.{kind}"], streaming=True)
        wrong: list[str] = []
        found = [
            row.row for n in range(len(source.shards)) for row in source.read(n, 0, lambda *seen: wrong.append(seen))
        ]
        assert not wrong
        return found

    assert rows("parquet") == rows("tar") and len(rows("tar")) == 40
    indexed = open_source([f"{built['parquet']}/*.parquet"])
    assert indexed.rows(range(len(indexed))) == rows("parquet")
    assert sum(1 for _ in indexed.captions()) == 60


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_pretraining_takes_the_shards_as_they_are(built: dict[str, Path], tmp_path: Path, kind: str):
    """With the default names of columns; nano's 4 neighbours, which are for scenes, need files that can be indexed."""
    preset = nano_smoke()
    neighbours = {"tar": {"neighbours": 1}, "parquet": {}}[kind]
    data = dataclasses.replace(preset.data, files=(f"{built[kind]}/*.{kind}",), **neighbours)
    pretrain(dataclasses.replace(preset, output_dir=str(tmp_path / "run"), data=data))
    lines = log_of(tmp_path / "run")
    assert len(lines) == 4 and all(line["loss"] > 0 for line in lines)


# ---- The card and the Hub


def test_the_card(built: dict[str, Path]):
    text = (built["parquet"] / "README.md").read_text()
    assert validate_card(text, "dataset") == {"errors": [], "warnings": []}
    assert "| a | en | 30 | 30 | 50.0 % |\n| b | zh | 30 | 30 | 50.0 % |\n| all | en, zh | 60 | 60 | 100.0 % |" in text
    assert "| train | 40 | 30 | 30 | " in text and "| a | cc0-1.0 | 30 |" in text


def test_licences_in_the_data_do_not_write_the_card(tmp_path: Path):
    evil = "MIT |\n\n# Owned\n<script>alert(1)</script> [x](javascript:x)"
    rows = [row("a", n, "en", licence=evil if n < 5 else f"licence {n}") for n in range(30)]
    shards.run(corpus(tmp_path, rows, {"shards": {}}))
    text = (tmp_path / "shards" / "README.md").read_text()
    assert validate_card(text, "dataset")["errors"] == []
    assert "\n# Owned" not in text and "<script" not in text and "[x](" not in text.replace("\\[x", "")
    assert "| a | 16 others | 16 |" in text and text.count("| a | licence ") == 9


def push(output: Path, rows: list[dict[str, Any]], **settings: Any) -> CorpusConfig:
    return corpus(output, rows, {"shards": {"bytes": 12_000, "push_to_hub": "user/drawn", **settings}})


def run_against(hub: HubDouble, output: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """The stage in another process, because the libraries read the address of the Hub when they are imported."""
    file = output / "corpus.yaml"
    settings = {"bytes": 12_000, "push_to_hub": "user/drawn"}
    file.write_text(json.dumps({"output": str(output), "sources": {}, "clean": {}, "shards": settings}))
    command = [sys.executable, "-m", "training.corpus", "shards", "--config", str(file), "--workers", "1"]
    return subprocess.run(command, cwd=ROOT, env=hub.environment(home), capture_output=True, text=True, timeout=120)


LOAD = """
import collections, datasets
data = datasets.load_dataset("user/drawn", split="train")
print(len(data), data[0]["image"].size, sum(len(one["pairs"]) for one in data), data.column_names)
"""


def test_pushed_and_loaded_from_the_hub(tmp_path: Path):
    output, home = tmp_path / "corpus", tmp_path / "home"
    corpus(output, bilingual(20, 20), {})
    with HubDouble(tmp_path / "hub") as hub:
        done = run_against(hub, output, home)
        assert done.returncode == 0, done.stderr
        files = hub.files("user/drawn", repo_type="dataset")
        here = {path.name: path.read_bytes() for path in (output / "shards").iterdir() if path.suffix == ".parquet"}
        assert {name: data for name, data in files.items() if name.endswith(".parquet")} == here and len(here) > 3
        assert {*files} - {*here} == {"README.md", "index.json", "manifest.json"}
        assert hub.repo("user/drawn", "dataset").private
        sent = list(hub.lfs_uploads)
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD], env=hub.environment(home), capture_output=True, text=True, timeout=120
        )
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.startswith("40 (16, 16) 40 ['image', 'captions_en', 'captions_zh'")
        assert run_against(hub, output, home).returncode == 0
        assert hub.lfs_uploads == sent  # nothing is sent twice
        other = tmp_path / "other"
        corpus(other, bilingual(5, 5), {})
        assert run_against(hub, other, home).returncode == 0
        now = [name for name in hub.files("user/drawn", repo_type="dataset") if name.endswith(".parquet")]
        assert now == sorted(path.name for path in (other / "shards").glob("*.parquet"))  # the old ones went


def test_a_push_that_is_cut_off_goes_on(tmp_path: Path):
    """Refused at the commit, after everything was sent: only the commit is left to do."""
    output, home = tmp_path / "corpus", tmp_path / "home"
    corpus(output, bilingual(20, 20), {})
    with HubDouble(tmp_path / "hub") as hub:
        hub.fail(r"/commit/", status=403, times=1, message="no space left for {token}")
        done = run_against(hub, output, home)
        assert done.returncode == 1 and "The Hub did not take user/drawn" in done.stderr
        assert "Traceback" not in done.stderr and "hf_dummy" not in done.stderr
        sent = Counter(hub.lfs_uploads)
        assert run_against(hub, output, home).returncode == 0
        assert Counter(hub.lfs_uploads) == sent and max(sent.values()) == 1
        shards_there = [name for name in hub.files("user/drawn", repo_type="dataset") if name.endswith(".parquet")]
        assert len(shards_there) == len([*(output / "shards").glob("*.parquet")])


def test_an_upload_that_ends_in_the_middle(tmp_path: Path):
    output, home = tmp_path / "corpus", tmp_path / "home"
    corpus(output, bilingual(20, 20), {})
    with HubDouble(tmp_path / "hub") as hub:
        hub.fail(r"^/_lfs/", status=400, times=1)  # not 500, which huggingface_hub tries again for 20 seconds
        done = run_against(hub, output, home)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "The Hub did not take user/drawn" in done.stderr
        assert not [name for name in hub.files("user/drawn", repo_type="dataset") if name.endswith(".parquet")]
        assert run_against(hub, output, home).returncode == 0
        assert max(Counter(hub.lfs_uploads).values()) == 1


def test_damaged_shards_are_not_pushed(tmp_path: Path):
    config = push(tmp_path, bilingual(20, 20), push_to_hub=None)
    shards.run(config)
    file = next((tmp_path / "shards").glob("train-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"is not pushed: {file.name} has"):
        shards.run(push(tmp_path, bilingual(20, 20)))


def test_a_name_that_cannot_be(tmp_path: Path):
    with pytest.raises(ValueError, match="shards.push_to_hub is 'a/b/c'"):
        shards.run(push(tmp_path, bilingual(5, 5), push_to_hub="a/b/c"))
