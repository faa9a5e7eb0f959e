"""What the cache saves: `python -m eval run` the first time, and again.

    python -m benchmarks.embedding_cache MODEL --data flickr8k_cn_val.parquet [--output benchmarks/embedding_cache.json]

A model folder on Flickr8k-CN (1,000 photos, 10,000 captions in two languages), or on any task with `--task`; one
thread. Each command is a process of its own, so that what Python imports is counted:

first              an empty cache, an empty output folder
same output        the same command again: the scores are there
new output         another output folder, the same --cache: the scores are kept there too
other settings     another output folder, the same --cache, one image left out: embeddings from the cache, scored anew

and within one process, where everything is imported and the model is loaded:

first in process   read, check, embed and score
again in process   the same call again: embeddings from the cache, scored anew
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.ranks import processor
from eval.files import read_json, write_json

LIBRARIES = ("torch", "transformers", "datasets", "numpy")
Seconds = dict[str, float]


def measure(model: str, task: str, data: str, folder: Path) -> dict[str, Seconds]:
    """One round in an empty folder: what is measured -> {"cpu_seconds", "wall_seconds"}.

    Raises:
        SystemExit: if a command fails, or two give different scores of the same images.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    run = [sys.executable, "-m", "eval", "run", "--model", f"model={model}", "--tasks", task, "--data"]
    run += [f"{task}={data}", "--cache", str(folder / "cache"), "--output"]
    images = _images(run, folder / "count", environment)
    found = {
        "first": _timed([*run, str(folder / "a")], environment),
        "same output": _timed([*run, str(folder / "a")], environment),
        "new output": _timed([*run, str(folder / "b")], environment),
        "other settings": _timed([*run, str(folder / "c"), "--limit", str(images - 1)], environment),
    }
    if _benchmarks(folder / "a") != _benchmarks(folder / "b"):
        sys.exit("The scores differ between the runs.")
    child = [sys.executable, "-m", "benchmarks.embedding_cache", model, "--task", task, "--data", data]
    done = subprocess.run(
        [*child, "--in-process", str(folder / "d")], env=environment, check=True, capture_output=True, text=True
    )
    return found | json.loads(done.stdout.splitlines()[-1])


def in_process(model: str, task: str, data: str, cache: Path) -> dict[str, Seconds]:
    """The same call twice in this process, with the model loaded."""
    from eval.cache import Cache
    from eval.embed import Encoder
    from eval.models import load
    from eval.run import quiet
    from eval.score import score_task
    from eval.tasks import load_task

    quiet()
    encoder = Encoder(load(model), cache=Cache(cache))
    encoder.adapter.describe()

    def call() -> list[dict[str, Any]]:
        return [one.as_json() for one in score_task(load_task(task), encoder, data)]

    first, again = _clocked(call), _clocked(call)
    assert first[1] == again[1]
    return {"first in process": first[0], "again in process": again[0]}


def _images(run: list[str], output: Path, environment: dict[str, str]) -> int:
    """How many images the task has. This also warms up the files of Python and of the data, which is nobody's time."""
    command = [*run, str(output), "--limit", "8", "--cache", str(output / "cache")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return sum(pq.read_metadata(file).num_rows for file in _benchmarks(output)[0]["files"])


def _benchmarks(output: Path) -> list[Any]:
    (model,) = read_json(output / "results.json")["models"]
    return model["tasks"][0]["benchmarks"]


def _timed(command: list[str], environment: dict[str, str]) -> Seconds:
    """The seconds of a command; the CPU's are those of user and system together."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {
        "cpu_seconds": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        "wall_seconds": wall,
    }


def _clocked(call: Callable[[], Any]) -> tuple[Seconds, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    value = call()
    return {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}, value


def summary(rounds: list[dict[str, Seconds]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, and how many times faster each is than the first of its kind."""
    rows: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        cpu, wall = ([one[name][key] for one in rounds] for key in ("cpu_seconds", "wall_seconds"))
        rows[name] = {
            "cpu_seconds": round(statistics.median(cpu), 3),
            "wall_seconds": round(statistics.median(wall), 3),
            "all_cpu_seconds": [round(one, 3) for one in cpu],
        }
    for name, row in rows.items():
        first = rows["first in process" if "in process" in name else "first"]
        row["times_faster_cpu"] = round(first["cpu_seconds"] / row["cpu_seconds"], 1)
        row["times_faster_wall"] = round(first["wall_seconds"] / row["wall_seconds"], 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", help="a folder that from_pretrained loads")
    parser.add_argument("--task", default="flickr8k-cn")
    parser.add_argument("--data", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        print(json.dumps(in_process(arguments.model, arguments.task, arguments.data, arguments.in_process)))
        return
    rounds = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(arguments.model, arguments.task, arguments.data, Path(folder)))
    rows = summary(rounds)
    for name, row in rows.items():
        print(
            f"{name:<17} {row['cpu_seconds']:8.2f} CPU s {row['wall_seconds']:8.2f} s {row['times_faster_cpu']:7.1f}x"
        )
    if arguments.output:
        versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
        head = {"processor": processor(), "threads": 1, "repeats": arguments.repeats, "versions": versions}
        model = {"model": Path(arguments.model).resolve().parent.name, "task": arguments.task}
        write_json(arguments.output, {**head, **model, "measured": rows})


if __name__ == "__main__":
    main()
