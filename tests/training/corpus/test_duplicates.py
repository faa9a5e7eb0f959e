"""Which rows are dropped for which: by hand, against all pairs, for any number of buckets, at scale of one bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.corpus import perceptual
from training.corpus.duplicates import PAIRS, Pair, Signatures, find_pairs, read_dropped, resolve

RANDOM = np.random.default_rng(1)


def cloud() -> np.ndarray:
    """A thumbnail like no other."""
    values = RANDOM.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((64, 64), Image.Resampling.BICUBIC)
    return perceptual.thumbnails(perceptual.small(image)[None])[0]


def nearly(thumb: np.ndarray, change: int = 4) -> np.ndarray:
    moved = thumb.astype(int) + RANDOM.integers(-change, change + 1, thumb.shape)
    return moved.clip(0, 255).astype(np.uint8)


Told = tuple[np.ndarray, str, str, str, str]  # thumbnail, bytes, language, image id, text


def pairs_of(rows: Sequence[Told], folder: Path, buckets: int = 1, per_part: int = 4) -> list[Pair]:
    """The pairs, with the number of a row as its place's low bits and its part as the high ones."""
    files = []
    for part in range(-(-len(rows) // per_part)):
        signatures, thumbs = Signatures(), []
        for at, (thumb, data, language, image, text) in enumerate(rows[part * per_part :][:per_part]):
            row = {"id": f"r{part * per_part + at}", "source": "s", "image_id": image, "text": text}
            signatures.add(part << 32 | at, {**row, "image_hash": hashlib.sha256(data.encode()).hexdigest()}, language)
            thumbs.append(thumb)
        files.append(folder / f"{buckets}-{part}.arrow")
        signatures.write(files[-1], np.stack(thumbs), buckets)
    return [pair for bucket in range(buckets) for pair in find_pairs(files, bucket)]


def resolved(pairs: list[Pair], folder: Path, **options: int) -> dict[int, Pair]:
    file = folder / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([pair._asdict() for pair in pairs], schema=PAIRS), file)
    tables = list(resolve([file], 1 << 20, **options))
    return {row["place"]: Pair(**row) for table in tables for row in table.to_pylist()}


def dropped(rows: Sequence[Told], folder: Path, buckets: int = 1, per_part: int = 4) -> dict[str, tuple[str, bool]]:
    """id -> (id of the row that is kept, whether their bytes are the same)."""
    found = resolved(pairs_of(rows, folder, buckets, per_part), folder)
    name = {(k // per_part) << 32 | k % per_part: f"r{k}" for k in range(len(rows))}
    return {name[place]: (pair.twin_id, pair.exact) for place, pair in found.items()}


def test_by_hand(tmp_path: Path) -> None:
    dog, cat = cloud(), cloud()
    rows = [
        (dog, "dog", "en", "1", "a dog"),  # 0: kept
        (cat, "cat", "en", "2", "a cat"),  # 1: kept
        (dog, "dog", "en", "3", "some dog"),  # 2: the bytes of 0
        (dog, "dog", "zh", "3", "狗"),  # 3: in another language
        (nearly(dog), "dog again", "en", "4", "dog!"),  # 4: nearly 0
        (nearly(dog), "dog again", "zh", "4", "一只狗"),  # 5: nearly 3
        (cat, "cat", "en", "2", "the same cat"),  # 6: another caption of 1
        (cat, "cat", "en", "2", "a cat"),  # 7: the caption of 1 once more
        (nearly(cat), "cat in other bytes", "en", "2", "cat"),  # 8: the image of 1, says its id
    ]
    assert dropped(rows, tmp_path) == {
        "r2": ("r0", True),
        "r4": ("r0", False),
        "r5": ("r3", False),
        "r7": ("r1", True),
    }


def test_the_caption_of_a_twin_goes_with_its_image(tmp_path: Path) -> None:
    dog = cloud()
    rows = [(dog, "dog", "en", "1", text) for text in "abc"] + [(nearly(dog), "x", "en", "2", text) for text in "de"]
    assert dropped(rows, tmp_path) == {"r3": ("r0", False), "r4": ("r0", False)}


def brute_force(rows: Sequence[Told]) -> dict[str, str]:
    """The rule without keys: a row goes if an earlier one that stays shows the same; the earliest such, bytes first."""
    lost: dict[str, str] = {}
    for at, (thumb, data, language, image, _) in enumerate(rows):
        twins = []
        for before, (other, its_data, its_language, its_image, _) in enumerate(rows[:at]):
            if f"r{before}" in lost or language != its_language or image == its_image:
                continue
            if data == its_data or perceptual.are_twins(thumb, other[None])[0]:
                twins.append((data != its_data, before))
        if twins:
            lost[f"r{at}"] = f"r{min(twins)[1]}"
    return lost


def family(number: int) -> list[Told]:
    """Pictures with copies of each, and copies of copies, in two languages."""
    rows: list[Told] = []
    for k in range(number):
        if rows and RANDOM.random() < 0.5:
            thumb, data, *_ = rows[RANDOM.integers(len(rows))]
            thumb, data = (thumb, data) if RANDOM.random() < 0.5 else (nearly(thumb, 2), f"d{k}")
        else:
            thumb, data = cloud(), f"d{k}"
        rows.append((thumb, data, ("en", "zh")[int(RANDOM.integers(2))], str(k), "t"))
    return rows


def test_against_all_pairs(tmp_path: Path) -> None:
    rows = family(400)
    found = dropped(rows, tmp_path, per_part=37)
    expected = brute_force(rows)
    assert len(expected) > 100
    assert {id: twin for id, (twin, _) in found.items()} == expected


@pytest.mark.parametrize("buckets", [2, 5, 16])
def test_the_number_of_buckets_changes_nothing(tmp_path: Path, buckets: int) -> None:
    rows = family(200)
    # Chains, in which each picture shows the same as the next, but the first not the same as the last.
    for _ in range(20):
        thumb, drift = cloud().astype(float), RANDOM.uniform(-9, 9, perceptual.THUMBNAIL_BYTES)
        rows += [
            ((thumb + k * drift).clip(0, 255).astype(np.uint8), f"c{len(rows)}-{k}", "en", f"c{len(rows)}-{k}", "t")
            for k in range(5)
        ]
    RANDOM.shuffle(order := list(range(len(rows))))
    rows = [rows[k] for k in order]
    one = dropped(rows, tmp_path, 1, per_part=50)
    assert dropped(rows, tmp_path, buckets, per_part=50) == one
    assert all(twin not in one for twin, _ in one.values())  # a row is dropped for one that is kept


def test_resolve_by_hand(tmp_path: Path) -> None:
    def pair(place: int, twin: int, exact: bool = False) -> Pair:
        return Pair(place, twin, exact, f"r{twin}")

    pairs = [pair(2, 1), pair(3, 2), pair(4, 2), pair(4, 3), pair(5, 1), pair(5, 0, True), pair(2, 1), pair(6, 3)]
    # 2 goes for 1. 3 is only like 2, which is gone: it stays. 4 is like 2 and 3: goes for 3, as 6. 5: bytes first.
    expected = {2: pair(2, 1), 4: pair(4, 3), 5: pair(5, 0, True), 6: pair(6, 3)}
    assert resolved(pairs, tmp_path) == expected
    assert resolved([], tmp_path) == {}


def test_resolve_in_steps(tmp_path: Path) -> None:
    """Places of many parts, some pairs at once: as all at once."""
    pairs = []
    for _ in range(3000):
        place = int(RANDOM.integers(1, 400))
        twin = int(RANDOM.integers(place))
        pairs.append(Pair(place << 29, twin << 29, bool(RANDOM.integers(2)), f"r{twin}"))
    pairs = list({(pair.place, pair.twin): pair for pair in pairs}.values())
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([pair._asdict() for pair in pairs], schema=PAIRS), file)
    whole = pa.concat_tables(resolve([file], 50)).to_pylist()
    steps = list(resolve([file], 50, pairs_at_once=100))
    assert len(steps) > 10 and pa.concat_tables(steps).to_pylist() == whole
    lost = {row["place"] for row in whole}
    assert lost.isdisjoint(row["twin"] for row in whole)
    assert all(pair.place in lost or pair.twin in lost for pair in pairs)  # no two rows of a pair are kept


def test_dropped_rows_of_a_part(tmp_path: Path) -> None:
    pairs = [Pair(3 << 32 | 7, 5, True, "a"), Pair(4 << 32, 5, False, "b"), Pair((5 << 32) - 1, 6, False, "c")]
    pq.write_table(pa.Table.from_pylist([pair._asdict() for pair in pairs], schema=PAIRS), tmp_path / "x.parquet")
    assert read_dropped(tmp_path / "x.parquet", 3) == {7: pairs[0]}
    assert read_dropped(tmp_path / "x.parquet", 4) == {0: pairs[1], 2**32 - 1: pairs[2]}
    assert read_dropped(tmp_path / "x.parquet", 5) == {}


def test_equal_pictures_without_end_stay_cheap(tmp_path: Path) -> None:
    """20,000 white images in other bytes, each with 4 keys that all share: compared with one row, not with all."""
    signatures = Signatures()
    for at in range(20_000):
        row = {"id": str(at), "source": "s", "image_id": str(at), "text": "t", "image_hash": f"{at:064x}"}
        signatures.add(at, row, "en")
    white = np.full((20_000, perceptual.THUMBNAIL_BYTES), 255, np.uint8)
    signatures.write(tmp_path / "a.arrow", white, 1)
    compared = []
    before = perceptual.are_twins
    try:
        perceptual.are_twins = lambda one, others: (compared.append(len(others)), before(one, others))[1]
        pairs = list(find_pairs([tmp_path / "a.arrow"], 0))
    finally:
        perceptual.are_twins = before
    assert len(pairs) == 19_999 and {pair.twin for pair in pairs} == {0}
    assert sum(compared) == 19_999
