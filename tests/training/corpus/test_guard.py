"""Evaluation images are found in every form that a guard list may have, and copies of them too."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.corpus import perceptual
from training.corpus.clean import CleanSettings
from training.corpus.guard import SIGNATURES, Guard, GuardTask, guard_files, load_guard
from training.corpus.pictures import measure

RANDOM = np.random.default_rng(2)


def cloud(size: tuple[int, int] = (80, 60)) -> Image.Image:
    values = RANDOM.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def guarded(patterns: list[str], tmp_path: Path) -> tuple[Guard, dict[str, int]]:
    files = guard_files(patterns)
    counts = GuardTask(tmp_path / "guard", (tuple(files),), CleanSettings())(0)
    load_guard.cache_clear()
    return load_guard(tmp_path / "guard", 1, "x"), counts.outcomes()


def finds(guard: Guard, *images: bytes) -> list[bool]:
    import hashlib

    smalls = [measure(image, CleanSettings()).small for image in images]
    hashes = [hashlib.sha256(image).hexdigest() for image in images]
    return guard.finds(hashes, perceptual.thumbnails(np.stack(smalls))).tolist()


@pytest.mark.parametrize("form", ["bytes", "struct", "tar", "folder", "file", "glob", "signatures"])
def test_every_form(form: str, tmp_path: Path) -> None:
    images = [cloud() for _ in range(4)]
    data = [encoded(image) for image in images]
    where = tmp_path / "eval"
    (where / "deep").mkdir(parents=True)
    pattern = str(where)
    if form == "bytes":
        pq.write_table(pa.table({"label": [1] * 4, "pixels": data}), where / "a.parquet")
    elif form == "struct":
        pq.write_table(pa.table({"image": [{"bytes": item, "path": None} for item in data]}), where / "a.parquet")
    elif form == "tar":
        with tarfile.open(where / "a.tar", "w") as file:
            for number, item in enumerate(data):
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(item)
                file.addfile(info, io.BytesIO(item))
    else:
        for number, item in enumerate(data):
            (where / "deep" / f"{number}.PNG").write_bytes(item)
        if form == "file":
            pattern = str(where / "deep" / "0.PNG")
        if form == "glob":
            pattern = str(where / "**" / "*.PNG")
        if form == "signatures":  # what the stage wrote is a guard list itself, without the images
            GuardTask(where / "guard", (tuple(guard_files([pattern])),), CleanSettings())(0)
            pattern = str(where / "guard" / "part-00000.parquet")
            assert pq.read_schema(pattern).names == SIGNATURES.names
    guard, outcomes = guarded([pattern], tmp_path)
    assert outcomes == {"kept": 1 if form == "file" else 4}
    again = encoded(images[0].resize((120, 90)), "JPEG", quality=40)
    assert finds(guard, data[0], again, encoded(cloud())) == [True, True, False]
    assert finds(guard, data[3]) == [form != "file"]


def test_shapes_that_are_not_trained_on_are_guarded_too(tmp_path: Path) -> None:
    wide = cloud((200, 30))
    (tmp_path / "wide.png").write_bytes(encoded(wide))
    (tmp_path / "broken.png").write_bytes(encoded(wide)[:99])
    guard, outcomes = guarded([str(tmp_path / "*.png")], tmp_path)
    assert outcomes == {"kept": 1, "broken_image": 1}
    limits = replace(CleanSettings(), max_aspect_ratio=100.0)
    thumb = perceptual.thumbnails(measure(encoded(wide, "JPEG"), limits).small[None])
    assert guard.finds(["0" * 64], thumb).tolist() == [True]


def test_the_bytes_of_a_broken_image_are_guarded() -> None:
    guard = Guard(["a" * 64], np.empty((0, perceptual.THUMBNAIL_BYTES), np.uint8))
    thumbs = perceptual.thumbnails(np.stack([perceptual.small(cloud()) for _ in range(2)]))
    assert guard.finds(["a" * 64, "b" * 64], thumbs).tolist() == [True, False]


def test_against_all_pairs() -> None:
    """Keys find what comparing with every evaluation image would find."""
    images = [cloud() for _ in range(60)]
    thumbs = perceptual.thumbnails(np.stack([perceptual.small(image) for image in images]))
    asked = np.concatenate([thumbs[:20], (thumbs[20:40].astype(int) + 3).clip(0, 255).astype(np.uint8)])
    others = perceptual.thumbnails(np.stack([perceptual.small(cloud()) for _ in range(20)]))
    asked = np.concatenate([asked, others])
    expected = [bool(perceptual.are_twins(thumb, thumbs).any()) for thumb in asked]
    assert Guard([], thumbs).finds(["x"] * 60, asked).tolist() == expected and sum(expected) == 40


def test_no_guard_list(tmp_path: Path) -> None:
    load_guard.cache_clear()
    assert finds(load_guard(tmp_path, 0, "none"), encoded(cloud())) == [False]


@pytest.mark.parametrize(
    "name, said",
    [
        ("nothing-*", "no parquet, tar or image file"),
        ("text.parquet", "one must be called `image`"),
        ("broken.parquet", "no readable parquet file"),
    ],
)
def test_a_guard_list_that_is_not_there_is_an_error(name: str, said: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=said):
        guard_files([str(tmp_path / name)])
