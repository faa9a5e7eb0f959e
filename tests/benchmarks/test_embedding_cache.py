"""The benchmark of the cache: what it times is the cache, and its quotients are of the right pairs."""

from __future__ import annotations

import os
import sys

import pytest
import yaml

from benchmarks import embedding_cache
from eval.models import TransformersAdapter
from tests.eval.conftest import datasets_cache, write  # noqa: F401  fixtures


def test_a_second_call_in_a_process_embeds_nothing(checkpoint, write, tmp_path, monkeypatch):  # noqa: F811
    photos = write("photos.parquet", ["red", "green"], en=["a", "b"], zh=["红", "绿"])
    task = {
        "name": "mine", "title": "Mine", "kind": "retrieval", "protocol": "mine/p/fp32", "paired": True,
        "data": {"format": "parquet"}, "columns": {"captions": {"zh": "zh", "en": "en"}},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    embedded = []
    original = TransformersAdapter._embed
    monkeypatch.setattr(TransformersAdapter, "_embed", lambda *a: (embedded.append(a), original(*a))[1])
    found = embedding_cache.in_process(str(checkpoint), str(tmp_path / "mine.yaml"), str(photos), tmp_path / "cache")
    assert found.keys() == {"first in process", "again in process"}
    assert len(embedded) == 3, "images, and the texts of two languages: once"


def test_quotients():
    rounds = [
        {"first": {"cpu_seconds": 10.0, "wall_seconds": 20.0}, "same output": {"cpu_seconds": 0.4, "wall_seconds": 1.0},
         "first in process": {"cpu_seconds": 6.0, "wall_seconds": 6.0},
         "again in process": {"cpu_seconds": 0.1, "wall_seconds": 0.2}},
    ]  # fmt: skip
    rows = embedding_cache.summary(rounds)
    assert rows["same output"]["times_faster_cpu"] == 25 and rows["same output"]["times_faster_wall"] == 20
    assert rows["again in process"]["times_faster_cpu"] == 60 and rows["again in process"]["times_faster_wall"] == 30


def test_a_command_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="failed:\nNo checkpoint at x"):
        embedding_cache._timed([sys.executable, "-c", "import sys; sys.exit('No checkpoint at x')"], dict(os.environ))
