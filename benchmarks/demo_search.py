"""What the page of `make demo` finds: for each colour and shape, how many of the first twelve pictures show it.

    python -m benchmarks.demo_search --model runs/quickstart/nano/model --scenes runs/quickstart/demo/scenes

Queries are "a red circle" and 红色的圆形, and so on, over the scenes that `make demo` draws. A pair that no picture
shows is left out. Writes `benchmarks/demo_search.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from eval.files import write_json
from model_cards.space.encoder import Encoder
from model_cards.space.search_index import SearchIndex, load_or_build, open_images

OUTPUT = Path(__file__).with_suffix(".json")
TOP = 12
COLOURS = {"red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色"}
COLOURS |= {"blue": "蓝色", "purple": "紫色", "pink": "粉色", "brown": "棕色", "black": "黑色"}
SHAPES = {"circle": "圆形", "square": "方块", "triangle": "三角形", "star": "星星", "heart": "心形"}
SHAPES |= {"diamond": "菱形", "cross": "十字", "crescent": "月牙"}


def query(colour: str, shape: str, tongue: str) -> str:
    if tongue == "zh":
        return f"{COLOURS[colour]}的{SHAPES[shape]}"
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


def measure(encoder: Encoder, index: SearchIndex, scenes: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the pairs of colour and shape, by language, in percent."""
    pairs = [{(each["colour"], each["shape"]) for each in scene} for scene in scenes]
    colours = [{each["colour"] for each in scene} for scene in scenes]
    there = [
        (colour, shape) for colour in COLOURS for shape in SHAPES if any((colour, shape) in each for each in pairs)
    ]
    result: dict[str, Any] = {"pairs": len(there)}
    for tongue in ("zh", "en"):
        found = [index.search(encoder.texts([query(*pair, tongue)])[0], TOP) for pair in there]
        results = list(zip(there, [[each.number for each in row] for row in found], strict=True))
        result[tongue] = {
            "right_colour_in_first_12": mean([pair[0] in colours[i] for pair, row in results for i in row]),
            "right_pair_in_first_12": mean([pair in pairs[i] for pair, row in results for i in row]),
            "right_pair_is_first": mean([pair in pairs[row[0]] for pair, row in results]),
        }
    result["chance"] = {
        "right_colour": mean([pair[0] in each for pair in there for each in colours]),
        "right_pair": mean([pair in each for pair in there for each in pairs]),
    }
    return result


def mean(hits: list[bool]) -> float:
    return round(100 * float(np.mean(hits)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/quickstart/nano/model")
    parser.add_argument("--scenes", default="runs/quickstart/demo/scenes")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    pattern = f"{arguments.scenes}/validation-*.parquet"
    encoder, images = Encoder(arguments.model), open_images(pattern)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        index = load_or_build(encoder, images, folder)
        built = time.perf_counter() - started
        load_or_build(encoder, images, folder)
        loaded = time.perf_counter() - started - built
    rows = datasets.load_dataset("parquet", data_files=pattern, split="train")
    document = {
        "command": "python -m benchmarks.demo_search",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads of torch",
        "images": len(images),
        "seconds_to_build_the_index": round(built, 1),
        "seconds_to_load_it": round(loaded, 2),
        "percent": measure(encoder, index, [json.loads(scene)["objects"] for scene in rows["scene"]]),
    }
    write_json(arguments.output, document)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
