"""Shards: nothing lost or doubled, a shuffle that can be computed by hand, sizes, balance, and the same bytes again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests.training.corpus.shard_parts import TEXTS, bilingual, corpus, finish, image_bytes, row
from training.corpus import shards, shuffle
from training.corpus.config import CorpusConfig, ExecutorSettings
from training.corpus.engine import KEPT, Counts, read_report
from training.corpus.manifest import verify

ROOT = Path(__file__).parents[3]


def build(output: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    shards.run(corpus(output, rows, {"shards": settings}))
    return output / "shards"


def images(folder: Path, pattern: str = "*.parquet") -> list[dict[str, Any]]:
    """All rows of all shards, in order."""
    return [one for file in sorted(folder.glob(pattern)) for one in pq.read_table(file).to_pylist()]


def ids(folder: Path, pattern: str = "*.parquet") -> Counter[str]:
    return Counter(pair["id"] for one in images(folder, pattern) for pair in one["pairs"])


def hash_by_hand(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()[:8], "big")


# ---- Rows


def test_every_pair_is_there_once_with_its_image(tmp_path: Path):
    folder = build(tmp_path, bilingual(90, 60), bytes=20_000)
    assert ids(folder) == Counter(f"drawn/0/{n}" for n in range(150))
    for one in images(folder):
        (pair,) = one["pairs"]
        number = int(pair["id"].rpartition("/")[2])
        language = "en" if number < 90 else "zh"
        assert (pair["language"], pair["source"], pair["origin"]) == (language, "drawn", "raw")
        assert one[f"captions_{language}"] == [TEXTS[language].format(number)]
        assert one["captions_zh" if language == "en" else "captions_en"] == []
        assert one["image"] == {"bytes": image_bytes(number), "path": None}
        assert one["image_hash"] == hashlib.sha256(image_bytes(number)).hexdigest()


def test_an_image_is_there_once_with_the_captions_of_all_sources_and_stages(tmp_path: Path):
    rows = [row("a", n, "en", drawn=n // 5) for n in range(100)]  # 5 captions of each of 20 images
    rows += [row("b", n, "zh", drawn=n, text=f"图{n}") for n in range(15)]
    folder = build(tmp_path, rows)
    assert ids(folder) == Counter(one["id"] for one in rows)
    found = {one["image_hash"]: one for one in images(folder)}
    assert len(found) == len(images(folder)) == 20
    shared = found[hashlib.sha256(image_bytes(3)).hexdigest()]
    assert shared["captions_en"] == [TEXTS["en"].format(n) for n in range(15, 20)]
    assert shared["captions_zh"] == ["图3"]
    assert [pair["id"] for pair in shared["pairs"]] == ["a/0/15", "a/0/16", "a/0/17", "a/0/18", "a/0/19", "b/0/3"]
    assert shared["image"]["bytes"] == image_bytes(3)


def test_the_order_is_that_of_hashes_of_the_seed_and_the_image(tmp_path: Path):
    rows = bilingual(60, 60)
    for seed in (0, 7):
        shards.run(corpus(tmp_path / str(seed), rows, {"shards": {"bytes": 20_000}}, seed=seed))
        expected = sorted((one["image_hash"] for one in rows), key=lambda name: hash_by_hand(seed, name))
        assert [one["image_hash"] for one in images(tmp_path / str(seed) / "shards")] == expected


def test_rows_without_an_image_are_counted(tmp_path: Path):
    rows = [*bilingual(20, 20), row("drawn", 77, "zh", image={"bytes": None, "path": "x.png"}, image_hash=None)]
    folder = build(tmp_path, rows)
    assert "drawn/0/77" not in ids(folder)
    assert read_report(folder).counts.as_dict() == {"drawn": {"en": {KEPT: 20}, "zh": {KEPT: 20, "no_image": 1}}}


def test_hashes_are_made_where_they_are_missing(tmp_path: Path):
    folder = build(tmp_path, [row("drawn", n, "en", image_hash=None) for n in range(10)])
    assert all(hashlib.sha256(one["image"]["bytes"]).hexdigest() == one["image_hash"] for one in images(folder))


# ---- Sizes


@pytest.mark.parametrize(
    ("sizes", "limit", "starts"),
    [
        ([5, 5, 5, 5], 10, [0, 2]),
        ([4, 4, 4], 10, [0, 2]),  # two are needed: 8 + 4, not 4 + 8
        ([6, 3, 3, 6], 9, [0, 2]),
        ([3, 3, 3, 3, 3], 8, [0, 2, 4]),
        ([12, 1, 1], 10, [0, 1]),  # larger than a shard may be: alone
        ([1, 12, 1], 10, [0, 1, 2]),
        ([7], 10, [0]),
        ([], 10, []),
    ],
)
def test_cut_by_hand(sizes: list[int], limit: int, starts: list[int]):
    assert shuffle.cut(np.array(sizes, np.int64), limit) == starts


def test_cut_is_no_larger_than_the_best_of_all_cuts():
    """Against every way to cut 8 sizes."""
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(1, 10, 8)
        cuts = [[0, *(i for i in range(1, 8) if mask >> (i - 1) & 1)] for mask in range(2**7)]
        largest = {tuple(c): max(map(sum, np.split(sizes, c[1:]))) for c in cuts}
        fitting = [c for c in largest if largest[c] <= 15]
        fewest = min(map(len, fitting))
        found = tuple(shuffle.cut(sizes, 15))
        assert len(found) == fewest and largest[found] == min(largest[c] for c in fitting if len(c) == fewest)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_have_the_size_asked_for(tmp_path: Path, kind: str):
    rows = [row("drawn", n, "en", drawn=n % 200) for n in range(300)]
    folder = build(tmp_path, rows, format=kind, bytes=40_000)
    index = json.loads((folder / "index.json").read_text())["shards"]
    assert [shard["file"] for shard in index] == sorted(path.name for path in folder.glob(f"train-*.{kind}"))
    assert sum(shard["rows"] for shard in index) == 200 and sum(shard["pairs"]["en"] for shard in index) == 300
    for shard in index:
        data = (folder / shard["file"]).read_bytes()
        assert shard["bytes"] == len(data) and shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert len(data) < 40_000 + 10_240  # a tar file is padded to that, a parquet file has its schema
    # Four shards per bucket, of which one may be smaller.
    assert sum(shard["bytes"] > 25_000 for shard in index) > len(index) * 0.7


def test_buckets_too_large_for_memory_are_scattered_again(tmp_path: Path):
    rows = bilingual(150, 150)
    small = build(tmp_path / "small", rows, bytes=3_000, fan_out=2)
    assert sum(1 for _ in (small / "write" / "index").iterdir()) == 2
    usual = build(tmp_path / "usual", rows, bytes=3_000)
    assert sum(1 for _ in (usual / "write" / "index").iterdir()) > 20
    assert images(small) == images(usual)
    assert not (small / "write" / "scratch" / "00000").exists() and not (small / "scatter" / "buckets").exists()


# ---- Languages and splits


@pytest.mark.parametrize(
    ("english", "chinese", "share", "kept"),
    [
        (120, 80, 0.5, (80, 80)),
        (50, 90, 0.5, (50, 50)),
        (100, 40, 0.2, (100, 25)),
        (90, 30, 0.3, (70, 30)),  # 30 / 0.3 * 0.7, which is 69 in floating point
        (60, 60, 0.5, (60, 60)),
        (10, 21, 0.6, (10, 15)),
    ],
)
def test_balance_is_exact(tmp_path: Path, english: int, chinese: int, share: float, kept: tuple[int, int]):
    rows = bilingual(english, chinese)
    folder = build(tmp_path, rows, zh_share=share, bytes=50_000)
    left = ids(folder)
    expected: set[str] = set()
    for language, number in zip(("en", "zh"), kept, strict=True):
        names = [one["id"] for one in rows if one["language"] == language]
        expected |= {*sorted(names, key=lambda name: hash_by_hand(0, name))[:number]}
    assert left == Counter(expected)
    counts = read_report(folder).counts
    assert (counts.total(KEPT, language="en"), counts.total(KEPT, language="zh")) == kept
    assert counts.total("balance") == english + chinese - sum(kept)


def test_an_image_keeps_its_bytes_when_the_caption_that_brought_them_goes(tmp_path: Path):
    rows = [row("a", n, "en", drawn=n) for n in range(60)] + [row("a", 100 + n, "zh", drawn=n) for n in range(20)]
    folder = build(tmp_path, rows, zh_share=0.5)
    assert sum(ids(folder).values()) == 40
    assert {hashlib.sha256(one["image"]["bytes"]).hexdigest() == one["image_hash"] for one in images(folder)} == {True}


def test_validation_images_have_shards_of_their_own(tmp_path: Path):
    rows = [row("a", n, "en", drawn=n // 2) for n in range(400)]
    folder = build(tmp_path, rows, validation=0.1, bytes=20_000)
    held, trained = images(folder, "validation-*"), images(folder, "train-*")
    assert 8 < len(held) < 35 and len(held) + len(trained) == 200  # binomial: 20, standard deviation 4
    assert not {one["image_hash"] for one in held} & {one["image_hash"] for one in trained}
    assert ids(folder) == Counter(one["id"] for one in rows)
    assert read_report(folder).counts.total("validation") == 2 * len(held)
    totals = json.loads((folder / "index.json").read_text())["totals"]
    assert (totals["train"]["images"], totals["validation"]["images"]) == (len(trained), len(held))


# ---- Again


def digests(folder: Path) -> dict[str, str]:
    names = ("*.parquet", "*.tar", "index.json", "manifest.json")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for name in names for p in folder.glob(name)}


def test_the_same_bytes_from_other_workers_and_again(tmp_path: Path):
    rows, settings = bilingual(100, 80), {"shards": {"bytes": 20_000, "format": "both", "zh_share": 0.5}}
    one = corpus(tmp_path / "one", rows, settings)
    two = corpus(tmp_path / "two", rows, settings, executor=ExecutorSettings(workers=2))
    assert shards.run(one).counts.as_dict() == shards.run(two).counts.as_dict()
    first = digests(tmp_path / "one" / "shards")
    assert len(first) > 20 and first == digests(tmp_path / "two" / "shards")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "shards").glob("train-*")}
    shards.run(one)
    assert {path: path.stat().st_mtime_ns for path in before} == before and digests(
        tmp_path / "one" / "shards"
    ) == first


def test_killed_in_the_middle_and_run_again(tmp_path: Path):
    """SIGKILL to all of its processes at several moments; the shards are those of a run that nobody disturbed."""
    rows, settings = bilingual(300, 300), {"shards": {"bytes": 10_000, "zh_share": 0.4}}
    shards.run(corpus(tmp_path / "whole", rows, settings))
    corpus(tmp_path / "killed", rows, settings)
    file = tmp_path / "corpus.yaml"
    document = {"output": str(tmp_path / "killed"), "clean": {}, "executor": {"workers": 2}, **settings}
    file.write_text(yaml.safe_dump({**document, "sources": {}}))
    command = [sys.executable, "-m", "training.corpus", "shards", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder, quiet = tmp_path / "killed" / "shards", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    endings = []
    for phase, tasks in (("scatter", 2), ("write", 2), ("write", 5)):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **quiet)
        while process.poll() is None and len([*(folder / phase / "counts").glob("*.json")]) < tasks:
            time.sleep(0.002)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        endings.append(process.wait())
    assert -signal.SIGKILL in endings
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120, **quiet)
    assert digests(folder) == digests(tmp_path / "whole" / "shards")
    assert not [*folder.glob(".*train*")]


# ---- What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bytes": 0}, "bytes is 0"),
        ({"zh_share": 1.0}, "zh_share is 1.0"),
        ({"validation": 1.5}, "validation is 1.5"),
        ({"format": "zip"}, "format is 'zip'"),
        ({"fan_out": 1}, "fan_out is 1"),
        ({"zh_share": 0.5}, "but there are {'en': 5, 'zh': 0} pairs"),
        ({"shard_size": 3}, "unknown settings"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, bilingual(5, 0), **settings)


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path):
    build(tmp_path, bilingual(10, 10))
    for changes in ({"bytes": 5}, {"zh_share": 0.4}, {"validation": 0.1}, {"format": "tar"}):
        with pytest.raises(ValueError, match="holds the work of other settings"):
            build(tmp_path, bilingual(10, 10), **changes)
    with pytest.raises(ValueError, match="holds the work of other settings"):
        build(tmp_path, bilingual(10, 11))  # other rows
    build(tmp_path, bilingual(10, 10), title="Another name is no other work")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*bilingual(5, 5), bilingual(1, 0)[0]], "An id occurs twice"),
        ([{**row("a", 1, "en"), "language": "fr"}], "Row 'a/0/1' is in language 'fr'"),
    ],
)
def test_rows_that_cannot_be_stop_the_stage(tmp_path: Path, rows: list[dict[str, Any]], message: str):
    with pytest.raises((ValueError, RuntimeError), match=message):
        build(tmp_path, rows)
    assert not [*tmp_path.rglob("train-*")]


def test_a_corpus_without_a_row_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="dropped every row"):
        build(tmp_path, [])


def test_the_stage_before_must_have_run(tmp_path: Path):
    config = CorpusConfig(tmp_path, 0, ExecutorSettings(workers=1), {"clean": {}, "shards": {}})
    with pytest.raises(ValueError, match="run the stage that writes them first"):
        shards.run(config)


# ---- Damage


def test_verify_names_what_is_damaged(tmp_path: Path):
    folder = build(tmp_path, bilingual(60, 60), bytes=20_000)
    assert verify(folder) == []
    files = sorted(folder.glob("train-*"))
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].unlink()
    (folder / "train-99999-00000.parquet").write_bytes(b"PAR1")
    wrong = verify(folder)
    assert [line.split()[0] for line in wrong] == [*(file.name for file in files[:3]), "train-99999-00000.parquet"]
    for line, what in zip(wrong, ("SHA-256", "the index says", "is missing", "not in the index"), strict=True):
        assert what in line
    command = [sys.executable, "-m", "training.corpus.verify"]
    done = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines() == wrong
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "index.json" in done.stderr


@pytest.mark.parametrize(
    "index", ["[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "shards": [{"file": "x"}]}', "{"]
)
def test_an_index_that_is_none(tmp_path: Path, index: str):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json"):
        verify(tmp_path)


def test_folders_named_like_partitions(tmp_path: Path):
    folder = build(tmp_path / "seed=1" / "语料 b", bilingual(20, 20), zh_share=0.5)
    assert sum(ids(folder).values()) == 40 and verify(folder) == []


# ---- The other stages' rows


def test_rows_come_from_the_streams_that_the_file_has(tmp_path: Path):
    """Scored high, rewritten and translated rows, and a ledger that adds up by hand."""
    rows = bilingual(30, 10)
    high, low = [*rows[:20], *rows[30:]], rows[20:30]
    rewritten = [{**one, "text": "a rewritten text", "raw_text": one["text"], "origin": "rewritten"} for one in low[:7]]
    translated = [
        {**one, "id": one["id"] + "#zh", "text": "翻译过的", "language": "zh", "origin": "translated"}
        for one in high[:5]
    ]
    sections = {"score": {}, "rewrite": {}, "translate": {}, "shards": {}}
    config = corpus(tmp_path, rows, sections)
    finish(tmp_path, "score", "high", high, Counts({"drawn": {"en": {KEPT: 20, "low": 10}, "zh": {KEPT: 10}}}))
    finish(tmp_path, "rewrite", "kept", rewritten, Counts({"drawn": {"en": {KEPT: 7, "still_low": 3}}}))
    finish(tmp_path, "translate", "kept", translated, Counts({"drawn": {"en": {KEPT: 5, "untranslated": 15}}}))
    shards.run(config)
    folder = tmp_path / "shards"
    assert ids(folder) == Counter(one["id"] for one in [*high, *rewritten, *translated])
    both = [one for one in images(folder) if one["captions_zh"] == ["翻译过的"]]
    assert len(both) == 5 and all(len(one["captions_en"]) == 1 for one in both)
    (source,) = json.loads((folder / "manifest.json").read_text())["sources"]
    assert source["rows_in"] == {"en": 30, "zh": 10} and source["translated"] == 5
    assert source["lost"] == {"rewrite": {"still_low": 3}}
    assert source["pairs"]["train"] == {"en": 27, "zh": 15} and source["kept"] == 42


def test_translated_pairs_have_a_line_of_their_own_in_the_card(tmp_path: Path):
    rows = bilingual(30, 0)
    new = [{**one, "id": one["id"] + "#zh", "text": "翻译过的", "language": "zh"} for one in rows[:10]]
    config = corpus(tmp_path, rows, {"translate": {}, "shards": {}})
    finish(tmp_path, "translate", "kept", new, Counts({"drawn": {"en": {KEPT: 10, "untranslated": 20}}}))
    shards.run(config)
    table = (tmp_path / "shards" / "README.md").read_text()
    assert (
        "| drawn | en | 30 | 30 | 75.0 % |\n| drawn (translated) | zh | 0 | 10 | 25.0 % |\n| all | en, zh | 30 | 40 |"
        in table
    )
    assert "| train | 30 | 30 | 10 |" in table  # images, pairs en, pairs zh


def test_totals_that_do_not_add_up_are_an_error(tmp_path: Path):
    config = corpus(tmp_path, bilingual(10, 10), {"shards": {}})
    finish(tmp_path, "sources", "rows", bilingual(12, 10))  # two more than clean knows of
    with pytest.raises(RuntimeError, match="do not add up.*'drawn': 2"):
        shards.run(config)


def test_the_low_stream_is_a_loss_if_nothing_rewrites_it(tmp_path: Path):
    rows = bilingual(10, 10)
    config = corpus(tmp_path, rows, {"score": {}, "shards": {}})
    finish(tmp_path, "score", "high", rows[4:], Counts({"drawn": {"en": {KEPT: 6, "low": 4}, "zh": {KEPT: 10}}}))
    shards.run(config)
    (source,) = json.loads((tmp_path / "shards" / "manifest.json").read_text())["sources"]
    assert source["lost"] == {"score": {"low": 4}}


def test_tar_members(tmp_path: Path):
    folder = build(tmp_path, bilingual(3, 3), format="tar")
    with tarfile.open(folder / "train-00000-00000.tar") as tar:
        names = tar.getnames()
        assert [name.partition(".")[2] for name in names] == ["jpg", "json"] * 6
        hashes = [hashlib.sha256(tar.extractfile(name).read()).hexdigest() for name in names[::2]]
        assert hashes == [name.partition(".")[0] for name in names[::2]]
        fields = json.load(io.TextIOWrapper(tar.extractfile(names[1]), "utf-8"))
    assert fields["image_hash"] == hashes[0] and len(fields["captions_en"] + fields["captions_zh"]) == 1
