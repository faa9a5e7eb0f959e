"""How fast the rules and the deduplication of the corpus pipeline are, what they get wrong, and how memory grows.

    python -m benchmarks.corpus [--output benchmarks/corpus.json] [--rows 12000] [--many 100000]

The messy corpus of `tests/training/corpus/messy.py` (seven sources of real pictures of `../shared/data`, coloured noise
where that is missing), with two workers on local files. Each run is a process of its own, with everything that it
starts; its CPU seconds are those of the whole tree, imports too, so that other work on the machine weighs little.

peer      the rules as one writes them with `datasets`: `map` with two processes for decoding, sizes, lengths, script of
          the text and a difference hash, then a dictionary for duplicates. It reads what "sources" wrote, and is
          to be compared with "clean", which does the same and more: it also knows French from English, finds twins
          that differ in a bit of their hash, and tells look-alikes from twins.
memory    of the same stages over 10,000 and 100,000 small pictures: the proportional set size of all processes
          together, and the largest of one, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from eval.files import write_json
from tests.training.corpus.messy import KEPT, Expected, build, needed, read_truth
from tests.training.corpus.messy_check import TWINS, differences, found
from tests.training.corpus.messy_pictures import drawn, real
from training.corpus.engine import read_report
from training.corpus.rows import parts

SHARED = Path(__file__).parents[1] / ".." / "shared"
WORKERS = 2
REPEATS = 2
STAGES = ("sources", "clean")
IMAGES_PER_SECOND = 600  # owed by issue 6, for rules and duplicates on two cores


# ---- One process and all that it starts


class _Memory(threading.Thread):
    """Samples a tree of processes: of each sample the sum, of all samples the largest."""

    def __init__(self, root: int):
        super().__init__(daemon=True)
        self._root, self._over = psutil.Process(root), threading.Event()
        self.together = self.one = 0

    def run(self) -> None:
        while not self._over.wait(0.1):
            sizes = []
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in tree:
                try:
                    sizes.append(process.memory_full_info().pss)
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue
            self.together, self.one = max(self.together, sum(sizes)), max(self.one, *sizes, 0)

    def stop(self) -> None:
        self._over.set()
        self.join()


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind (Linux): datatrove's workers are children of a
    server that nobody waits for, whose CPU seconds would else be lost."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def timed(command: list[str]) -> dict[str, float]:
    """Runs a command; its seconds on the clock and on CPUs, and its memory in MB.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        memory = _Memory(process.pid)
        memory.start()
        process.wait()
        wall = time.perf_counter() - start
        memory.stop()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command} failed: {said.read().decode(errors='replace')[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    mb = {"pss_mb_together": memory.together / 2**20, "pss_mb_largest_process": memory.one / 2**20}
    return {"wall_seconds": wall, "cpu_seconds": cpu} | mb


def stage(name: str, config: Path) -> dict[str, float]:
    return timed([sys.executable, "-m", "training.corpus", name, "--config", str(config), "--workers", str(WORKERS)])


def elsewhere(config: Path, output: Path) -> Path:
    """The same corpus, made in another folder."""
    values = yaml.safe_load(config.read_text(encoding="utf-8")) | {"output": str(output)}
    changed = output.with_suffix(".yaml")
    changed.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return changed


# ---- The messy corpus


def messy(folder: Path, rows: int) -> tuple[Path, str]:
    take = needed(rows) | {"seed": 0}
    pictures = real(SHARED, **take) if SHARED.is_dir() else drawn(**take)
    build(folder, pictures, rows)
    return folder / "corpus.yaml", "../shared/data" if SHARED.is_dir() else "coloured noise"


def speed(folder: Path, config: Path, truth: list[Expected]) -> dict[str, Any]:
    """Stages and peer in turns; of each the run with the fewest CPU seconds."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in (*STAGES, "again", "peer")}
    for repeat in range(REPEATS):
        output = folder / f"corpus{repeat}"
        its_config = elsewhere(config, output)
        for name in STAGES:
            runs[name].append(stage(name, its_config))
        runs["again"].append(stage("clean", its_config))
        peer = [
            sys.executable,
            "-m",
            "benchmarks.corpus",
            "--peer",
            str(output),
            "--guard",
            str(folder / "guard.parquet"),
        ]
        runs["peer"].append(timed(peer))
    best = {name: min(all_, key=lambda run: run["cpu_seconds"]) for name, all_ in runs.items()}
    images = len({row.image for row in truth})
    both = {key: sum(best[name][key] for name in STAGES) for key in ("wall_seconds", "cpu_seconds")}
    rates = {
        name: {
            "images_per_second": images / seconds["wall_seconds"],
            "rows_per_second": len(truth) / seconds["wall_seconds"],
            "images_per_cpu_second": images / seconds["cpu_seconds"],
        }
        for name, seconds in (("sources and clean", both), ("clean", best["clean"]), ("peer", best["peer"]))
    }
    return {
        "images": images,
        "rows": len(truth),
        "runs": runs,
        "best": best,
        "rates": rates,
        "cpu_seconds_of_clean_over_peer": best["clean"]["cpu_seconds"] / best["peer"]["cpu_seconds"],
    }


def mistakes(truth: list[Expected], outcomes: dict[str, str]) -> dict[str, Any]:
    """Rows that should have gone and stayed, by why they should have gone; good ones that went, by why they did."""
    passed: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    either: dict[str, dict[str, str]] = {}  # twins of which any one may stay -> image -> what became of it
    for row in truth:
        outcome = outcomes[row.id]
        if KEPT not in row.outcomes:
            if outcome == KEPT:
                passed["a twin" if TWINS & {*row.outcomes} else " or ".join(row.outcomes)] += 1
        elif len(row.outcomes) == 1:
            if outcome != KEPT:
                lost[outcome] += 1
        elif either.setdefault(row.twins, {}).get(row.image) != KEPT:
            either[row.twins][row.image] = outcome
    for images in either.values():
        kept = sum(outcome == KEPT for outcome in images.values())
        if kept == 0:
            lost[next(iter(images.values()))] += 1
        passed["a twin"] += max(0, kept - 1)
    return {
        "should_go": sum(KEPT not in row.outcomes for row in truth),
        "should_stay": sum(row.outcomes == (KEPT,) for row in truth),
        "stayed_and_should_not": dict(+passed),
        "went_and_should_not": dict(lost),
    }


# ---- The peer


def _looked_at(row: dict[str, Any], texts: dict[str, int]) -> dict[str, Any]:
    import warnings

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"reason": "", "hash": ""}
    text = (row["text"] or "").strip()
    chinese = any("\u4e00" <= character <= "\u9fff" for character in text)
    if len(text) < texts[row["language"]]:
        return found | {"reason": "short_text"}
    if chinese != (row["language"] == "zh"):
        return found | {"reason": "wrong_language"}
    try:
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        width, height = image.size
        if width * height > 50_000_000:
            return found | {"reason": "too_many_pixels"}
        if max(width, height) > 3 * min(width, height):
            return found | {"reason": "aspect_ratio"}
        grey = np.asarray(image.convert("L").resize((9, 8)))
    except Image.DecompressionBombError:
        return found | {"reason": "too_many_pixels"}
    except Exception:
        return found | {"reason": "broken_image"}
    return found | {"hash": np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()}


def peer(output: Path, guard: Path) -> None:
    """Rules and duplicates with `datasets` alone, of the rows in `output`; writes `output`-peer.parquet."""
    import datasets

    datasets.disable_progress_bars()
    settings = yaml.safe_load(output.with_suffix(".yaml").read_text(encoding="utf-8"))
    order = sorted(settings["sources"]["list"], key=lambda entry: -entry["priority"])
    rank = {entry["name"]: place for place, entry in enumerate(order)}
    with tempfile.TemporaryDirectory() as cache:
        files = [str(part) for part in parts(output / "sources" / "rows")]
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        rows = rows.cast_column("image", datasets.Image(decode=False))
        look = partial(_looked_at, texts=settings["clean"]["min_characters"])
        rows = rows.map(look, num_proc=WORKERS)
        bad = set()
        for image in pq.read_table(guard)["image"].to_pylist():
            bad.add(_looked_at({"text": "a text", "language": "en", "image": image}, {"en": 1})["hash"])
        places = rows.select_columns(["id", "source", "language", "image_id", "image_hash", "reason", "hash"]).to_list()
        first: dict[tuple[str, str], tuple[str, str]] = {}
        for row in sorted(places, key=lambda row: rank[row["source"]]):
            image = (row["source"], row["image_id"])
            if not row["reason"] and row["hash"] in bad:
                row["reason"] = "evaluation_image"
            for key in (row["image_hash"], row["hash"]):
                if not row["reason"] and first.setdefault((row["language"], key), image) != image:
                    row["reason"] = "duplicate"
        kept = [place for place, row in enumerate(places) if not row["reason"]]
        rows.select(kept).to_parquet(output.with_name(output.name + "-peer.parquet"))
    write_json(output.with_name(output.name + "-peer.json"), {row["id"]: row["reason"] or KEPT for row in places})


# ---- Memory


def _small_pictures(numbers: range) -> list[bytes]:
    made = []
    for number in numbers:
        generator = np.random.default_rng(number)
        grid = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        out = io.BytesIO()
        grid.resize((48, 48), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
        made.append(out.getvalue())
    return made


def many(folder: Path, rows: int) -> Path:
    """A corpus of small pictures in ten files, all different but one in twenty, which repeats an earlier one."""
    folder.mkdir(parents=True)
    choose = random.Random(0)
    each = rows // 10
    with ProcessPoolExecutor(WORKERS) as pool:
        work = [range(start, start + each) for start in range(0, rows, each)]
        for file, images in enumerate(pool.map(_small_pictures, work)):
            for place in range(20, len(images), 20):
                images[place] = images[choose.randrange(place)]
            texts = [f"a picture of colours, number {number}" for number in work[file]]
            pq.write_table(pa.table({"image": images, "text": texts}), folder / f"{file}.parquet", row_group_size=500)
    source = {"name": "many", "adapter": "parquet", "files": [str(folder / "*.parquet")], "language": "en"}
    config = {"output": str(folder / "corpus"), "sources": {"rows_per_part": 2000, "list": [source]}, "clean": {}}
    (folder / "corpus.yaml").write_text(yaml.safe_dump(config))
    return folder / "corpus.yaml"


def memory(folder: Path, rows: int) -> dict[str, Any]:
    config = many(folder, rows)
    return {"rows": rows} | {name: stage(name, config) for name in STAGES}


# ---- All of it


def measure(rows: int, many_rows: int) -> dict[str, Any]:
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config, pictures = messy(folder / "messy", rows)
        truth = read_truth(folder / "messy")
        fast = speed(folder / "messy", config, truth)
        output = folder / "messy" / "corpus0"
        ours = {row["id"]: row["reason"] for row in found(output)}
        lost = {row["id"]: row["reason"] for row in found(output) if row["reason"] != KEPT}
        peers = lost | json.loads((folder / "messy" / "corpus0-peer.json").read_text(encoding="utf-8"))
        return {
            "machine": {
                "cpu": _cpu(),
                "cores": os.cpu_count(),
                "load_before": load,
                "python": platform.python_version(),
            },
            "workers": WORKERS,
            "pictures": pictures,
            "owed_images_per_second": IMAGES_PER_SECOND,
            "speed": fast,
            "counts": read_report(output / "clean").counts.outcomes(),
            "mistakes": {"ours": mistakes(truth, ours), "peer": mistakes(truth, peers)},
            "differences_from_truth": differences(truth, output),
            "memory": [memory(folder / f"many{number}", number) for number in (many_rows // 10, many_rows)],
            "load_after": os.getloadavg(),
        }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--guard", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(options.peer, options.guard)
        return
    adopt_orphans()
    results = measure(options.rows, options.many)
    print(
        json.dumps(
            {key: results[key] for key in ("mistakes", "memory")} | {"rates": results["speed"]["rates"]}, indent=1
        )
    )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
