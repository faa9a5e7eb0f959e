"""Good pictures for the messy corpus, real or drawn, and which of them are the same.

Nothing here uses the code under test: twins are found by comparing the decoded pixels of all pairs.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

TWINS, LOOK_ALIKES = 2.0, 16.0
"""Levels of 255 by which the means of any of 8 x 8 fields of two pictures differ. Up to the first they are the same
picture (of the 6,022 emoji 51 pairs, 49 of them equal: flags of islands); from the second on they are two. Between them
neither answer is wrong (a cat and a grinning cat differ by 9, a photo and its JPEG of quality 30 by up to 8), and
one of the two is left out of the corpus."""


@dataclass(frozen=True)
class Picture:
    """A good picture with texts of its own."""

    name: str
    data: bytes
    en: tuple[str, ...]
    zh: tuple[str, ...]
    licence: str | None = None


@dataclass(frozen=True)
class Pictures:
    photos: list[Picture]
    drawings: list[Picture]
    objects: list[Picture]
    benchmark: list[Picture]
    """Images of evaluation sets: no training shard may hold them."""
    twins: dict[str, str]
    """name -> one name for all pictures that are the same to the pixel; absent for all others."""


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# ---- Where pictures come from


def real(shared: Path, photos: int, drawings: int, objects: int, benchmark: int, seed: int) -> Pictures:
    """Flickr8k-CN photos, emoji, Tiny-ImageNet objects of `../shared/data`; `benchmark` photos of the val split."""

    def table(name: str) -> list[dict]:
        return pq.read_table(shared / "data" / name).to_pylist()

    def shuffled(rows: list[dict], kind: str) -> list[dict]:
        random.Random(f"{seed} {kind}").shuffle(rows)
        return rows

    photo = [
        Picture(row["image_id"], row["image"]["bytes"], tuple(row["caption_en"]), tuple(row["caption_zh"]))
        for name in ("train", "val")
        for row in shuffled(table(f"flickr8k_cn_{name}.parquet"), name)[: photos if name == "train" else benchmark]
    ]
    drawing = [
        Picture(row["image_id"], row["image"]["bytes"], (row["caption_en"],), (row["caption_zh"],), row["license"])
        for row in shuffled(table("emoji_bilingual.parquet"), "emoji")
        if any("\u4e00" <= character <= "\u9fff" for character in row["caption_zh"])  # "DNA" is in no language
    ]
    thing = [
        Picture(
            row["image_id"],
            row["image"]["bytes"],
            (f"a photo of a {row['caption_en']}",),
            (f"{row['caption_zh']}的照片",),
        )
        for row in shuffled(table("tiny_imagenet_bilingual_train.parquet"), "objects")[:objects]
    ]
    # All emoji are compared, so that those with a twin can come first: a small corpus has real twins, too.
    twins, left_out = compare(photo + drawing + thing)
    drawing.sort(key=lambda picture: picture.name not in twins)
    photo, drawing, thing = ([it for it in items if it.name not in left_out] for items in (photo, drawing, thing))
    benchmark = len(photo) - benchmark
    return Pictures(photo[:benchmark], drawing[:drawings], thing, photo[benchmark:], twins)


def drawn(photos: int, drawings: int, objects: int, benchmark: int, seed: int) -> Pictures:
    """Coloured noise with the spectrum of photos, and texts from a small grammar."""
    generator, choose = np.random.default_rng(seed), random.Random(f"{seed} words")

    def make(kind: str, number: int, side: int, format: str) -> list[Picture]:
        return [
            Picture(f"{kind}{i}", encode(_noise(generator, side, side), format), _english(choose), _chinese(choose))
            for i in range(number)
        ]

    groups = [make("photo", photos, 128, "JPEG"), make("drawing", drawings, 72, "PNG")]
    groups += [make("object", objects, 64, "JPEG"), make("benchmark", benchmark, 128, "JPEG")]
    twins, left_out = compare([picture for group in groups for picture in group])
    return Pictures(*([it for it in group if it.name not in left_out] for group in groups), twins=twins)


def _noise(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequencies[0, 0] = 1
    planes = [
        np.fft.irfft2(np.fft.rfft2(generator.standard_normal((height, width))) / frequencies, (height, width))
        for _ in range(4)
    ]
    channels = [0.75 * planes[0] + 0.25 * plane for plane in planes[1:]]
    pixels = np.stack([128 + 50 * (channel - channel.mean()) / channel.std() for channel in channels], axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


_WORDS = {
    "en": (["A", "One", "The"], ["red", "small", "old", "wet"], ["dog", "boat", "house", "child"], ["snow", "the sea"]),
    "zh": (["一只", "那个"], ["红色的", "很小的", "老旧的"], ["狗", "船", "房子", "孩子"], ["雪地里", "海边"]),
}


def _english(choose: random.Random) -> tuple[str, ...]:
    article, colour, thing, place = _WORDS["en"]
    return tuple(
        f"{choose.choice(article)} {choose.choice(colour)} {choose.choice(thing)} in {choose.choice(place)} , seen from"
        f" {choose.randint(2, 900)} steps away ."
        for _ in range(2)
    )


def _chinese(choose: random.Random) -> tuple[str, ...]:
    article, colour, thing, place = _WORDS["zh"]
    return tuple(
        f"{choose.choice(place)}的{choose.choice(article)}{choose.choice(colour)}{choose.choice(thing)}，"
        f"在{choose.randint(2, 900)}步之外。"
        for _ in range(2)
    )


# ---- Which are the same


def compare(pictures: Sequence[Picture]) -> tuple[dict[str, str], set[str]]:
    """`twins` as in `Pictures`, and the names of pictures to leave out, of all pairs of these."""
    fields = np.stack([_fields(picture.data) for picture in pictures])
    squares = (fields**2).sum(1)
    root = list(range(len(pictures)))
    left_out: set[int] = set()
    for start in range(0, len(pictures), 1024):
        block = fields[start : start + 1024]
        # No pair whose largest difference is at most t has a sum of squares over (number of fields) t^2.
        squared = squares[start : start + 1024, None] + squares[None] - 2 * block @ fields.T
        for row, other in np.argwhere(squared <= fields.shape[1] * LOOK_ALIKES**2 + 1):
            one = start + row
            if one >= other or (difference := np.abs(fields[one] - fields[other]).max()) > LOOK_ALIKES:
                continue
            if difference <= TWINS:
                root[other] = root[one]
            else:
                left_out.add(int(other))
    names = [picture.name for picture in pictures]
    together = {root[i] for i in range(len(root)) if root[i] != i}
    return {names[i]: names[root[i]] for i in range(len(root)) if root[i] in together}, {names[i] for i in left_out}


def _fields(data: bytes) -> np.ndarray:
    """Means of 8 x 8 fields: of luma, and of red and blue less luma."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64), Image.Resampling.BOX)
    rgb = np.asarray(image, dtype=np.float32)
    luma = rgb @ np.float32([0.299, 0.587, 0.114])
    planes = np.stack([luma, rgb[..., 0] - luma, rgb[..., 2] - luma])
    return planes.reshape(3, 8, 8, 8, 8).mean((2, 4)).ravel()
