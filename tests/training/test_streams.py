"""Streams of shards: every sample of an epoch once over all consumers, positions that can be saved, names of shards."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.samples import members, row, tar_bytes, write_shards
from training import streams
from training.order import EpochOrder
from training.shard_files import expand_ranges, is_local_parquet, kind_of, resolve_shards
from training.streams import PLACES, SampleStream, StreamedSource

SIZES = [5, 0, 7, 1, 4, 6, 2]  # one is empty


@pytest.fixture(scope="module", params=["parquet", "tar"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StreamedSource:
    return StreamedSource(write_shards(tmp_path_factory.mktemp("shards"), request.param, SIZES))


def stream_of(source: StreamedSource, consumer: int = 0, consumers: int = 1, window: int = 8, **options: Any):
    options = {"languages": source.languages, "seed": 3, **options}
    return SampleStream(source, consumer=consumer, consumers=consumers, window=window, **options)


def take(stream: SampleStream, count: int, languages: str = "en zh") -> list[int]:
    """The numbers n of the `row(n)` that come next, read from the captions."""
    names = languages.split()
    rows = [stream.take(names[i % len(names)])[1] for i in range(count)]
    return [int((r.captions["en"] or r.captions["zh"])[0].split()[-1]) for r in rows]


# ---- Split


@pytest.mark.parametrize("consumers", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_every_sample_of_an_epoch_once_over_all_consumers(source: StreamedSource, consumers: int, window: int) -> None:
    epochs, order = 3, EpochOrder(len(SIZES), seed=3)
    taken: list[Counter[int]] = [Counter() for _ in range(epochs)]
    for consumer in range(consumers):
        stream = stream_of(source, consumer, consumers, window)
        positions = range(consumer, epochs * len(SIZES), consumers)
        for epoch in range(epochs):
            share = sum(SIZES[order[p]] for p in positions if p // len(SIZES) == epoch)
            taken[epoch].update(take(stream, share))
    assert taken == [Counter(range(sum(SIZES)))] * epochs


def test_consumers_of_an_epoch_share_no_shard_and_epochs_differ(source: StreamedSource) -> None:
    firsts = [stream_of(source, consumer, 3, 1).take("en")[0] // PLACES for consumer in range(3)]
    assert len(set(firsts)) == 3
    whole = stream_of(source)
    assert len({tuple(take(whole, sum(SIZES))) for _ in range(4)}) == 4


def test_the_window_shuffles(source: StreamedSource) -> None:
    in_order = take(stream_of(source, window=1), sum(SIZES))
    for window in (4, 8, 25):
        shuffled = take(stream_of(source, window=window), sum(SIZES))
        for start in range(0, sum(SIZES), window):
            assert sorted(shuffled[start : start + window]) == sorted(in_order[start : start + window])
        assert shuffled != in_order
    assert take(stream_of(source, seed=4), 25) != take(stream_of(source), 25)


# ---- Position


@pytest.mark.parametrize("window", [1, 4, 8, 100])
def test_going_on_from_any_sample(source: StreamedSource, window: int) -> None:
    options = {"consumer": 1, "consumers": 2, "window": window}
    whole = take(stream_of(source, **options), 70)
    for stop in range(0, 50, 7):
        first = stream_of(source, **options)
        take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))  # plain, and not tied to the stream
        again = stream_of(source, **options)
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert take(again, 7) == whole[stop : stop + 7]  # and a second time from there
        third = stream_of(source, **options)
        third.load_state_dict(again.state_dict())
        assert take(third, 10) == whole[stop + 7 : stop + 17]


def test_data_that_changed_are_noticed(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, "tar", [6])
    stream = stream_of(StreamedSource(paths))
    take(stream, 2)
    write_shards(tmp_path, "tar", [5])
    again = stream_of(StreamedSource(paths))
    with pytest.raises(ValueError, match="5 samples were read where 6 had been"):
        again.load_state_dict(stream.state_dict())


def test_what_is_skipped_counts_once_however_often_it_is_resumed(tmp_path: Path) -> None:
    content = []
    for i in range(12):
        content += members(i)
        content += [[(f"x{i}.png", b"")], [(f"x{i}.json", b"[]")], members(i)[:1]][i % 3]
    (tmp_path / "a.tar").write_bytes(tar_bytes(content))
    source = StreamedSource([tmp_path / "a.tar"])
    whole = stream_of(source, window=5)
    take(whole, 24)
    assert whole.skipped == {"no_image": 8, "bad_json": 8, "duplicate_member": 8} | whole.skipped
    total: Counter[str] = Counter()
    state = None
    for _ in range(24):
        stream = stream_of(source, window=5)
        if state:
            stream.load_state_dict(state)
        take(stream, 1)
        total += stream.skipped
        state = stream.state_dict()
    assert total == whole.skipped


# ---- Languages


def test_places_get_their_language_as_long_as_the_window_has_it(tmp_path: Path) -> None:
    content = []
    for i in range(30):  # 10 English only, 10 Chinese only, 10 both
        without = [{"captions_zh": []}, {"captions_en": [], "captions_zh": [f"星 {i}"]}, {}][i % 3]
        content += members(i, **without)
    (tmp_path / "a.tar").write_bytes(tar_bytes(content))
    stream = stream_of(StreamedSource([tmp_path / "a.tar"]), window=30)
    rows = [stream.take(["en", "zh"][i % 2])[1] for i in range(30)]
    served = [bool(r.captions[["en", "zh"][i % 2]]) for i, r in enumerate(rows)]
    assert all(served[:20]) and sum(served) >= 26
    only_chinese = stream_of(StreamedSource([tmp_path / "a.tar"]), languages=["zh"], window=30)
    assert len({only_chinese.take("zh")[0] for _ in range(20)}) == 20
    assert only_chinese.skipped == {"no_caption": 10}


# ---- Data without samples


def test_data_without_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, empty = write_shards(tmp_path, "tar", [1, 0])
    with pytest.raises(ValueError, match="a.tar.*'captions_en', 'captions_zh'.*no_image"):
        (tmp_path / "a.tar").write_bytes(tar_bytes(members(0)[1:]))
        StreamedSource([tmp_path / "a.tar"])
    with pytest.raises(ValueError, match="they are empty"):
        StreamedSource([empty])
    with pytest.raises(ValueError, match="no column 'caption'; it has image"):
        StreamedSource(write_shards(tmp_path, "parquet", [2]), captions={"en": "caption"})
    with pytest.raises(ValueError, match="unreadable_shard.*FileNotFoundError"):
        StreamedSource(["memory://nowhere/a.tar"])
    with pytest.raises(ValueError, match="No caption column"):
        StreamedSource([good], captions={})
    stream = stream_of(StreamedSource([good]), window=2)
    good.write_bytes(b"nothing any more")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="100 shards in a row.*truncated_shard"):
        stream.take("en")
    assert sum("truncated_shard" in r.message for r in caplog.records) == 1  # told once


def test_a_shard_lost_on_the_way_does_not_stop_the_others(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, "tar", [4, 4, 4])
    stream = stream_of(StreamedSource(paths), window=1)
    first = take(stream, 2)[0] // 4
    paths[(first + 1) % 3].unlink()
    rest = Counter(n // 4 for n in take(stream, 40))
    assert stream.skipped["unreadable_shard"] >= 4 and rest[(first + 1) % 3] <= 8
    assert streams.MAX_BARREN_SHARDS == 100


# ---- Names


def test_names_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set [1]"
    folder.mkdir()
    for name in ("b.tar", "a.tar", "train-1.parquet", "train-0.tar", "readme.md"):
        (folder / name).write_bytes(b"")
    train = [str(folder / "train-0.tar"), str(folder / "train-1.parquet")]
    assert resolve_shards([folder]) == train
    assert resolve_shards([folder / "b.tar", folder, train[0]]) == [str(folder / "b.tar"), *train]
    monkeypatch.chdir(folder)
    assert resolve_shards(["*.tar"]) == ["a.tar", "b.tar", "train-0.tar"]
    assert resolve_shards(["train-{0..0}.tar"]) == ["train-0.tar"]
    for wrong in ([], ["c.tar"], ["x*.tar"]):
        with pytest.raises(ValueError, match="No parquet or tar shard matches|No data"):
            resolve_shards(wrong)
    for wrong in ("readme.md", "https://host/a.tar.gz"):
        with pytest.raises(ValueError, match="must be a .parquet or an .uncompressed. .tar|cannot be listed"):
            resolve_shards([wrong])


def test_ranges_of_numbers() -> None:
    assert expand_ranges("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_ranges("s3://b/{0..1}/{1..2}.tar") == [f"s3://b/{i}/{j}.tar" for i in (0, 1) for j in (1, 2)]
    assert expand_ranges("plain{x}.tar") == ["plain{x}.tar"]
    assert kind_of("https://host/a.tar?token=x.y") == "tar" and kind_of("a.b.parquet") == "parquet"


def test_remote_names_are_listed_with_their_protocol(tmp_path: Path) -> None:
    for path in write_shards(tmp_path, "tar", [2, 3]):
        with fsspec.open(f"memory://names/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    urls = ["memory://names/shard-000.tar", "memory://names/shard-001.tar"]
    for name in ("memory://names/*.tar", "memory://names", "memory://names/shard-{000..001}.tar"):
        found = resolve_shards([name])
        assert [url.replace(":///", "://") for url in found] == urls
        assert sorted(take(stream_of(StreamedSource([name])), 5)) == list(range(5))
    with pytest.raises(ValueError, match="No parquet or tar shard matches 'memory://names/x"):
        resolve_shards(["memory://names/x*.tar"])
    with pytest.raises(ValueError, match="cannot be listed"):
        resolve_shards(["memory://nowhere"])
    with pytest.raises(ValueError, match="cannot be listed.*nosuch|needs another package"):
        resolve_shards(["nosuch://bucket/*.tar"])


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is a folder here; what picks the train split's files is the real builder of `datasets`."""
    folder = tmp_path / "owner" / "pairs" / "data"
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row(0), row(1)]), folder / f"{name}.parquet")
    real, asked = datasets.load_dataset_builder, []

    def local(name: str, revision: str | None) -> Any:
        asked.append((name, revision))
        return real(str(tmp_path / name))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    monkeypatch.chdir(tmp_path / "owner")  # so that the id is not a folder from here
    for name in ("owner/pairs", "hf://datasets/owner/pairs@main", "hf://datasets/owner/pairs"):
        source = StreamedSource([name])
        assert [Path(shard).name for shard in source.shards] == [f"train-0000{i}-of-00002.parquet" for i in (0, 1)]
        assert sorted(take(stream_of(source), 4)) == [0, 0, 1, 1]
    assert asked == [("owner/pairs", None), ("owner/pairs", "main"), ("owner/pairs", None)]
    with pytest.raises(ValueError, match="'owner/nothing' is no local file, and no Hub data set"):
        StreamedSource(["owner/nothing"])


