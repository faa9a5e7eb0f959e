"""How many copies of an image the corpus pipeline finds, how many look-alikes it takes for copies, and the same for
languages of captions.

    python -m benchmarks.corpus_twins --data ../shared/data [--output benchmarks/corpus_twins.json]

Copies: each of some hundred images is encoded and resized again in many ways; "found" shares a key with its copy and
shows the same by its thumbnail (`training/corpus/perceptual.py`). Look-alikes: all pairs of all images of a set that
are found to show the same; "equal" differ by at most one level in any pixel, the others are listed. Languages: captions
and names whose own label is not among the languages that `training/corpus/language.py` allows.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from eval.files import write_json
from training.corpus import perceptual
from training.corpus.language import languages_of

SETS = {
    "drawings of 72 pixels": ("emoji_bilingual.parquet", 500),
    "photos of 128 pixels": ("flickr8k_cn_val.parquet", 250),
    "photos of 64 pixels": ("tiny_imagenet_bilingual_train.parquet", 300),
}
TEXTS = {
    "flickr8k_cn_train.parquet": ("caption_en", "caption_zh", "caption_zh_mt"),
    "emoji_bilingual.parquet": ("caption_en", "caption_zh", "keywords_en", "keywords_zh"),
    "tiny_imagenet_bilingual_train.parquet": ("caption_en", "caption_zh"),
}


def again(format: str, scale: float = 1.0, **options: Any) -> Callable[[Image.Image], Image.Image]:
    """Encodes an image, resized, and decodes it."""

    def change(image: Image.Image) -> Image.Image:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        file = io.BytesIO()
        (image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)).save(file, format, **options)
        return Image.open(file).convert("RGB")

    return change


COPIES = {
    **{f"JPEG {quality}": again("JPEG", quality=quality) for quality in (95, 75, 50, 30)},
    **{f"x {scale}, JPEG 85": again("JPEG", scale, quality=85) for scale in (0.5, 0.8, 1.15, 1.5)},
    **{f"x {scale}, JPEG 30": again("JPEG", scale, quality=30) for scale in (0.5, 0.8, 1.5)},
    **{f"WebP {quality}": again("WEBP", quality=quality) for quality in (75, 30)},
    "PNG": again("PNG"),
}


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    """[N, THUMBNAIL_BYTES]"""
    return perceptual.thumbnails(np.stack([perceptual.small(image) for image in images]))


def key_sets(thumbs: np.ndarray) -> list[set[int]]:
    """The keys of each thumbnail."""
    found: list[set[int]] = [set() for _ in thumbs]
    for number, key in zip(*(values.tolist() for values in perceptual.keys(thumbs)), strict=True):
        found[number].add(key)
    return found


def copies(images: list[Image.Image]) -> dict[str, float]:
    """How -> the share of the images whose copy is found."""
    thumbs = thumbnails(images)
    keys, shares = key_sets(thumbs), {}
    for how, change in COPIES.items():
        others = thumbnails([change(image) for image in images])
        found = [
            bool(mine & its) and bool(perceptual.are_twins(other, thumb[None])[0])
            for thumb, other, mine, its in zip(thumbs, others, keys, key_sets(others), strict=True)
        ]
        shares[how] = round(float(np.mean(found)), 4)
    return shares


def look_alikes(images: list[Image.Image], names: list[str]) -> dict[str, Any]:
    """All pairs of different images that are taken to show the same."""
    thumbs, by_key = thumbnails(images), defaultdict(list)
    compared, twins = set(), []
    for number, keys in enumerate(key_sets(thumbs)):
        candidates = sorted({other for key in keys for other in by_key[key]})
        compared |= {(other, number) for other in candidates}
        if candidates:
            found = perceptual.are_twins(thumbs[number], thumbs[candidates])
            twins += [(candidates[at], number) for at in np.flatnonzero(found)]
        for key in keys:
            by_key[key].append(number)
    pixels = [np.asarray(image).astype(int) for image in images]
    differ = {pair: int(np.abs(pixels[pair[0]] - pixels[pair[1]]).max()) for pair in twins}
    return {
        "images": len(images),
        "pairs": len(images) * (len(images) - 1) // 2,
        "pairs that share a key": len(compared),
        "taken for twins": len(twins),
        "equal": sum(value <= 1 for value in differ.values()),
        "others": {f"{names[a]} | {names[b]}": value for (a, b), value in differ.items() if value > 1},
    }


def languages(data: Path) -> dict[str, Any]:
    """File and column -> texts, and those whose own language is not allowed."""
    found = {}
    for file, columns in TEXTS.items():
        for column in columns:
            values = pq.read_table(data / file, columns=[column])[column].to_pylist()
            texts = sorted({text for value in values for text in ([value] if isinstance(value, str) else value or ())})
            language = "en" if column.endswith("en") else "zh"
            lost = [text for text in texts if language not in languages_of(text)]
            found[f"{file}: {column}"] = {"texts": len(texts), "lost": len(lost), "such as": lost[:10]}
    return found


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/corpus_twins.json"))
    options = parser.parse_args()
    results: dict[str, Any] = {"command": "python -m benchmarks.corpus_twins", "found": {}, "look-alikes": {}}
    for name, (file, number) in SETS.items():
        table = pq.read_table(options.data / file, columns=["image", "caption_en"])
        images = [Image.open(io.BytesIO(item["bytes"])).convert("RGB") for item in table["image"].to_pylist()]
        names = [str(caption)[:60] for caption in table["caption_en"].to_pylist()]
        chosen = np.random.default_rng(0).choice(len(images), number, replace=False)
        results["found"][name] = {"images": number, **copies([images[int(at)] for at in chosen])}
        results["look-alikes"][name] = look_alikes(images, names)
    results["languages"] = languages(options.data)
    write_json(options.output, results)


if __name__ == "__main__":
    main()
