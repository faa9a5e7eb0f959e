"""The pipeline on a messy corpus whose truth is known: no fault passes, no good row is lost, every loss has its reason,
totals add up; the same from every executor, after any kill, and nothing is done twice."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.training.corpus.messy import KEPT, Messy, build, expected, needed
from tests.training.corpus.messy_check import differences, found
from tests.training.corpus.messy_faults import BOMBS, FAULTS, UNUSUAL
from tests.training.corpus.messy_pictures import drawn, encode, real
from training.corpus.__main__ import main
from training.corpus.engine import read_report
from training.corpus.rows import parts

SHARED = Path(__file__).parents[4] / "shared"
DRAWN_ROWS, REAL_ROWS = 600, 1500


def configured(messy: Messy, output: Path, **changes: Any) -> Path:
    """The configuration of the corpus with another output, and sections changed."""
    values = yaml.safe_load(messy.config.read_text(encoding="utf-8")) | {"output": str(output)}
    for section, settings in changes.items():
        values[section] = values[section] | settings
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command line in a session of its own, so that a signal to the group reaches all that it starts."""
    command = [sys.executable, "-m", "training.corpus", *arguments, "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def run(config: Path, *arguments: str, status: int = 0) -> str:
    process = start(config, *arguments)
    said, complained = process.communicate(timeout=300)
    assert process.returncode == status, said + complained
    return said + complained


def digests(output: Path) -> dict[str, str]:
    """Of everything that the stages made: rows, shards, counts, reports; not of datatrove's own notes. The card names
    the folder that it is in."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and ".tasks" not in path.parts]
    return {
        str(path.relative_to(output)): hashlib.sha256(
            path.read_bytes().replace(str(output).encode(), b"OUTPUT") if path.suffix == ".md" else path.read_bytes()
        ).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Messy:
    folder = tmp_path_factory.mktemp("noise")
    return build(folder, drawn(**needed(DRAWN_ROWS), seed=0), DRAWN_ROWS)


@pytest.fixture(scope="module")
def finished(noise: Messy) -> Path:
    """The output of one undisturbed run with two workers on the machine."""
    output = noise.config.parent / "undisturbed"
    run(configured(noise, output), "all")
    return output


# ---- The truth itself


def test_the_corpus_has_all_it_says(noise: Messy) -> None:
    reasons = Counter(outcome for row in noise.truth for outcome in row.outcomes)
    assert {row.source for row in noise.truth} == {
        *("photos-en", "photos-zh", "emoji-en", "emoji-zh", "objects-en", "镜像-en", "web-zh")
    }
    assert len({row.id for row in noise.truth}) == len(noise.truth) >= DRAWN_ROWS
    whats = {row.what.split("; ")[0] for row in noise.truth}
    assert whats >= {what for what, *_ in FAULTS + BOMBS} | set(UNUSUAL)
    assert min(reasons[reason] for reason in ("duplicate", "evaluation_image", "invalid_utf8", "wrong_language")) > 10
    # Copies in the other language, and copies of what other rules drop, are kept.
    kept = Counter(row.what.split("; ")[0] for row in noise.truth if row.outcomes == (KEPT,))
    assert kept["its twin of higher rank is no good"] and any("copy" in what for what in kept)


def test_the_same_settings_give_the_same_corpus(noise: Messy, tmp_path: Path) -> None:
    again = build(tmp_path / "again", drawn(**needed(DRAWN_ROWS), seed=0), DRAWN_ROWS)
    assert again.truth == noise.truth
    assert digests(tmp_path / "again" / "sources") == digests(noise.config.parent / "sources")


# ---- Every row


def test_every_row_becomes_what_it_must(noise: Messy, finished: Path) -> None:
    assert differences(noise.truth, finished) == []


def test_every_row_of_real_pictures_becomes_what_it_must(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED} (real photos and emoji), which is not part of the project")
    messy = build(tmp_path, real(SHARED, **needed(REAL_ROWS), seed=0), REAL_ROWS)
    # Real twins: drawings of one source that are the same to the pixel, not made by us.
    assert sum(KEPT in row.outcomes and len(row.outcomes) > 1 for row in messy.truth) > 90
    run(messy.config, "sources")
    run(messy.config, "clean")
    assert differences(messy.truth, tmp_path / "corpus") == []


def test_how_the_work_is_cut_changes_nothing(noise: Messy, finished: Path) -> None:
    """Other parts, other buckets, one process: the same rows for the same reasons, and of the same twins."""
    output = noise.config.parent / "cut"
    changes = {"sources": {"rows_per_part": 41}, "clean": {"rows_per_match": 30}}
    config = configured(noise, output, **changes)
    for stage in ("sources", "clean"):
        main([stage, "--config", str(config), "--workers", "1"])
    assert len(parts(output / "clean" / "kept")) > 1.5 * len(parts(finished / "clean" / "kept"))
    became = [{row["id"]: (row["reason"], row["twin"]) for row in found(folder)} for folder in (output, finished)]
    assert became[0] == became[1]


def small(folder: Path, images: list[bytes], texts: list[str] | None = None) -> Path:
    """A source "s" of these images in parts of ten rows, made and cleaned here; returns the output."""
    texts = [f"picture number {number}" for number in range(len(images))] if texts is None else texts
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "text": pa.array(texts)}), folder / "s.parquet")
    entry = {"name": "s", "adapter": "parquet", "files": [str(folder / "s.parquet")], "language": "en"}
    values = {"output": str(folder / "corpus"), "sources": {"rows_per_part": 10, "list": [entry]}, "clean": {}}
    (folder / "corpus.yaml").write_text(yaml.safe_dump(values))
    for stage in ("sources", "clean"):
        main([stage, "--config", str(folder / "corpus.yaml"), "--workers", "1"])
    return folder / "corpus"


def test_parts_without_a_good_row(tmp_path: Path) -> None:
    good = encode(Image.linear_gradient("L"), "PNG")
    output = small(tmp_path, [b"no image"] * 15 + [good] + [b""] * 4)
    assert read_report(output / "clean").counts.outcomes() == {"not_an_image": 15, KEPT: 1}
    assert read_report(output / "sources").counts.outcomes() == {KEPT: 16, "no_image": 4}


def test_a_source_without_rows(tmp_path: Path) -> None:
    output = small(tmp_path, [], [])
    assert read_report(output / "clean").counts.total() == 0


def test_a_thousand_white_images_are_one(tmp_path: Path) -> None:
    white = encode(Image.new("L", (24, 24), "white"), "PNG")
    others = [encode(Image.new("RGB", (side, side + 9), "white"), "JPEG") for side in range(20, 220)]
    output = small(tmp_path, [white] * 800 + others)
    assert read_report(output / "clean").counts.outcomes() == {"duplicate": 799, "near_duplicate": 200, KEPT: 1}


def test_the_check_sees_what_is_wrong(noise: Messy, finished: Path) -> None:
    """A truth that differs from the corpus in one row of each kind is noticed."""

    def after(change: Callable[[Any], bool], **changes: Any) -> list[str]:
        place = next(i for i, row in enumerate(noise.truth) if change(row))
        truth = list(noise.truth)
        truth[place] = dataclasses.replace(truth[place], **changes)
        return differences(truth, finished)

    assert after(lambda row: row.outcomes == (KEPT,), outcomes=("short_text",))
    assert after(lambda row: "short_text" in row.outcomes, outcomes=(KEPT,))
    assert after(lambda row: row.outcomes == (KEPT,), text="another text")
    assert after(lambda row: row.outcomes == (KEPT,), image_hash="0" * 64)
    assert after(lambda row: row.twins, twins="of its own")
    assert differences(noise.truth[1:], finished)


def test_shards_hold_the_rows_that_were_kept(noise: Messy, finished: Path) -> None:
    kept = [row for row in found(finished) if row["reason"] == KEPT]
    texts: Counter[str] = Counter()
    for shard in (finished / "shards").glob("train-*.parquet"):
        for row in pq.read_table(shard).to_pylist():
            image = hashlib.sha256(row["image"]["bytes"]).hexdigest()
            texts.update((image, language, text) for language in ("en", "zh") for text in row[f"captions_{language}"])
    assert texts == Counter((row["image_hash"], row["language"], row["text"]) for row in kept)
    assert read_report(finished / "shards").counts.total(KEPT) == len(kept)


# ---- Whoever runs it, however often


def test_ray_makes_the_same_bytes(noise: Messy, finished: Path) -> None:
    pytest.importorskip("ray", reason="the extra corpus-ray is not installed")
    output = noise.config.parent / "ray"
    config = configured(noise, output)
    run(config, "all", "--executor", "ray", "--workers", "2")
    assert digests(output) == digests(finished)


def phases(output: Path) -> list[str]:
    """Folders with tasks of their own, in the order in which they were begun."""
    marks = [path for path in output.rglob("settings.json") if (path.parent / "counts").is_dir()]
    return [str(path.parent.relative_to(output)) for path in sorted(marks, key=lambda path: path.stat().st_mtime_ns)]


def test_killed_in_every_phase(noise: Messy, finished: Path) -> None:
    output = noise.config.parent / "killed"
    config = configured(noise, output)
    killed = []
    for place, phase in enumerate(phases(finished)):
        # Of one phase when it has begun, of the next when a task of it is done.
        begun = output / phase / ("counts" if place % 2 else "settings.json")
        process = start(config, "all")
        while process.poll() is None:
            if begun.is_file() or (begun.is_dir() and any(begun.glob("*.json"))):
                time.sleep(0.03 * place % 0.1)  # not always at the same place of a task
                os.killpg(process.pid, signal.SIGKILL)
                killed.append(phase)
                break
            time.sleep(0.002)
        process.communicate()
    assert {"sources", "clean/measure", "clean", "shards/scatter", "shards/write"} <= {*killed}
    run(config, "all")
    assert digests(output) == digests(finished)
    assert differences(noise.truth, output) == []


def test_a_second_run_does_nothing(noise: Messy, finished: Path) -> None:
    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in finished.rglob("part-*") if ".tasks" not in path.parts}

    parts, whole = times(), digests(finished)
    run(finished.with_suffix(".yaml"), "all")
    assert times() == parts and digests(finished) == whole


@pytest.mark.parametrize(
    "section, change",
    [
        ("clean", {"max_aspect_ratio": 2.0}),
        ("clean", {"guard": []}),
        ("sources", {"rows_per_part": 7}),
        ("shards", {"bytes": 1_000_000}),
    ],
)
def test_other_settings_are_refused(noise: Messy, finished: Path, section: str, change: dict[str, Any]) -> None:
    before = digests(finished)
    config = configured(noise, finished, **{section: change})
    try:
        message = run(config, section, status=2)
    finally:
        configured(noise, finished)
    assert "other settings" in message and next(iter(change)) in message
    assert digests(finished) == before


def test_twins_are_settled_by_priority_and_language() -> None:
    """The truth's own rule, by hand: a group of three sources in two languages."""
    from tests.training.corpus.messy import Item, Source
    from tests.training.corpus.messy_texts import SHORT, Text

    def source(name: str, language: str, priority: int, *items: Item) -> Source:
        return Source(name, language, priority, list(items), lambda place, source: {})

    dog, cat = (Item(b"", (Text("some text"),), "", shows=shown) for shown in ("dog", "cat"))
    sources = [
        source("a", "en", 1, dog, cat),
        source("b", "en", 2, dog, dog, Item(b"", (SHORT["en"],), "", shows="cat")),
        source("c", "zh", 3, dog),
    ]
    outcomes = {row.id: row.outcomes for row in expected(sources)}
    lost, any_of_two = ("duplicate", "near_duplicate"), (KEPT, "duplicate", "near_duplicate")
    assert outcomes == {
        **{"a/0/0": lost, "a/0/1": (KEPT,), "b/0/0": any_of_two, "b/0/1": any_of_two},
        **{"b/0/2": ("short_text",), "c/0/0": (KEPT,)},
    }
