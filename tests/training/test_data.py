"""Batches as a pure function of (seed, step), whatever the processes and workers; every unusable row counted."""

from __future__ import annotations

import pickle
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch

from modeling_m2encoder import M2EncoderImageProcessorPil, M2EncoderProcessor
from tests.training.samples import BROKEN, REASONS, encoded, noise, row, write
from training.data import CaptionDataset, batches, read_captions, resolve_files

ROWS, SIDE = 22, 16


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row(i) for i in range(ROWS)]


@pytest.fixture(scope="module")
def dataset(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    folder = tmp_path_factory.mktemp("data")
    files = [write(folder / "train-0.parquet", rows[:10]), write(folder / "train-1.parquet", rows[10:])]
    return CaptionDataset(files, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def small(tokenizer: Any) -> M2EncoderProcessor:
    return M2EncoderProcessor(M2EncoderImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)


def load(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> CaptionDataset:
    return CaptionDataset([write(tmp_path / "data.parquet", rows)], cache_dir=tmp_path / "cache", **options)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        for key, value in first.items()
    )


def tokens(batch: dict[str, Any]) -> list[list[int]]:
    return [i[m.bool()].tolist() for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


# ---- Batches


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batch_of_one_process(dataset: CaptionDataset, small: Any, world_size: int) -> None:
    options = {"seed": 3, "global_batch_size": 8, "num_steps": 6, "augment": "crop", "flip": True}
    whole = list(batches(dataset, small, **options))
    parts = [list(batches(dataset, small, rank=r, world_size=world_size, **options)) for r in range(world_size)]
    for step, batch in enumerate(whole):
        ranks = [part[step] for part in parts]
        for key in ("pixel_values", "rows"):
            assert torch.equal(torch.cat([rank[key] for rank in ranks]), batch[key])
        assert sum((rank["languages"] for rank in ranks), []) == batch["languages"]
        # The ranks pad to their own longest text; the tokens are the same.
        assert sum((tokens(rank) for rank in ranks), []) == tokens(batch)


def test_a_batch_holds_what_its_rows_say(dataset: CaptionDataset, small: Any, rows: list[dict[str, Any]]) -> None:
    for batch in batches(dataset, small, seed=0, global_batch_size=6, num_steps=5):
        assert batch["pixel_values"].shape == (6, 3, SIDE, SIDE) and batch["pixel_values"].dtype == torch.float32
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1]  # no more padding than needed
        assert batch["skipped"] == {}
        for i, index in enumerate(batch["rows"].tolist()):
            expected = small(images=noise(index), return_tensors="pt").pixel_values[0]
            assert torch.equal(batch["pixel_values"][i], expected)  # the very pixels that inference sees
            column = {"en": "captions_en", "zh": "captions_zh"}[batch["languages"][i]]
            ids = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
            assert ids in [small.tokenizer(text).input_ids for text in rows[index][column]]


def test_every_epoch_covers_every_row_once(dataset: CaptionDataset, small: Any) -> None:
    # 8 x 11 = 88 = 4 epochs of 22 rows: batches straddle the epochs' ends.
    seen = torch.cat([b["rows"] for b in batches(dataset, small, seed=1, global_batch_size=8, num_steps=11)]).tolist()
    epochs = [seen[i : i + ROWS] for i in range(0, 88, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # each in another order
    other = torch.cat([b["rows"] for b in batches(dataset, small, seed=2, global_batch_size=8, num_steps=11)]).tolist()
    assert other != seen


def test_resuming_is_starting_at_a_later_step(dataset: CaptionDataset, small: Any) -> None:
    options = {"seed": 0, "global_batch_size": 8, "augment": "crop"}
    whole = list(batches(dataset, small, num_steps=7, **options))
    rest = list(batches(dataset, small, start_step=4, num_steps=3, **options))
    assert len(rest) == 3 and all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert list(batches(dataset, small, num_steps=0, **options)) == []


def test_workers_change_nothing(dataset: CaptionDataset, small: Any) -> None:
    options = {"seed": 0, "global_batch_size": 8, "num_steps": 5, "augment": "crop"}
    here = list(batches(dataset, small, **options))
    there = list(batches(dataset, small, num_workers=2, **options))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    # What a spawned worker would receive gives the same as well.
    steps = pickle.loads(pickle.dumps(batches(dataset, small, **options)._loader().dataset))
    assert same(list(steps)[2][0], here[2])


def test_every_caption_gets_its_turn(dataset: CaptionDataset, small: Any) -> None:
    texts: Counter[tuple[int, str, int]] = Counter()
    for batch in batches(dataset, small, seed=0, global_batch_size=22, num_steps=60):
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        texts.update(zip(batch["rows"].tolist(), batch["languages"], lengths, strict=True))
    of_row_5 = [(language, length) for row, language, length in texts if row == 5]
    assert sum(language == "en" for language, _ in of_row_5) == 2 and len(of_row_5) >= 4


# ---- Languages


def test_language_ratio_of_every_batch(dataset: CaptionDataset, small: Any) -> None:
    for weights, english in (({"en": 1, "zh": 1}, 4), ({"en": 3, "zh": 1}, 6), ({"en": 0, "zh": 1}, 0), (None, 4)):
        for batch in batches(dataset, small, seed=0, global_batch_size=8, num_steps=6, language_weights=weights):
            assert batch["languages"].count("en") == english


def test_a_missing_language_falls_back_and_is_counted(tmp_path: Path, small: Any) -> None:
    empty = [None, [], [None], ["", " \n"]]
    dataset = load(tmp_path, [row(i, captions_zh=empty[i]) if i < 4 else row(i) for i in range(8)])
    total: Counter[str] = Counter()
    for batch in batches(dataset, small, seed=0, global_batch_size=8, num_steps=10):
        total.update(batch["skipped"])
        assert sorted(batch["rows"].tolist()) == list(range(8))  # nothing is dropped
        assert all(lang == "en" for i, lang in zip(batch["rows"], batch["languages"], strict=True) if i < 4)
        assert batch["skipped"].get("no_zh_caption", 0) == batch["languages"].count("en") - 4
    assert total["no_zh_caption"] > 5 and set(total) == {"no_zh_caption"}


# ---- Unusable rows


@pytest.mark.filterwarnings("error")
def test_unusable_images_are_replaced_and_counted(tmp_path: Path, small: Any, caplog: pytest.LogCaptureFixture) -> None:
    bad = [row(100 + i, image=image) for i, image in enumerate(BROKEN.values())]
    bad.append(row(200, captions_en=[], captions_zh=None))
    good = [row(i) for i in range(40)]
    dataset = load(tmp_path, good + bad)  # rows 40..49 are bad
    options = {"seed": 0, "global_batch_size": 10, "num_steps": 5}  # one epoch: every row's own place comes once
    whole = list(batches(dataset, small, **options))
    total: Counter[str] = Counter()
    for batch in whole:
        total.update(batch["skipped"])
        assert batch["pixel_values"].shape[0] == 10 and batch["rows"].max() < 40
        assert len(set(batch["rows"].tolist())) == 10  # a replacement is not in its batch already
        assert batch["languages"].count("en") == 5  # the place's language stays
    assert set(total) == {"broken_image", "not_an_image", "no_image", "too_many_pixels", "no_caption"}
    assert all(total[reason] >= count for reason, count in Counter(REASONS.values()).items())
    assert sorted(set(range(40)) - set(torch.cat([b["rows"] for b in whole]).tolist())) == []
    told = [record.message for record in caplog.records if "is skipped" in record.message]
    assert len(told) == 5  # once per reason, with the row
    # Several ranks replace the same rows and count the same.
    parts = [list(batches(dataset, small, rank=r, world_size=5, **options)) for r in range(5)]
    assert torch.equal(torch.cat([p[0]["rows"] for p in parts]), whole[0]["rows"])
    assert sum((Counter(b["skipped"]) for p in parts for b in p), Counter()) == total


def test_data_without_a_usable_row(tmp_path: Path, small: Any) -> None:
    dataset = load(tmp_path, [row(i, image={"bytes": b"x", "path": None}) for i in range(4)])
    with pytest.raises(ValueError, match="100 rows in a row.*not_an_image"):
        next(batches(dataset, small, seed=0, global_batch_size=2, num_steps=1))
    with pytest.raises(ValueError, match="100 rows in a row"):  # the type survives the worker process
        next(batches(dataset, small, seed=0, global_batch_size=2, num_steps=1, num_workers=1))


# ---- Pixels


def test_augmentation(dataset: CaptionDataset, small: Any) -> None:
    options = {"seed": 0, "global_batch_size": 8, "num_steps": 2}
    plain, cropped, flipped = (
        next(batches(dataset, small, **options, **extra)) for extra in ({}, {"augment": "crop"}, {"flip": True})
    )
    # The same rows, languages and captions: only the pixels change.
    for other in (cropped, flipped):
        assert torch.equal(plain["input_ids"], other["input_ids"]) and torch.equal(plain["rows"], other["rows"])
    assert not any(torch.equal(a, b) for a, b in zip(plain["pixel_values"], cropped["pixel_values"], strict=True))
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain["pixel_values"], flipped["pixel_values"], strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(plain["pixel_values"], flipped["pixel_values"], strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True)) and any(mirrored) and any(kept)


# ---- Files and columns


def test_captions_as_strings_and_as_lists(tmp_path: Path, small: Any) -> None:
    strings = [{"photo": encoded(noise(i)), "en": f"star {i}", "zh": f"星 {i}"} for i in range(8)]
    lists = [{**item, "en": [item["en"]], "zh": [item["zh"]]} for item in strings]
    options = {"seed": 0, "global_batch_size": 8, "num_steps": 3}
    got = []
    for name, rows in (("strings", strings), ("lists", lists)):
        dataset = CaptionDataset(
            [write(tmp_path / f"{name}.parquet", rows)], "photo", {"en": "en", "zh": "zh"}, cache_dir=tmp_path / "cache"
        )
        assert sorted(dataset.captions()) == sorted(text for item in strings for text in (item["en"], item["zh"]))
        got.append(list(batches(dataset, small, **options)))
    assert all(same(a, b) for a, b in zip(*got, strict=True))


def test_images_written_by_datasets_and_as_files(tmp_path: Path, small: Any) -> None:
    noise(1).save(tmp_path / "one.png")
    columns = {"image": [noise(0), str(tmp_path / "one.png")], "captions_en": ["a", "b"], "other": [1, 2]}
    features = datasets.Features(
        {"image": datasets.Image(), "captions_en": datasets.Value("string"), "other": datasets.Value("int32")}
    )
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "a.parquet")
    bare = [{"image": {"bytes": None, "path": str(tmp_path / "one.png")}, "captions_en": "b"}] * 2
    write(tmp_path / "b.parquet", bare)
    for name, expected in (("a", [0, 1]), ("b", [1, 1])):
        dataset = CaptionDataset(
            [tmp_path / f"{name}.parquet"], captions={"en": "captions_en"}, cache_dir=tmp_path / "cache"
        )
        batch = next(batches(dataset, small, seed=0, global_batch_size=2, num_steps=1))
        for index, pixels in zip(batch["rows"].tolist(), batch["pixel_values"], strict=True):
            assert torch.equal(pixels, small(images=noise(expected[index]), return_tensors="pt").pixel_values[0])
        assert batch["languages"] == ["en", "en"]


def test_wrong_columns(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = write(tmp_path / "data.parquet", [{**item, "number": 1} for item in rows[:2]])
    names = "image, captions_en, captions_zh, number"
    with pytest.raises(ValueError, match=f"no column 'caption'; it has {names}"):
        CaptionDataset([path], captions={"en": "caption"})
    with pytest.raises(ValueError, match=f"no column 'picture'; it has {names}"):
        CaptionDataset([path], image_column="picture")
    with pytest.raises(ValueError, match="'number'.*string or list of strings.*int64"):
        CaptionDataset([path], captions={"en": "number"})
    with pytest.raises(ValueError, match="'captions_en'.*should be image bytes"):
        CaptionDataset([path], image_column="captions_en", captions={"zh": "captions_zh"})
    with pytest.raises(ValueError, match="No caption column"):
        CaptionDataset([path], captions={})
    other = write(tmp_path / "other.parquet", [{**item, "captions_en": "one"} for item in rows[:2]])
    with pytest.raises(ValueError, match="'captions_en' is string in .*other.parquet, but list"):
        CaptionDataset([path, other])
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="text.parquet cannot be read as parquet"):
        CaptionDataset([tmp_path / "text.parquet"])
    write(tmp_path / "none.parquet", rows[:2])
    pq.write_table(pq.read_table(tmp_path / "none.parquet").slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="No row in .*none.parquet"):
        CaptionDataset([tmp_path / "none.parquet"], cache_dir=tmp_path / "cache")


def test_files_globs_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "set [1]"  # brackets are special in globs
    (folder / "tasks").mkdir(parents=True)
    for name in ("train-1", "train-0", "test-0", "tasks/counting"):
        write(folder / f"{name}.parquet", [row(0)])
    train = [folder / "train-0.parquet", folder / "train-1.parquet"]
    assert resolve_files([folder]) == train  # never the test split
    assert resolve_files([train[1], folder, str(train[0])]) == [train[1], train[0]]  # once each, in order
    (folder / "train-0.parquet").rename(tmp_path / "b.parquet")
    (folder / "train-1.parquet").rename(tmp_path / "a.parquet")
    assert resolve_files([str(tmp_path / "*.parquet")]) == [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    assert resolve_files([tmp_path]) == [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    assert len(CaptionDataset([folder], cache_dir=tmp_path / "cache")) == 1
    for wrong in ([], [tmp_path / "c.parquet"], [str(tmp_path / "x*.parquet")], [folder / "tasks" / "nothing"]):
        with pytest.raises(ValueError, match="No parquet file matches|No data"):
            resolve_files(wrong)


def test_read_captions_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"en": ["a", None, " ", "b"], "zh": "一"}, {"en": None, "zh": ""}])
    assert list(read_captions([tmp_path], ["zh", "en"])) == ["一", "a", "b"]
    with pytest.raises(ValueError, match="no column 'fr'"):
        read_captions([tmp_path], ["fr"])


def test_nothing_touches_the_network(
    tmp_path: Path, rows: list[dict[str, Any]], small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    next(batches(load(tmp_path, rows[:4]), small, seed=0, global_batch_size=4, num_steps=1))


def test_no_progress_bars(tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    datasets.enable_progress_bars()
    load(tmp_path, rows[:4])
    assert capsys.readouterr() == ("", "") and not datasets.are_progress_bars_disabled()


# ---- Arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_batch_size": 7, "world_size": 2}, "multiple of world_size"),
        ({"global_batch_size": 0}, "positive multiple"),
        ({"rank": 2, "world_size": 2}, "0 <= rank"),
        ({"global_batch_size": ROWS + 1}, "some of the 22 rows twice"),
        ({"seed": -1}, "0 or more"),
        ({"start_step": -1}, "0 or more"),
        ({"num_workers": -1}, "0 or more"),
        ({"language_weights": {"en": 1}}, "captions are in"),
        ({"language_weights": {"en": 1, "zh": 1, "fr": 1}}, "names \\['en', 'fr', 'zh'\\]"),
        ({"augment": "blur"}, "augment"),
    ],
)
def test_bad_arguments(dataset: CaptionDataset, small: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(dataset, small, **{"seed": 0, "global_batch_size": 8, "num_steps": 1, **changes})
