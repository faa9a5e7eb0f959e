"""The scorer against brute force and against the official definition: the same recalls, how much faster, how much
memory.

    python -m benchmarks.ranks [--output benchmarks/ranks.json] [--repeats 3] [--kernels free Haswell]

Random 768-d unit features of 1,000 images with 5 texts each and of 5,000 with 5 each; single-threaded. Every
measurement is a process of its own, so that its peak memory is its own, and starts with the features in memory;
approaches take turns, and the median of the repeats is reported. CPU seconds decide: other work on a machine changes
them less than wall seconds. Beside `eval.ranks.retrieval_ranks`:

official      what the released eval_retrieval.py does with the features: dense fp64 matrices that say which answers are
              right for both directions, two fp64 products, a full argsort of each, loops over the first ten places.
brute force   the place of the right answers in a full fp64 argsort, query by query: for its recalls, so once.

numpy's products, which the official approach needs, run in OpenBLAS. Left free it chooses its kernel by the processor;
OPENBLAS_CORETYPE=Haswell is what it runs where there is AVX2 and no AVX-512. Both are measured.

Letters: N images, M texts.
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
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from eval.ranks import RECALL_AT, retrieval_ranks

DIM = 768
CAPTIONS = 5
IMAGES = (1000, 5000)
# Texts are their image's features plus noise, so that recalls are neither 0 nor 1.
SIGNAL = 0.1

Recalls = dict[str, float]


def features(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [N, 768] and texts [M, 768], fp32 of length 1, and the image of each text [M]."""
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(images), CAPTIONS)
    image_embeds = generator.standard_normal((images, DIM), dtype=np.float32)
    text_embeds = generator.standard_normal((len(owner), DIM), dtype=np.float32)
    text_embeds += SIGNAL * image_embeds[owner]
    for embeds in (image_embeds, text_embeds):
        embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return image_embeds, text_embeds, owner


def official(image_embeds: np.ndarray, text_embeds: np.ndarray, owner: np.ndarray) -> Recalls:
    """`calu_recall` of the released eval_retrieval.py on the matrices that its `get_data` makes, step for step; all of
    them stay in memory until the end, as there. Its features are fp64 (they went through Python lists, which is not
    counted here); no two texts are equal here, so its mistake with repeated texts does not show."""
    image_embeds, text_embeds = image_embeds.astype(np.float64), text_embeds.astype(np.float64)
    right = {
        "image_to_text": np.zeros((len(image_embeds), len(text_embeds))),
        "text_to_image": np.zeros((len(text_embeds), len(image_embeds))),
    }
    for text, image in enumerate(owner.tolist()):
        right["image_to_text"][image][text] = 1
        right["text_to_image"][text][image] = 1

    scores = {"text_to_image": text_embeds @ image_embeds.T}
    order = {"text_to_image": np.argsort(-scores["text_to_image"], axis=1)}
    scores["image_to_text"] = image_embeds @ text_embeds.T
    order["image_to_text"] = np.argsort(-scores["image_to_text"], axis=1)

    recalls = {}
    for direction in ("text_to_image", "image_to_text"):
        queries = len(order[direction])
        found = np.zeros((queries, 10))
        for query in range(queries):
            for place in range(10):
                if right[direction][query][order[direction][query][place]] == 1:
                    found[query][place] = 1
        found = np.cumsum(found, axis=1)
        hits = [0] * 10
        for query in range(queries):
            for place in range(10):
                if found[query][place] > 0:
                    hits[place] += 1
        recalls |= {f"{direction}_R@{k}": hits[k - 1] / queries for k in RECALL_AT}
    return recalls


def brute_force(image_embeds: np.ndarray, text_embeds: np.ndarray, owner: np.ndarray) -> Recalls:
    image_embeds, text_embeds = image_embeds.astype(np.float64), text_embeds.astype(np.float64)
    place: dict[str, list[int]] = {"text_to_image": [], "image_to_text": []}
    for start in range(0, len(text_embeds), 500):
        for text, scores in enumerate(text_embeds[start : start + 500] @ image_embeds.T, start):
            order = np.argsort(-scores, kind="stable")
            place["text_to_image"].append(int(np.flatnonzero(order == owner[text])[0]))
    for start in range(0, len(image_embeds), 500):
        for image, scores in enumerate(image_embeds[start : start + 500] @ text_embeds.T, start):
            order = np.argsort(-scores, kind="stable")
            place["image_to_text"].append(int(np.flatnonzero(owner[order] == image)[0]))
    return {f"{name}_R@{k}": float(np.mean(np.array(own) < k)) for name, own in place.items() for k in RECALL_AT}