@pytest.mark.parametrize(
    "name, local",
    [
        ("a.parquet", True),
        ("data/train-*.parquet", True),
        ("data/a.tar", False),
        ("owner/name", False),
        ("../data", True),
        ("data/lost.parquet", True),
        ("hf://datasets/o/n/a.parquet", False),
        ("a-{0..9}.parquet", False),
    ],
)
def test_what_is_local_parquet(name: str, local: bool) -> None:
    assert is_local_parquet(name) is local


def test_fingerprints(tmp_path: Path) -> None:
    def fingerprint(folder: str, sizes: list[int], **options: Any) -> str:
        return StreamedSource(write_shards(tmp_path / folder, "tar", sizes), **options).fingerprint

    first = fingerprint("a", [2, 3])
    assert fingerprint("b/c", [2, 3]) == first  # moved
    assert fingerprint("a", [2, 3, 4]) != first
    assert fingerprint("a", [2, 3], captions={"en": "captions_en"}) != first
    turned = StreamedSource([tmp_path / "a" / "shard-001.tar", tmp_path / "a" / "shard-000.tar"])
    assert turned.fingerprint != first


def test_captions_for_a_tokenizer(source: StreamedSource) -> None:
    captions = list(islice(source.captions(), 5))
    assert captions == [*row(0)["captions_en"], *row(0)["captions_zh"]]
    assert len(list(source.captions())) == 5 * sum(SIZES)
