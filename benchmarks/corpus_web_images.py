"""CPU seconds of the stages "sources" and "clean" on images as large as those that img2dataset leaves: for `plan`.

    OMP_NUM_THREADS=1 python -m benchmarks.corpus_web_images [IMAGES]

The photos of Flickr8k-CN in `../shared/data` are 128 pixels wide. Here they are enlarged to 256 x 342 with fine noise,
so that a JPEG of quality 90 has about 30 kB; each has one English caption. What decoding costs depends on pixels, which
is why the rates of the messy corpus (64 to 128 pixels, benchmarks/corpus.py) are not those of the web. Writes
corpus_web_images.json beside this file.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from benchmarks.corpus import adopt_orphans, timed
from eval.files import write_json
from training.corpus.engine import KEPT, read_report

SHARED = Path(__file__).parents[2] / "shared" / "data" / "flickr8k_cn_train.parquet"
SIZE = (256, 342)


def enlarged(data: bytes, seed: int) -> bytes:
    """A JPEG of SIZE, with noise of 6 grey levels."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC), np.float32)
    noise = np.random.default_rng(seed).normal(0, 6, pixels.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def rows(number: int) -> Iterator[dict[str, Any]]:
    table = pq.read_table(SHARED, columns=["image", "caption_en"]).slice(0, number)
    for place, row in enumerate(table.to_pylist()):
        yield {"image": {"bytes": enlarged(row["image"]["bytes"], place)}, "text": row["caption_en"][0]}


def main() -> None:
    number = int(sys.argv[1]) if sys.argv[1:] else 4000
    adopt_orphans()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = pa.Table.from_pylist(list(rows(number)))
        pq.write_table(made, folder / "photos.parquet", row_group_size=256)
        size = (folder / "photos.parquet").stat().st_size
        entry = {"name": "photos", "adapter": "parquet", "files": [str(folder / "photos.parquet")], "language": "en"}
        sections = {"sources": {"rows_per_part": 1000, "list": [entry]}, "clean": {}, "executor": {"workers": 2}}
        config = folder / "corpus.yaml"
        config.write_text(yaml.safe_dump({"output": str(folder / "corpus"), **sections}))
        found = {}
        for stage in ("sources", "clean"):
            took = timed([sys.executable, "-m", "training.corpus", stage, "--config", str(config)])
            found[stage] = {
                "cpu_seconds": round(took["cpu_seconds"], 2),
                "rows_per_core_second": round(number / took["cpu_seconds"]),
                "kept": read_report(folder / "corpus" / stage).counts.total(KEPT),
            }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    document = {"command": f"python -m benchmarks.corpus_web_images {number}", "commit": commit}
    document |= {"images": number, "pixels": list(SIZE), "bytes_per_image": size // number, "stages": found}
    write_json(Path(__file__).with_suffix(".json"), document)
    print(document)


if __name__ == "__main__":
    main()
