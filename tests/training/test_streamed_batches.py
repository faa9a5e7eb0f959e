"""Batches of streamed shards: killed and resumed to the same bits, languages in shares, faults counted."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from modeling_m2encoder import M2EncoderImageProcessorPil, M2EncoderProcessor
from tests.training.samples import BROKEN, REASONS, encoded, members, noise, row, tar_bytes, write, write_shards
from training.data import BatchStream, CaptionDataset, StreamedSource, batches, open_source
from training.masking import Masker, MaskingConfig, describe_vocabulary

SIDE = 16
SIZES = [5, 7, 6, 4, 8, 5]
OPTIONS = {"seed": 1, "global_batch_size": 4, "num_steps": 12, "augment": "official", "shuffle_window": 5}


@pytest.fixture(scope="module")
def small(tokenizer: Any) -> M2EncoderProcessor:
    return M2EncoderProcessor(M2EncoderImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)


@pytest.fixture(scope="module")
def masker(tokenizer: Any) -> Masker:
    return Masker(MaskingConfig(), describe_vocabulary(tokenizer), (SIDE // 4) ** 2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StreamedSource]:
    folder = tmp_path_factory.mktemp("shards")
    found = {kind: open_source(write_shards(folder, kind, SIZES), streaming=True) for kind in ("parquet", "tar")}
    # A fault in the middle of each kind, so that what is counted must be resumed as well.
    bad = [("x.png", b"not an image"), ("x.json", members(0)[1][1])]
    content = tar_bytes([*members(12), *bad, ("y.json", b"{"), *members(13)])
    (folder / "shard-002.tar").write_bytes(content.rstrip(b"\0")[:-300])  # the last sample loses its captions
    table = pa.Table.from_pylist([row(12), row(13, image={"bytes": b"not an image", "path": None}), row(14)])
    pq.write_table(table, folder / "shard-002.parquet")
    return found


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        for key, value in first.items()
    )


def saved(stream: BatchStream) -> dict[str, Any]:
    """The state as a checkpoint holds it."""
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# ---- Kill and resume


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["parquet", "tar", "indexable"])
def test_two_kills_change_nothing(
    kind: str, workers: int, sources: dict[str, StreamedSource], small: Any, masker: Masker, tmp_path: Path
) -> None:
    if kind == "indexable":
        rows = [row(i) for i in range(20)] + [row(20, image={"bytes": b"not an image", "path": None})]
        source: Any = CaptionDataset([write(tmp_path / "a.parquet", rows)], cache_dir=tmp_path / "cache")
    else:
        source = sources[kind]
    skipped: Counter[str] = Counter()
    for rank in range(2):
        options = {**OPTIONS, "rank": rank, "world_size": 2, "num_workers": workers, "masker": masker}
        whole = list(batches(source, small, **options))
        assert len(whole) == 12
        resumed, state = [], None
        for count in (3, 4, 5):  # 2 samples a step, windows of 5: always in the middle of one
            stream = batches(source, small, **options)
            if state is not None:
                stream.load_state_dict(state)
            resumed += [next(stream) for _ in range(count)]
            state = saved(stream)
            if workers:  # what they have prepared beyond is lost with them
                stream.close()
            del stream
        assert all(same(a, b) for a, b in zip(whole, resumed, strict=True))
        for batch in whole:
            skipped.update(batch["skipped"])
    expected = {"not_an_image"} | ({"truncated_shard", "bad_json"} if kind == "tar" else set())
    assert expected <= set(skipped)


def test_a_state_does_not_change_with_the_stream_that_gave_it(sources: dict[str, StreamedSource], small: Any) -> None:
    stream = batches(sources["tar"], small, **OPTIONS)
    next(stream)
    state = stream.state_dict()
    before = pickle.dumps(state)
    next(stream)
    assert pickle.dumps(state) == before and pickle.dumps(stream.state_dict()) != before
    rest = list(stream)
    assert next(stream, None) is None and len(rest) == 10
    stream.load_state_dict(state)  # also back, in the same stream
    assert len(list(stream)) == 11


def test_prefetched_batches_are_not_in_the_state(sources: dict[str, StreamedSource], small: Any) -> None:
    stream = batches(sources["parquet"], small, **{**OPTIONS, "num_workers": 2})
    assert stream.state_dict()["lanes"] == [None, None]
    next(stream)
    lanes = stream.state_dict()["lanes"]
    assert lanes[0] is not None and lanes[1] is None and stream.state_dict()["step"] == 1
    assert lanes[0]["number"] == 0 and lanes[0]["taken"].count("1") == 4  # of its first window of 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"world_size": 2}, "world_size 1, here 2"),
        ({"num_workers": 2}, "workers 1, here 2"),
        ({"seed": 2}, "seed 1, here 2"),
        ({"shuffle_window": 6}, "shuffle_window 5, here 6"),
        ({"source": "tar"}, "data '"),
        ({"num_steps": 2}, "step 3, but this stream ends at 2"),
    ],
)
def test_foreign_positions_are_refused(
    sources: dict[str, StreamedSource], small: Any, changes: dict[str, Any], message: str
) -> None:
    stream = batches(sources["parquet"], small, **OPTIONS)
    for _ in range(3):
        next(stream)
    changes = dict(changes)
    other = batches(sources[changes.pop("source", "parquet")], small, **{**OPTIONS, **changes})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(stream.state_dict())
    first = next(other)  # and nothing has changed
    assert same(first, next(batches(other._plan.source, small, **{**OPTIONS, **changes})))
    with pytest.raises(ValueError, match="format None, here 1"):
        other.load_state_dict({})


def test_an_indexable_position_fits_any_number_of_processes(tmp_path: Path, small: Any) -> None:
    source = CaptionDataset([write(tmp_path / "a.parquet", [row(i) for i in range(24)])], cache_dir=tmp_path / "cache")
    options = {"seed": 0, "num_steps": 9}
    whole = list(batches(source, small, global_batch_size=8, **options))
    ranks = [batches(source, small, global_batch_size=8, rank=r, world_size=2, **options) for r in range(2)]
    for _ in range(4):
        for rank in ranks:
            next(rank)
    states = [saved(rank) for rank in ranks]
    assert states[0] == states[1]
    one = batches(source, small, global_batch_size=8, num_workers=1, **options)
    one.load_state_dict(states[0])
    rest = list(one)
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))
    # Another batch size: the samples go on, none twice and none left out.
    smaller = batches(source, small, global_batch_size=4, **options)
    smaller.load_state_dict(states[0])
    rows = torch.cat([next(smaller)["rows"] for _ in range(4)])
    assert torch.equal(rows, torch.cat([batch["rows"] for batch in whole[4:6]]))
    other = CaptionDataset([write(tmp_path / "a.parquet", [row(i) for i in range(25)])], cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="data '.*seed and the files of the run"):
        batches(other, small, global_batch_size=8, **options).load_state_dict(states[0])


# ---- What is in the batches


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_an_epoch_over_ranks_and_workers(tmp_path: Path, small: Any, workers: int) -> None:
    sizes = [6] * 8
    source = open_source(write_shards(tmp_path, "tar", sizes))
    options = {"seed": 0, "global_batch_size": 6, "num_workers": workers, "shuffle_window": 4, "num_steps": 16}
    ranks = [list(batches(source, small, rank=r, world_size=2, **options)) for r in range(2)]
    assert [len(rank) for rank in ranks] == [16, 16]
    for epoch in range(2):
        seen = torch.cat([batch["rows"] for rank in ranks for batch in rank[8 * epoch : 8 * epoch + 8]])
        assert len(seen) == len(seen.unique()) == 48


def test_streamed_samples_equal_those_of_the_same_rows_indexed(sources: dict[str, StreamedSource], small: Any) -> None:
    for batch in batches(sources["parquet"], small, seed=0, global_batch_size=6, num_steps=3):
        for i, number in enumerate(batch["rows"].tolist()):
            shard, place = divmod(number, 2**40)
            index = sum(SIZES[:shard]) + place
            expected = small(images=noise(index), return_tensors="pt").pixel_values[0]
            assert torch.equal(batch["pixel_values"][i], expected)
            ids = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
            texts = row(index)[{"en": "captions_en", "zh": "captions_zh"}[batch["languages"][i]]]
            assert ids in [small.tokenizer(text).input_ids for text in texts]


def test_language_ratio_of_every_batch(sources: dict[str, StreamedSource], small: Any) -> None:
    for weights, english in (({"en": 1, "zh": 1}, 4), ({"en": 3, "zh": 1}, 6), ({"en": 0, "zh": 1}, 0)):
        stream = batches(sources["tar"], small, seed=0, global_batch_size=8, num_steps=4, language_weights=weights)
        assert [batch["languages"].count("en") for batch in stream] == [english] * 4


def test_a_corpus_of_two_languages_is_mixed_exactly(tmp_path: Path, small: Any) -> None:
    """Every sample has one language only, in runs: the window sorts them."""
    content = [m for i in range(64) for m in members(i, **{["captions_en", "captions_zh"][i // 8 % 2]: []})]
    (tmp_path / "a.tar").write_bytes(tar_bytes(content))
    source = open_source([tmp_path / "a.tar"])
    stream = batches(source, small, seed=0, global_batch_size=8, num_steps=16, shuffle_window=64)
    for batch in stream:
        assert batch["languages"].count("en") == 4 and batch["skipped"] == {}
    # 3 to 1 of what is 1 to 1: what is short is counted, and nothing is dropped.
    weights = {"en": 3, "zh": 1}
    uneven = list(batches(source, small, seed=0, global_batch_size=8, num_steps=8, language_weights=weights))
    assert sum(batch["languages"].count("zh") for batch in uneven) == 32
    assert sum(batch["skipped"].get("no_en_caption", 0) for batch in uneven) == 16


def test_faults_are_replaced_and_counted(tmp_path: Path, small: Any) -> None:
    content = []
    for i in range(40):
        content += members(i)
    for name, image in BROKEN.items():
        data = (image or {}).get("bytes") or b""
        content += [(f"{name}.png", data), (f"{name}.json", members(99)[1][1])]
    content += [("only.png", encoded(noise(0))), *members(98, captions_en=[], captions_zh=None)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(content))
    stream = batches(open_source([tmp_path / "a.tar"]), small, seed=0, global_batch_size=10, num_steps=4)
    batches_ = list(stream)
    total = sum((Counter(batch["skipped"]) for batch in batches_), Counter())
    reasons = Counter("no_image" if name in ("missing", "lost_file") else r for name, r in REASONS.items())
    assert len(torch.cat([batch["rows"] for batch in batches_]).unique()) == 40
    assert total["no_image"] == reasons["no_image"] and total["no_caption"] == 2  # left out when read
    decoded = ("broken_image", "not_an_image", "too_many_pixels")
    assert all(0 < total[reason] <= reasons[reason] for reason in decoded) and sum(total[r] for r in decoded) >= 4


def test_data_without_a_usable_image(tmp_path: Path, small: Any) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([("a.png", b"x"), ("a.json", members(0)[1][1])]))
    source = open_source([tmp_path / "a.tar"])
    for workers in (0, 1):
        with pytest.raises(ValueError, match="100 samples in a row.*not_an_image"):
            next(batches(source, small, seed=0, global_batch_size=1, num_steps=1, num_workers=workers))


# ---- Another image size


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["parquet", "indexable"])
def test_the_image_size_changes_between_two_batches(
    kind: str, workers: int, sources: dict[str, StreamedSource], small: Any, masker: Masker, tmp_path: Path
) -> None:
    source: Any = sources["parquet"]
    if kind == "indexable":
        source = CaptionDataset([write(tmp_path / "a.parquet", [row(i) for i in range(20)])], cache_dir=tmp_path / "c")
    options = {**OPTIONS, "augment": "none", "num_workers": workers, "num_steps": 6, "masker": masker}
    plain = list(batches(source, small, **options))
    stream = batches(source, small, **options)

    def sizes() -> Iterator[dict[str, Any]]:
        for step in range(6):
            stream.set_image_size(8 if step < 2 else 24)
            yield next(stream)

    for step, (batch, expected) in enumerate(zip(sizes(), plain, strict=True)):
        side = 8 if step < 2 else 24
        assert batch["pixel_values"].shape == (4, 3, side, side)
        assert batch["patch_mask"].shape == (4, (side // 4) ** 2)
        for name in ("rows", "input_ids", "text_mask", "languages", "skipped"):
            assert same({name: batch[name]}, {name: expected[name]})
        if kind == "parquet" and not batch["skipped"]:
            shard, place = divmod(batch["rows"][0].item(), 2**40)
            image = noise(sum(SIZES[:shard]) + place)
            pixels = small.image_processor(images=image, size={"height": side, "width": side}, return_tensors="pt")
            assert torch.equal(batch["pixel_values"][0], pixels.pixel_values[0])
    stream.set_image_size(24)
    for wrong in (26, 4, 0):
        with pytest.raises(ValueError, match=f"multiple of 4, at least two patches, got {wrong}"):
            stream.set_image_size(wrong)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        batches(source, small, **{**options, "masker": None}).set_image_size(0)


# ---- Sources and arguments


def test_which_source_names_stand_for(tmp_path: Path) -> None:
    parquet = write_shards(tmp_path / "p", "parquet", [3, 2])
    tars = write_shards(tmp_path / "t", "tar", [3, 2])
    cache = {"cache_dir": tmp_path / "cache"}
    assert isinstance(open_source(parquet, **cache), CaptionDataset)
    assert isinstance(open_source([tmp_path / "p"], streaming=False, **cache), CaptionDataset)
    for names in (tars, [tmp_path / "t"], [*parquet, *tars], [str(tmp_path / "p" / "shard-{000..001}.parquet")]):
        assert isinstance(open_source(names), StreamedSource)
        with pytest.raises(ValueError, match="Only local parquet files can be indexed"):
            open_source(names, streaming=False)
    streamed, indexed = open_source(parquet, streaming=True), open_source(parquet, **cache)
    assert isinstance(streamed, StreamedSource) and list(streamed.captions()) == list(indexed.captions())
    assert streamed.languages == indexed.languages == ["en", "zh"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"world_size": 2, "num_workers": 4}, r"6 shards .* 2 ranks x 4 workers = 8: .* at most 3 workers"),
        ({"world_size": 8, "global_batch_size": 8}, r"6 shards cannot be split over 8 ranks"),
        ({"neighbours": 4}, "cannot keep 4 neighbours"),
        ({"start_step": 3}, "load_state_dict"),
        ({"shuffle_window": 0}, "shuffle_window=0"),
        ({"language_weights": {"en": 1}}, "captions are in"),
    ],
)
def test_bad_arguments(sources: dict[str, StreamedSource], small: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(sources["tar"], small, **{**OPTIONS, **changes})


def test_more_workers_than_steps(sources: dict[str, StreamedSource], small: Any) -> None:
    options = {**OPTIONS, "num_workers": 2, "num_steps": 1}
    assert len(list(batches(sources["tar"], small, **options))) == 1
    assert list(batches(sources["tar"], small, **{**options, "num_steps": 0})) == []


def test_a_spawned_worker_would_give_the_same(sources: dict[str, StreamedSource], small: Any) -> None:
    stream = batches(sources["tar"], small, **OPTIONS)
    steps = pickle.loads(pickle.dumps(stream._loader().dataset))
    assert all(same(a, b) for (a, _, _), b in zip(steps, stream, strict=True))
