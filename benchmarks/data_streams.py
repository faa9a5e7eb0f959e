"""Samples per second of the data streams against plain `datasets` streaming, and what draft decoding changes.

    python -m benchmarks.data_streams [--output benchmarks/data_streams.json]

One process, one thread, local files that are in the page cache, synthetic photos (1/f noise with correlated channels)
as JPEG. Both sides do the same work: `raw` hands out encoded images and captions; `decoded` decodes, resizes to 224 x
224 and normalises. Times are this process's CPU seconds, the best of two, so that other work on the machine weighs
little; read the ratios, not the numbers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is imported: it would count the use of its loaders

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from modeling_m2encoder import M2EncoderImageProcessorPil
from training.data import open_source
from training.images import Decoded, PixelTransform, decode
from training.shards import Fields, _parse, read_shard
from training.streams import SampleStream

SHARDS, PER_SHARD = 4, 200
SIDE = 224
CAPTIONS = {"en": "caption_en", "zh": "caption_zh"}
REPEATS = 2


def photo(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """1/f noise, the spectrum of photos, with channels that share three quarters of it."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequencies[0, 0] = 1
    shared, *own = (
        np.fft.irfft2(np.fft.rfft2(generator.standard_normal((height, width))) / frequencies, (height, width))
        for _ in range(4)
    )
    channels = [0.75 * shared + 0.25 * channel for channel in own]
    pixels = np.stack([128 + 50 * (channel - channel.mean()) / channel.std() for channel in channels], axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def write_shards(folder: Path) -> tuple[list[str], list[str], int]:
    """The same samples as parquet and tar files; and the mean bytes of an image."""
    generator = np.random.default_rng(0)
    pictures = [jpeg(photo(generator, 320, 256)) for _ in range(20)]
    parquet, tars = [], []
    for shard in range(SHARDS):
        rows = []
        tars.append(str(folder / f"{shard}.tar"))
        with tarfile.open(tars[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(PER_SHARD):
                texts = {"caption_en": f"a photo of things, number {i}", "caption_zh": f"一张照片，第{i}张"}
                picture = pictures[(shard * PER_SHARD + i) % len(pictures)]
                rows.append({"image": {"bytes": picture, "path": None}, **texts})
                for extension, data in (("jpg", picture), ("json", json.dumps(texts).encode())):
                    info = tarfile.TarInfo(f"{i:08}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        parquet.append(str(folder / f"{shard}.parquet"))
        pq.write_table(pa.Table.from_pylist(rows), parquet[-1], row_group_size=100)
    return parquet, tars, round(np.mean([len(picture) for picture in pictures]))


def ours_raw(files: list[str]) -> Iterator[bytes]:
    for file in files:
        for found in read_shard(file, 0, Fields("image", CAPTIONS), lambda reason, seen: None):
            yield found.row.image


def ours_shuffled(files: list[str]) -> Iterator[bytes]:
    source = open_source(files, captions=CAPTIONS, streaming=True)
    stream = SampleStream(source, source.languages, seed=0, consumer=0, consumers=1, window=256)
    return (stream.take("en" if i % 2 else "zh")[1].image for i in range(SHARDS * PER_SHARD))


def datasets_rows(kind: str, files: list[str], column: str, decoded: bool) -> Iterator[Any]:
    rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    rows = rows.cast_column(column, datasets.Image(decode=decoded))
    return (row[column] if decoded else row[column]["bytes"] for row in rows)


def as_pixels(images: Iterator[Any], transform: PixelTransform) -> Iterator[torch.Tensor]:
    generators = [np.random.default_rng(0)]
    for image in images:
        if isinstance(image, bytes):
            yield transform([decode(image, (SIDE, SIDE))], generators)
        else:
            image = image.convert("RGB")
            yield transform([Decoded(image, image.size)], generators)


def rate(make: Callable[[], Iterator[Any]]) -> float:
    """Samples per CPU second, the best of `REPEATS`; opening the data is not counted."""
    best = 0.0
    for _ in range(REPEATS):
        samples = make()
        start, count = time.process_time(), 0
        for _ in samples:
            count += 1
        if count != SHARDS * PER_SHARD:
            raise RuntimeError(f"{count} samples came instead of {SHARDS * PER_SHARD}.")
        best = max(best, count / (time.process_time() - start))
    return round(best)


def measure_streams(folder: Path, transform: PixelTransform) -> dict[str, Any]:
    parquet, tars, size = write_shards(folder)
    results: dict[str, Any] = {"samples": SHARDS * PER_SHARD, "image": "320x256", "mean_image_bytes": size}
    for kind, files, loader, column in (
        ("parquet", parquet, "parquet", "image"),
        ("tar", tars, "webdataset", "jpg"),
    ):
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "raw_ours": lambda files=files: ours_raw(files),
            "raw_ours_shuffled": lambda files=files: ours_shuffled(files),
            "raw_datasets": lambda loader=loader, files=files, c=column: datasets_rows(loader, files, c, False),
            "decoded_ours": lambda files=files: as_pixels(ours_shuffled(files), transform),
            "decoded_datasets": lambda loader=loader, files=files, c=column: as_pixels(
                datasets_rows(loader, files, c, True), transform
            ),
        }
        rates = {name: rate(way) for name, way in ways.items()}
        ratios = {
            "raw": round(rates["raw_ours_shuffled"] / rates["raw_datasets"], 2),
            "decoded": round(rates["decoded_ours"] / rates["decoded_datasets"], 2),
        }
        results[kind] = {"samples_per_cpu_second": rates, "ours_to_datasets": ratios}
    return results


def measure_draft(transform: PixelTransform) -> list[dict[str, Any]]:
    generator, results = np.random.default_rng(1), []
    levels = transform.levels[0, 1] - transform.levels[0, 0]
    for width, height in ((960, 900), (1280, 960), (2048, 1536)):
        pictures = [jpeg(photo(generator, width, height)) for _ in range(2)]
        seconds, pixels = {}, {}
        for name, target in (("exact", None), ("draft", (SIDE, SIDE))):
            best = float("inf")
            for _ in range(REPEATS):
                start = time.process_time()
                images = [decode(picture, target) for picture in pictures]
                pixels[name] = transform(images, [np.random.default_rng(0)] * len(images))
                best = min(best, time.process_time() - start)
            seconds[name] = best
        difference = (pixels["exact"] - pixels["draft"]).abs() / levels
        results.append(
            {
                "image": f"{width}x{height}",
                "decoded_at": "x".join(map(str, images[0].image.size)),
                "times_as_fast": round(seconds["exact"] / seconds["draft"], 2),
                "mean_difference_in_grey_levels": round(difference.mean().item(), 3),
                "largest_difference_in_grey_levels": round(difference.max().item()),
            }
        )
    return results


def measure_headers() -> dict[str, float]:
    """Microseconds to read a plain tar header."""
    info = tarfile.TarInfo("00000000.jpg")
    info.size = 23_456
    block = info.tobuf(tarfile.USTAR_FORMAT)
    results = {}
    for name, parse in (
        ("ours", lambda: _parse(block)),
        ("tarfile", lambda: tarfile.TarInfo.frombuf(block, "utf-8", "replace")),
    ):
        start = time.process_time()
        for _ in range(5000):
            parse()
        results[name] = round((time.process_time() - start) / 5000 * 1e6, 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    datasets.disable_progress_bars()
    processor = M2EncoderImageProcessorPil(size={"height": SIDE, "width": SIDE})
    transform = PixelTransform(processor)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "command": "python -m benchmarks.data_streams",
            "machine": f"{platform.machine()}, one thread, busy with other work; CPU time",
            "versions": {m.__name__: m.__version__ for m in (datasets, pa, np)} | {"pillow": Image.__version__},
            "streams": measure_streams(Path(folder), transform),
            "draft": measure_draft(transform),
            "tar_header_microseconds": measure_headers(),
        }
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
