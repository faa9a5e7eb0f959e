"""The embedded default data set: procedurally drawn scenes with captions in English and Chinese.

    python -m training.scenes OUT_DIR [--train 30000 --validation 1000 --test 1000 --task-size 500 --seed 0 --workers 2]

writes parquet that `datasets.load_dataset(OUT_DIR)` reads (splits twins, train, validation, test) and four fine-grained
tasks over the test images, `datasets.load_dataset(OUT_DIR, "attribute")` and so on (training/scene_tasks.py says how
they are made). The world is in training/scene_world.py, the language in training/scene_captions.py; training scenes
come in families of look-alikes, which training/scene_families.py makes.

Splits. Twins, training and validation scenes hold none of the 16 (colour, shape) pairs of `scene_world.HELD_OUT_PAIRS`;
every test scene holds at least one. No two test scenes have the same full description (`scene_captions.full_facts`:
everything but the background), so captions 0 and 1 of a test image, which describe it in full, fit one image only:
retrieval with them has one right answer.

The same settings give the same bytes, whatever the number of workers: every family, and every scene of the other
splits, has its own seed.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from datasets import Features, Image, List, Value
from tqdm import tqdm

from training.scene_captions import (
    ORDERED_SHARE,
    ZH_BACKGROUNDS,
    ZH_COLOURS,
    ZH_SHAPES,
    ZH_SIZES,
    ZH_TEXTURES,
    caption_scene,
    caption_twin,
    full_facts,
)
from training.scene_families import FAMILY_SIZE, sample_family, sample_twins
from training.scene_tasks import TASKS, TaskRow, build_task
from training.scene_world import HELD_OUT_PAIRS, Scene, draw_scene, sample_scene

VERSION = 3  # of the pictures and words: raise it when the same seed gives other data
SPLITS = ("twins", "train", "validation", "test")
MIN_IMAGE_SIZE = 48  # pixels; below, the textures of small objects cannot be told apart
ROWS_PER_FILE = 10_000
ROWS_PER_JOB = 250  # one job of a worker, and one row group
MAX_ATTEMPTS = 1_000  # to find a test scene that differs from all before

SPLIT_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "captions_en": List(Value("string")),
        "captions_zh": List(Value("string")),
        "scene": Value("string"),
    }
)
TASK_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "candidates_en": List(Value("string")),
        "candidates_zh": List(Value("string")),
        "label": Value("int64"),
        "factor": Value("string"),
    }
)


@dataclass(frozen=True)
class ScenesConfig:
    """Size and seed of a scenes data set. Raises ValueError for what cannot be written."""

    twins: int = 8_000
    """Number of scenes of the first lesson, on relations: in pairs (training/scene_families.py)."""
    train: int = 30_000
    """Number of training scenes, in families of four (training/scene_families.py)."""
    validation: int = 1_000
    """Number of validation scenes: fresh scenes like the training ones."""
    test: int = 1_000
    """Number of test scenes: each holds a (colour, shape) pair never seen in training."""
    task_size: int = 500
    """Number of questions in each of the four fine-grained tasks."""
    image_size: int = 64
    """Width and height of the images in pixels, at least 48."""
    seed: int = 0
    """The same seed gives the same files."""
    workers: int = 2
    """Number of processes that draw."""

    def __post_init__(self) -> None:
        for field in fields(self):
            least = {"image_size": MIN_IMAGE_SIZE, "seed": 0}.get(field.name, 1)
            value = getattr(self, field.name)
            if value < least:
                raise ValueError(f"{field.name} is {value}, but must be at least {least}")


@dataclass(frozen=True)
class SceneId:
    """Which scene of a data set; with the seed it determines the scene. `attempt`: how many draws were rejected."""

    split: str
    index: int
    attempt: int = 0

    @property
    def name(self) -> str:
        """The `image_id` column."""
        return f"{self.split}-{self.index:06d}"

    def scene(self, seed: int) -> Scene:
        """The scene itself."""
        if self.split == "train":
            return _family(seed, self.index // FAMILY_SIZE)[self.index % FAMILY_SIZE]
        if self.split == "twins":
            return sample_twins(random.Random(f"twins/{seed}/{self.index // 2}"))[self.index % 2]
        rng = random.Random(f"scene/{seed}/{self.split}/{self.index}/{self.attempt}")
        return sample_scene(rng, unseen=self.split == "test")


@lru_cache(maxsize=1)  # the scenes of a family are asked for one after the other
def _family(seed: int, index: int) -> list[Scene]:
    return sample_family(random.Random(f"family/{seed}/{index}"))


def write_scenes(out_dir: str | Path, config: ScenesConfig) -> None:
    """Write the data set to `out_dir`, which must not exist or be empty. It appears there complete or not at all.

    Raises:
        ValueError: `out_dir` holds something already, or the test scenes asked for cannot all differ or be asked enough
        about.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(
            f"{out_dir} exists and is not an empty folder: remove it or choose another place for the scenes"
        )
    unfinished = out_dir.parent / f".{out_dir.name}.unfinished-{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        _write_all(unfinished, config)
        if out_dir.exists():
            out_dir.rmdir()
        unfinished.rename(out_dir)
    except BaseException:  # an interrupt too: nothing half-written stays
        shutil.rmtree(unfinished)
        raise


