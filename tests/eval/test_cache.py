"""The cache: found by content, whole shards only, several writers, and nothing that a damaged file could break."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from eval import cache as module
from eval.cache import Cache, item_key
from eval.embed import Encoder
from tests.full_disk import file_size_limit

MODEL = {"name": "org/model", "fingerprint": "0123456789abcdef0123"}


def keys(*texts: str) -> list[bytes]:
    return [item_key(text) for text in texts]


def test_what_is_added_is_found_by_key(tmp_path):
    store = Cache(tmp_path).store(MODEL)
    embeds = torch.randn(3, 4)
    store.add("text", keys("a", "b", "c"), embeds)
    for reader in (store, Cache(tmp_path).store(MODEL)):
        positions, found = reader.find("text", keys("c", "new", "a"))
        assert positions == [0, 2] and found.equal(embeds[[2, 0]])
        assert reader.find("image", keys("a")) == ([], None)
        assert reader.find("text", []) == ([], None)
    assert Cache(tmp_path).store({**MODEL, "fingerprint": "f" * 20}).find("text", keys("a")) == ([], None)


def test_keys_are_of_content():
    assert item_key("狗") == item_key("狗".encode()) != item_key("猫")
    assert len({item_key(text) for text in ("a", "A", "a ", " a", "")}) == 5
    assert len(item_key("\ud800")) == 16  # a lone surrogate, as broken captions hold them


def test_the_folder_says_whose_it_is(tmp_path):
    Cache(tmp_path).store({**MODEL, "dtype": "float32"})
    (folder,) = tmp_path.iterdir()
    assert folder.name == "org--model-0123456789abcdef"
    assert json.loads((folder / "model.json").read_text()) == {**MODEL, "dtype": "float32"}
    Cache(tmp_path).store({"name": "/tmp/../模型 name?", "fingerprint": "1" * 20})
    assert all(item.parent == tmp_path for item in tmp_path.iterdir())


def test_two_stores_see_each_other_s_shards(tmp_path):
    first, second = Cache(tmp_path).store(MODEL), Cache(tmp_path).store(MODEL)
    first.add("image", keys("a"), torch.ones(1, 2))
    second.add("image", keys("b"), 2 * torch.ones(1, 2))
    first.add("image", keys("b"), 2 * torch.ones(1, 2))  # the same shard again: one file
    for store in (first, second):
        assert store.find("image", keys("a", "b"))[0] == [0, 1]
    assert len(list(first.folder.glob("image-*"))) == 2


def test_a_damaged_shard_is_warned_of_and_absent(tmp_path):
    store = Cache(tmp_path).store(MODEL)
    good = store.add("text", keys("a"), torch.ones(1, 2))
    bad = store.add("text", keys("b"), torch.ones(1, 2))
    bad.write_bytes(good.read_bytes()[:-3])
    (store.folder / "text-junk.safetensors").write_bytes(b"\xff" * 40)
    fresh = Cache(tmp_path).store(MODEL)
    with pytest.warns(UserWarning, match="is damaged"):
        assert fresh.find("text", keys("a", "b"))[0] == [0]
    fresh.add("text", keys("b"), torch.ones(1, 2))  # takes the damaged one's place
    assert fresh.find("text", keys("a", "b"))[0] == [0, 1]


def test_a_shard_that_is_being_written_is_never_read(tmp_path, monkeypatch):
    """Whatever is on disk before the rename has another name."""
    store = Cache(tmp_path).store(MODEL)
    monkeypatch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.add("text", keys("a"), torch.ones(1, 2))
    monkeypatch.undo()
    assert len(list(store.folder.iterdir())) == 2  # model.json and the file beside
    assert Cache(tmp_path).store(MODEL).find("text", keys("a")) == ([], None)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Cache(tmp_path / "file").store(MODEL)


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    store = Cache(tmp_path).store(MODEL)
    with file_size_limit(4096), pytest.raises(ValueError, match="cannot be written"):
        store.add("text", keys("a"), torch.ones(1, 4096))
    assert [item.name for item in store.folder.iterdir()] == ["model.json"]


def test_a_killed_process_leaves_its_finished_shards(tmp_path):
    """SIGKILL after 5 of 8 batches: nothing can be tidied up, and yet four are there (two shards of two batches)."""
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        import torch
        from eval import embed
        from eval.cache import Cache

        class Adapter:
            done = 0
            def encode_texts(self, texts):
                self.done += 1
                if self.done == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
                return torch.tensor([[1.0, len(text)] for text in texts])
            def describe(self):
                return {MODEL}

        embed.SHARD = 4
        embed.Encoder(Adapter(), 2, cache=Cache({str(tmp_path)!r})).texts(["x" * i for i in range(16)])
        """
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, timeout=120)
    assert ended.returncode == -9, ended.stderr.decode()

    class Rest:
        seen: list[str] = []

        def encode_texts(self, texts):
            self.seen += texts
            return torch.tensor([[1.0, len(text)] for text in texts])

        def describe(self):
            return MODEL

    embeds = Encoder(Rest(), 2, cache=Cache(tmp_path)).texts(["x" * i for i in range(16)])
    assert Rest.seen == ["x" * i for i in range(8, 16)]
    expected = torch.nn.functional.normalize(torch.tensor([[1.0, i] for i in range(16)]))
    assert embeds.equal(expected)
