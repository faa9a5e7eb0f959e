"""How fast the shards of a corpus are made, and how memory grows: one core, images of 30 kB that nothing compresses.

    OMP_NUM_THREADS=1 python -m benchmarks.corpus_shards [ROWS ...]

Each number of rows is a process of its own: the tasks of both phases one after the other, in parts of 1,000 rows, with
shards of 32 MB. CPU seconds decide. Writes corpus_shards.json beside this file; needs 4 GB of disk for 60,000 rows.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eval.files import write_json
from training.corpus.rows import write_rows
from training.corpus.shard_task import SHARDS_PER_BUCKET, ShardTask
from training.corpus.shards import ScatterTask

IMAGE_BYTES, PART_ROWS, SHARD_BYTES = 30_000, 1000, 2**25


def part(number: int) -> Iterator[dict[str, Any]]:
    noise = np.random.default_rng(number)
    for row in range(PART_ROWS):
        data = noise.bytes(IMAGE_BYTES)
        yield {
            "id": f"noise/{number}/{row}",
            "source": "noise",
            "image": {"bytes": data, "path": None},
            "text": "a picture of noise that says nothing to anybody",
            "language": "en",
            "image_hash": hashlib.sha256(data).hexdigest(),
            "origin": "raw",
        }


def make(folder: Path, rows: int) -> None:
    for number in range(rows // PART_ROWS):
        write_rows(folder / "clean" / "kept" / f"part-{number:05d}.parquet", part(number))


def measure(folder: Path) -> dict[str, Any]:
    """Of this process alone."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = sorted((folder / "clean" / "kept").iterdir())
    weight = sum(file.stat().st_size for file in files)
    buckets = max(1, -(-weight // (SHARDS_PER_BUCKET * SHARD_BYTES)))
    start = time.process_time()
    scatter = ScatterTask(folder, (("clean", "kept"),), 0, buckets)
    rows = sum(scatter(number).total() for number in range(len(files)))
    scattered = time.process_time()
    gather = ShardTask(folder / "shards", ("parquet",), SHARD_BYTES, 0.0, 512, None)
    written = sum(gather(number).total() for number in range(buckets))
    end = time.process_time()
    assert rows == written
    return {
        "rows": rows,
        "bytes": weight,
        "buckets": buckets,
        "scatter_cpu_seconds": round(scattered - start, 2),
        "write_cpu_seconds": round(end - scattered, 2),
        "rows_per_core_second": round(rows / (end - start)),
        "megabytes_per_core_second": round(weight / 1e6 / (end - start), 1),
        "memory_mb_before": before // 1024,
        "memory_mb_most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    found = []
    for rows in [int(value) for value in sys.argv[1:]] or [10_000, 60_000]:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name), rows)
            command = [sys.executable, "-m", "benchmarks.corpus_shards", "--measure", name]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(found[-1])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    document = {
        "command": "python -m benchmarks.corpus_shards",
        "commit": commit,
        "shard_bytes": SHARD_BYTES,
        "runs": found,
    }
    write_json(Path(__file__).with_suffix(".json"), document)


if __name__ == "__main__":
    main()