def _write_all(folder: Path, config: ScenesConfig) -> None:
    test_ids = list(_distinct_test_ids(config))
    ids = {
        split: [SceneId(split, index) for index in range(getattr(config, split))] for split in SPLITS if split != "test"
    }
    ids["test"] = test_ids
    tasks = _build_tasks(test_ids, config)  # before the drawing, so that impossible settings fail at once
    total = sum(map(len, ids.values())) + sum(map(len, tasks.values()))
    with _parallel_map(config.workers) as run, tqdm(total=total, unit="scene", desc="scenes") as progress:
        for split in SPLITS:
            jobs = [ids[split][i : i + ROWS_PER_JOB] for i in range(0, len(ids[split]), ROWS_PER_JOB)]
            tables = run(partial(_split_table, seed=config.seed, image_size=config.image_size), jobs)
            _write_files(folder, split, len(ids[split]), _counted(tables, progress))
        (folder / "tasks").mkdir()
        for name, rows in tasks.items():
            jobs = [rows[i : i + ROWS_PER_JOB] for i in range(0, len(rows), ROWS_PER_JOB)]
            tables = run(partial(_task_table, image_size=config.image_size), jobs)
            _write_file(folder / "tasks" / f"{name}.parquet", TASK_FEATURES, _counted(tables, progress))
    manifest = _manifest(config)
    (folder / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(config), encoding="utf-8")


def _distinct_test_ids(config: ScenesConfig) -> Iterator[SceneId]:
    """One id for each test scene, such that no two scenes share their full description."""
    seen = set()
    for index in range(config.test):
        for attempt in range(MAX_ATTEMPTS):
            scene_id = SceneId("test", index, attempt)
            facts = full_facts(scene_id.scene(config.seed))
            if facts not in seen:
                break
        else:
            raise ValueError(
                f"found only {index} test scenes with different descriptions: test is {config.test}, lower it"
            )
        seen.add(facts)
        yield scene_id


def _build_tasks(test_ids: Sequence[SceneId], config: ScenesConfig) -> dict[str, list[tuple[str, TaskRow]]]:
    """The questions of each task, with the image_id of their scene."""
    names = {scene_id.scene(config.seed): scene_id.name for scene_id in test_ids}
    tasks = {}
    for name in TASKS:
        rows = build_task(name, list(names), config.task_size, random.Random(f"task/{config.seed}/{name}"))
        tasks[name] = [(names[row.scene], row) for row in rows]
    return tasks


@contextmanager
def _parallel_map(workers: int) -> Iterator[Callable[..., Iterable[pa.Table]]]:
    """`map` over that many processes, results in order."""
    if workers == 1:
        yield map
        return
    executor = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn")
    )  # fork is unsafe under threads (torch, arrow)
    try:
        yield executor.map
    finally:
        executor.shutdown(cancel_futures=True)


def _split_table(scene_ids: Sequence[SceneId], *, seed: int, image_size: int) -> pa.Table:
    """The finished rows of some scenes of a split."""
    rows = []
    for scene_id in scene_ids:
        scene = scene_id.scene(seed)
        rng = random.Random(f"captions/{seed}/{scene_id.name}")
        if scene_id.split == "twins":
            captions_en, captions_zh = caption_twin(scene, rng)
        else:
            ordered = ORDERED_SHARE if scene_id.split == "train" else 0.0
            captions_en, captions_zh = caption_scene(scene, rng, ordered=ordered)
        rows.append(
            {
                **_image_columns(scene_id.name, scene, image_size),
                "captions_en": captions_en,
                "captions_zh": captions_zh,
                "scene": scene.to_json(),
            }
        )
    return pa.Table.from_pylist(rows, schema=SPLIT_FEATURES.arrow_schema)


def _task_table(named_rows: Sequence[tuple[str, TaskRow]], *, image_size: int) -> pa.Table:
    """The finished rows of some questions of a task."""
    rows = [
        {
            **_image_columns(name, row.scene, image_size),
            "candidates_en": row.candidates_en,
            "candidates_zh": row.candidates_zh,
            "label": row.label,
            "factor": row.factor,
        }
        for name, row in named_rows
    ]
    return pa.Table.from_pylist(rows, schema=TASK_FEATURES.arrow_schema)


def _image_columns(name: str, scene: Scene, image_size: int) -> dict[str, Any]:
    png = io.BytesIO()
    draw_scene(scene, image_size).save(png, format="PNG")
    return {"image": {"bytes": png.getvalue(), "path": f"{name}.png"}, "image_id": name}