def ours(image_embeds: np.ndarray, text_embeds: np.ndarray, owner: np.ndarray) -> Recalls:
    ranks = retrieval_ranks(image_embeds, text_embeds, owner)
    recalls = {k: ranks.recall(k) for k in RECALL_AT}
    return {
        f"{name}_R@{k}": getattr(recalls[k], name) for name in ("text_to_image", "image_to_text") for k in RECALL_AT
    }


APPROACHES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Recalls]] = {
    "official": official,
    "brute force": brute_force,
    "ours": ours,
}


def measure(approach: str, images: int) -> dict[str, object]:
    """One approach in this process: seconds, peak memory of the process so far, recalls."""
    torch.set_num_threads(1)
    data = features(images)
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))  # what the first product sets up is not the scorer's
    wall, cpu = time.perf_counter(), time.process_time()
    recalls = APPROACHES[approach](*data)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux
    return {"cpu_seconds": cpu, "wall_seconds": wall, "peak_mb": peak, "recalls": recalls}


def in_own_process(approach: str, images: int, kernel: str) -> dict[str, object]:
    """`measure` in a new process on one thread; `kernel` is "free" or a value of OPENBLAS_CORETYPE."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if kernel != "free":
        environment["OPENBLAS_CORETYPE"] = kernel
    command = [sys.executable, "-m", "benchmarks.ranks", "--one", approach, "--images", str(images)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def run(repeats: int, kernel: str) -> list[dict[str, object]]:
    """All approaches on both sizes.

    Raises:
        SystemExit: if two approaches disagree on a recall.
    """
    sizes = []
    for images in IMAGES:
        runs: dict[str, list[dict[str, object]]] = {name: [] for name in APPROACHES}
        for repeat in range(repeats):
            for name in APPROACHES:
                if name != "brute force" or repeat == 0:
                    runs[name].append(in_own_process(name, images, kernel))
        recalls = {name: own[0]["recalls"] for name, own in runs.items()}
        if any(found != recalls["ours"] for found in recalls.values()):
            sys.exit(f"The recalls differ: {json.dumps(recalls, indent=1)}")
        rows = {name: _summary(own, runs["official"]) for name, own in runs.items()}
        for name, row in rows.items():
            print(
                f"{kernel:<8} {images:>5} x {CAPTIONS * images:<6} {name:<12} {row['cpu_seconds']:8.2f} CPU s"
                f" {row['wall_seconds']:8.2f} s {row['peak_mb']:7.0f} MB {row['times_faster_than_official']:6.1f}x"
            )
        sizes.append({"images": images, "texts": CAPTIONS * images, "recalls": recalls["ours"], "approaches": rows})
    return sizes


def _summary(runs: Sequence[dict[str, object]], official: Sequence[dict[str, object]]) -> dict[str, float]:
    """Medians, all CPU seconds, and the quotients of the medians and of the least CPU seconds."""
    seconds, theirs = ([round(r["cpu_seconds"], 4) for r in own] for own in (runs, official))
    median = {key: statistics.median(r[key] for r in runs) for key in ("cpu_seconds", "wall_seconds", "peak_mb")}
    return {
        **{key: round(value, 4) for key, value in median.items()},
        "all_cpu_seconds": seconds,
        "times_faster_than_official": round(statistics.median(theirs) / statistics.median(seconds), 2),
        "times_faster_least_to_least": round(min(theirs) / min(seconds), 2),
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", nargs="+", default=["free", "Haswell"], help="of OpenBLAS")
    parser.add_argument("--one", choices=list(APPROACHES), help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.images)))
        return
    versions = {"numpy": np.__version__, "torch": torch.__version__, "python": platform.python_version()}
    result = {"processor": processor(), "threads": 1, "repeats": arguments.repeats, "versions": versions}
    result["openblas_kernels"] = {kernel: run(arguments.repeats, kernel) for kernel in arguments.kernels}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
