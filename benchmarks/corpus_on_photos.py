"""The whole corpus pipeline on real pictures: the table and the histogram of docs/corpus.md.

    OMP_NUM_THREADS=1 python -m benchmarks.corpus_on_photos [--model runs/quickstart/nano/model] [--work DIR]

Sources: photos of Flickr8k-CN and emoji from `../shared/data`, drawn scenes, and other scenes with each other's
captions. The model is the quickstart's `nano` (0.5 M parameters), which has seen drawn scenes alone: it tells right
captions of scenes from wrong ones, and knows nothing of photos. So the figures show what the stages do, not how good
photos are. Writes docs/images/corpus_scores.png and benchmarks/corpus_on_photos.json.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from eval.files import write_json
from training.corpus.engine import read_report
from training.corpus.manifest import verify

ROOT = Path(__file__).parents[1]
SHARED = ROOT / ".." / "shared" / "data"
IMAGES = {"photos": 1000, "emoji": 1500, "scenes": 300}
CAPTIONS = 2  # of each image and language


def cut(table: pa.Table, images: int, columns: dict[str, str]) -> list[dict[str, Any]]:
    """The first rows, with `CAPTIONS` captions in each language."""
    rows = table.slice(0, images).to_pylist()
    texts = {language: [as_list(row[column])[:CAPTIONS] for row in rows] for language, column in columns.items()}
    return [{"image": row["image"], **{name: texts[name][place] for name in texts}} for place, row in enumerate(rows)]


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def write_sources(folder: Path) -> None:
    """photos, emoji, scenes and mixed-up, each as one parquet file with columns image, en, zh; and the guard list."""
    shared = {"en": "caption_en", "zh": "caption_zh"}
    photos = cut(pq.read_table(SHARED / "flickr8k_cn_train.parquet"), IMAGES["photos"], shared)
    emoji = cut(pq.read_table(SHARED / "emoji_bilingual.parquet"), IMAGES["emoji"], shared)
    command = [sys.executable, "-m", "training.scenes", str(folder / "drawn"), "--train", str(2 * IMAGES["scenes"])]
    sizes = ["--twins", "2", "--validation", "8", "--test", "40", "--task-size", "8", "--seed", "5"]
    subprocess.run([*command, *sizes], check=True, cwd=ROOT, capture_output=True)
    drawn = pq.read_table(next((folder / "drawn").glob("train-*")))
    both = cut(drawn, 2 * IMAGES["scenes"], {"en": "captions_en", "zh": "captions_zh"})
    scenes, others = both[: IMAGES["scenes"]], both[IMAGES["scenes"] :]
    texts = [{name: row[name] for name in ("en", "zh")} for row in others]
    random.Random(0).shuffle(texts)
    mixed = [{"image": row["image"], **wrong} for row, wrong in zip(others, texts, strict=True)]
    for name, rows in {"photos": photos, "emoji": emoji, "scenes": scenes, "mixed-up": mixed}.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    shutil.copy(SHARED / "flickr8k_cn_val.parquet", folder / "guard.parquet")


def config(folder: Path, model: str) -> dict[str, Any]:
    entries = []
    for name, licence in (("photos", "research only"), ("emoji", None), ("scenes", "apache-2.0")):
        for language in ("en", "zh"):
            entry = {"name": f"{name}-{language}", "adapter": "parquet", "files": [str(folder / f"{name}.parquet")]}
            entries.append(entry | {"image": "image", "text": language, "language": language, "licence": licence})
    return {
        "output": str(folder / "corpus"),
        "executor": {"workers": 2},
        "sources": {"rows_per_part": 1000, "list": entries},
        "clean": {"min_characters": {"zh": 2}, "guard": [str(folder / "guard.parquet")]},
        "score": {"model": model, "threshold": 0.25, "batch_size": 128},
        "shards": {"bytes": 2**22, "zh_share": 0.5},
        "tokenizer": {"vocab_size": 4000},
    }


def run(folder: Path, model: str) -> dict[str, Any]:
    """Runs all stages; returns seconds and outcomes of each."""
    write_sources(folder)
    settings = config(folder, model)
    for right in settings["sources"]["list"][4:]:
        mixed = {"name": f"mixed-up-{right['language']}", "files": [str(folder / "mixed-up.parquet")]}
        settings["sources"]["list"].append(right | mixed)
    file = folder / "corpus.yaml"
    file.write_text(yaml.safe_dump(settings, allow_unicode=True))
    found: dict[str, Any] = {}
    for stage in ("sources", "clean", "score", "shards", "tokenizer"):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "training.corpus", stage, "--config", str(file)], check=True, cwd=ROOT)
        report = read_report(folder / "corpus" / stage)
        seconds = round(time.perf_counter() - start, 1)
        found[stage] = {
            "wall_seconds": seconds,
            "outcomes": report.counts.outcomes(),
            "counts": report.counts.as_dict(),
        }
    found["tokenizer"]["measured"] = report.extra
    assert not verify(folder / "corpus" / "shards")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "runs" / "quickstart" / "nano" / "model"))
    parser.add_argument("--work", type=Path, help="keep the corpus in this new folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(folder, options.model)
        images = ROOT / "docs" / "images"
        images.mkdir(exist_ok=True)
        shutil.copy(folder / "corpus" / "score" / "histogram.png", images / "corpus_scores.png")
        card = (folder / "corpus" / "shards" / "README.md").read_text(encoding="utf-8")
    print(card[card.index("## Sources") : card.index("## Licences")])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    write_json(Path(__file__).with_suffix(".json"), {"commit": commit, "model": "quickstart's nano", "stages": found})


if __name__ == "__main__":
    main()