def _counted(tables: Iterable[pa.Table], progress: tqdm) -> Iterator[pa.Table]:
    for table in tables:
        yield table
        progress.update(len(table))


def _write_files(folder: Path, split: str, rows: int, tables: Iterator[pa.Table]) -> None:
    """SPLIT-00000-of-000NN.parquet and so on, ROWS_PER_FILE rows each."""
    files = -(-rows // ROWS_PER_FILE)
    for number in range(files):
        path = folder / f"{split}-{number:05d}-of-{files:05d}.parquet"
        _write_file(path, SPLIT_FEATURES, islice(tables, ROWS_PER_FILE // ROWS_PER_JOB))


def _write_file(path: Path, features: Features, tables: Iterable[pa.Table]) -> None:
    """One row group per table. The images are PNG already: only the text shrinks."""
    with pq.ParquetWriter(path, features.arrow_schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _settings(config: ScenesConfig) -> dict[str, int]:
    """What the data depend on: not the number of workers."""
    return {name: value for name, value in asdict(config).items() if name != "workers"}


def _manifest(config: ScenesConfig) -> dict[str, Any]:
    """What the data set is made of; `vocabulary` has the standard word for each value, as in the tasks."""
    chinese = {
        "shape": ZH_SHAPES,
        "colour": ZH_COLOURS,
        "size": ZH_SIZES,
        "texture": ZH_TEXTURES,
        "background": {name: (word,) for name, word in ZH_BACKGROUNDS.items()},
    }
    vocabulary = {
        attribute: {value: {"en": value, "zh": words[0]} for value, words in values.items() if value is not None}
        for attribute, values in chinese.items()
    }
    return {
        "version": VERSION,
        "settings": _settings(config),
        "tasks": list(TASKS),
        "held_out_pairs": [{"colour": colour, "shape": shape} for colour, shape in HELD_OUT_PAIRS],
        "vocabulary": vocabulary,
    }


def _card(config: ScenesConfig) -> str:
    """README.md of the data set, with the header that tells `datasets` where splits and tasks are."""
    header = ["---", "language:", "- en", "- zh", "license: apache-2.0", "pretty_name: M2-Encoder scenes", "configs:"]
    header += ["- config_name: default", "  data_files:"]
    for split in SPLITS:
        header += [f"  - split: {split}", f"    path: {split}-*.parquet"]
    for name in TASKS:
        header += [f"- config_name: {name}", "  data_files:", "  - split: test", f"    path: tasks/{name}.parquet"]
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in _settings(config).items())
    pairs = ", ".join(f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS)
    return "\n".join(header) + CARD_TEXT.format(version=VERSION, flags=flags, pairs=pairs, **_settings(config))


CARD_TEXT = """
---

# M2-Encoder scenes, version {version}

Procedurally drawn pictures of 1 to 4 coloured shapes with captions in English and Chinese. {train} training images,
{twins} of a first lesson, {validation} validation and {test} test images of {image_size} x {image_size} pixels, seed
{seed}. Made by

    python -m training.scenes OUT_DIR {flags}

The same command gives the same bytes (with the same versions of pillow and pyarrow).

**Columns.** `image`, `image_id`, `captions_en` and `captions_zh` (captions at the same index state the same facts in
independent words; all but the last describe the image in full), `scene` (JSON: background, and of each object shape,
colour, size, texture and the middle (x, y) of its bounding box in fractions of the side). Articles and number words are
exact: "a red star" means exactly one. In full descriptions medium size and solid filling mostly go unsaid.

**Families.** Training images 4n to 4n + 3 share background, colours and numbers of objects; shapes, sizes, textures and
relations tell them apart. They are hard negatives for each other if a batch keeps them together.

**Twins.** The split `twins` is a first lesson on relations: images 2n and 2n + 1 show two plain objects of the same
looks in opposite relations, and captions say the colours and the relation. In training captions relations are mostly
told in a fixed order of the colours (three of four times, where both are named); elsewhere the order is left to chance.

**Splits.** Twins, training and validation images hold none of the (colour, shape) pairs held out; every test image
holds at least one, and no two test images have the same full description. Held out: {pairs}.

**Tasks.** `attribute`, `counting`, `combination` and `spatial`, {task_size} questions each over the test images:
`candidates_en` and `candidates_zh` are parallel and differ by one word, `label` is the index of the only true one,
`factor` says what was changed. `datasets.load_dataset(DIR, "attribute")`. Chance is 1 / number of candidates: 1/4 for
counting, 1/2 for the others.

`manifest.json` holds the settings, the pairs held out and the standard word of every value in both languages.
"""


def main(out_dir: tyro.conf.Positional[Path], config: Annotated[ScenesConfig, tyro.conf.arg(name="")]) -> None:
    """Write the scenes data set to OUT_DIR, a folder that does not exist yet or is empty."""
    write_scenes(out_dir, config)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
