"""The endpoint's handler under load: requests per second, waiting times and memory, with a peer in the same run.

    python -m benchmarks.handler --model runs/quickstart/nano/model --scenes runs/quickstart/scenes

2,000 requests of mixed kinds from 16 clients with connections that stay open, over HTTP on this machine; clients and
server share the processor. The peer is what the Endpoints toolkit runs where there is no handler, the transformers
pipeline, called directly: without HTTP and JSON, one request after another, and only on the kind of request that both
answer. Writes `benchmarks/handler.json`.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import platform
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet
import torch
import transformers
from PIL import Image
from transformers import pipeline

from benchmarks.endpoint_server import load_handler, serving
from eval.files import write_json

OUTPUT = Path(__file__).with_suffix(".json")
LABELS = {
    "This is a photo of {}.": ["a red circle", "a blue square", "a yellow star", "a green triangle"],
    "一张{}的照片": ["红色的圆形", "蓝色的方块", "黄色的星星", "绿色的三角形"],
}
TEXTS = [
    "a red circle to the left of a blue square",
    "红色的圆在蓝色方块的左边",
    "three yellow stars",
    "三颗黄色的星星",
]


class Client:
    """One connection that stays open."""

    def __init__(self, address: str):
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: Any) -> None:
        self.connection.close()

    def post(self, request: dict[str, Any]) -> Any:
        """Raises RuntimeError for any answer but 200."""
        self.connection.request("POST", "/", json.dumps(request).encode(), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {body[:200]!r}")
        return json.loads(body)


def zero_shot_request(image: str, number: int) -> dict[str, Any]:
    template, labels = list(LABELS.items())[number % 2]
    return {"inputs": image, "parameters": {"candidate_labels": labels, "hypothesis_template": template}}


def mixed_requests(images: list[bytes], count: int) -> list[dict[str, Any]]:
    """In turn: a text, four texts, an image, two images, an image with English labels, one with Chinese labels."""
    encoded = [base64.b64encode(image).decode() for image in images]
    found = []
    for i in range(count):
        image, other = encoded[i % len(encoded)], encoded[(i + 1) % len(encoded)]
        kinds = [
            {"inputs": TEXTS[i % 4]},
            {"inputs": TEXTS},
            {"inputs": image},
            {"inputs": [image, other]},
            zero_shot_request(image, 0),
            zero_shot_request(image, 1),
        ]
        found.append(kinds[i % 6])
    return found


def resident_mib() -> float:
    """Memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def under_load(address: str, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Posts the requests, divided among the clients; seconds from sending to the answer."""

    def work(number: int) -> tuple[list[float], list[str]]:
        times, errors = [], []
        with Client(address) as client:
            for request in requests[number::clients]:
                started = time.perf_counter()
                try:
                    client.post(request)
                except (RuntimeError, OSError, http.client.HTTPException) as error:
                    errors.append(str(error))
                times.append(time.perf_counter() - started)
        return times, errors

    before, started = resident_mib(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(work, range(clients)))
    seconds = time.perf_counter() - started
    times = sorted(each for part, _ in done for each in part)
    return {
        "requests": len(times),
        "clients": clients,
        "errors": sum(len(errors) for _, errors in done),
        "requests_per_second": round(len(times) / seconds, 1),
        "p50_ms": round(1000 * statistics.median(times), 1),
        "p95_ms": round(1000 * times[int(0.95 * len(times))], 1),
        "resident_before_mib": round(before),
        "resident_after_mib": round(resident_mib()),
    }


def against_the_pipeline(model: str, handler: Any, address: str, images: list[bytes], count: int) -> dict[str, Any]:
    """The same zero-shot requests three ways: the pipeline, the handler, the handler over HTTP by one client."""
    classify = pipeline("zero-shot-image-classification", model=model, trust_remote_code=True)
    requests = [zero_shot_request(base64.b64encode(images[i % len(images)]).decode(), i) for i in range(count)]

    def peer(request: dict[str, Any]) -> list[dict[str, Any]]:
        image = Image.open(io.BytesIO(base64.b64decode(request["inputs"])))
        return classify(image, **request["parameters"])

    difference = 0.0
    for request in requests[:20]:
        expected = {each["label"]: each["score"] for each in peer(request)}
        for each in handler(request):
            difference = max(difference, abs(each["score"] - expected[each["label"]]))
    with Client(address) as client:
        ways = {"pipeline": peer, "handler": handler, "handler_over_http": client.post}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for request in requests:  # in turn, so that the rest of the machine disturbs all of them alike
            for name, answer in ways.items():
                started = time.perf_counter()
                answer(request)
                seconds[name].append(time.perf_counter() - started)
    milliseconds = {f"{name}_ms": round(1000 * statistics.median(each), 2) for name, each in seconds.items()}
    return {"requests": count, **milliseconds, "largest_difference_of_scores": difference}


def large_picture(handler: Any, side: int = 8192) -> dict[str, Any]:
    """What one JPEG of side x side pixels, the most that is decoded, takes beyond what was in memory, for a moment."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "JPEG")
    before, peak, done = resident_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident_mib())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        handler({"inputs": file.getvalue()})
    finally:
        done.set()
        watching.join()
    return {
        "pixels": side * side,
        "peak_mib": round(peak[0] - before),
        "afterwards_mib": round(resident_mib() - before),
    }


def scene_images(scenes: Path, count: int) -> list[bytes]:
    table = pyarrow.parquet.read_table(next(scenes.glob("test-*.parquet")), columns=["image"])
    return [row["bytes"] for row in table.column("image").to_pylist()[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/quickstart/nano/model")
    parser.add_argument("--scenes", type=Path, default=Path("runs/quickstart/scenes"))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    images = scene_images(arguments.scenes, 64)
    handler = load_handler(arguments.model)
    with serving(handler) as address:
        under_load(address, mixed_requests(images, 60), arguments.clients)  # threads and buffers are made now
        load = under_load(address, mixed_requests(images, arguments.requests), arguments.clients)
        picture = large_picture(handler)
        peer = against_the_pipeline(arguments.model, handler, address, images, 200)
    document = {
        "command": "python -m benchmarks.handler",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads of torch",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": arguments.model,
        "load": load,
        "zero_shot_one_client": peer,
        "large_picture": picture,
    }
    write_json(arguments.output, document)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
