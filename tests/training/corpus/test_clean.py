"""The stage "clean" on rows made by hand: every rule, their order, labels, captions of one image, and the report.

The whole of it, on thousands of rows with a known truth, is in test_messy.py.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.corpus import clean
from training.corpus.clean import REASONS, CleanSettings, judge_text
from training.corpus.config import CorpusConfig, ExecutorSettings
from training.corpus.engine import KEPT, Counts, Report, read_report, write_report
from training.corpus.rows import parts, read_rows, write_rows

RANDOM = np.random.default_rng(3)


def cloud(width: int = 80, height: int = 60) -> Image.Image:
    values = RANDOM.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def row(id: str, image: bytes, text: str, language: str = "en", image_id: str | None = None) -> dict[str, Any]:
    source = id.split("/")[0]
    return {
        **{"id": id, "source": source, "image_id": image_id or id, "image": {"bytes": image, "path": None}},
        **{"text": text, "language": language, "origin": "raw", "licence": "CC0"},
        "image_hash": hashlib.sha256(image).hexdigest(),
    }


def run(tmp_path: Path, rows: list[dict[str, Any]], per_part: int = 5, **settings: Any) -> Report:
    """As if the stage "sources" had written these rows."""
    output = tmp_path / "out"
    if not (output / "sources").exists():
        counts = Counts()
        for number, start in enumerate(range(0, len(rows), per_part)):
            path = output / "sources/rows" / f"part-{number:05d}-00000.parquet"
            write_rows(path, rows[start : start + per_part])
        for item in rows:
            counts.add(item["source"], item["language"], KEPT)
        write_report(output / "sources", Report("sources", 1, counts, {}, "made by hand"))
    return clean.run(CorpusConfig(output, 0, ExecutorSettings("local", 1), {"clean": settings}))


def outcomes(tmp_path: Path) -> dict[str, str]:
    kept = {item["id"]: KEPT for item in stream(tmp_path, "kept")}
    return kept | {item["id"]: item["reason"] for item in stream(tmp_path, "dropped")}


def stream(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    return [item for part in parts(tmp_path / "out/clean" / name) for item in read_rows(part)]


def test_every_reason(tmp_path: Path) -> None:
    guarded, first = cloud(), cloud()
    (tmp_path / "guarded.png").write_bytes(encoded(guarded))
    animation = encoded(cloud(), "WEBP", save_all=True, append_images=[cloud() for _ in range(4)])
    good = encoded(cloud())
    rows = {
        KEPT: row("a/0/0", encoded(first), "a good text"),
        "broken_text": row("a/0/1", good, "caf\ufffd in the rain"),
        "short_text": row("a/0/2", good, " dog \n"),
        "wrong_language": row("a/0/3", good, "一只狗在跑步"),
        "too_many_bytes": row("a/0/4", bytes(60_001), "a good text"),
        "not_an_image": row("a/0/5", b"<html>", "a good text"),
        "too_many_pixels": row("a/0/6", encoded(Image.new("1", (300, 300))), "a good text"),
        "too_many_frames": row("a/0/7", animation, "a good text"),
        "aspect_ratio": row("a/0/8", encoded(cloud(181, 60)), "a good text"),
        "broken_image": row("a/0/9", encoded(cloud(), "JPEG")[:600], "a good text"),
        "evaluation_image": row("a/0/10", encoded(guarded, "JPEG", quality=60), "a good text"),
        "duplicate": row("b/0/0", encoded(first), "another text"),
        "near_duplicate": row("b/0/1", encoded(first, "JPEG", quality=40), "another text"),
    }
    assert set(rows) == {KEPT, *REASONS}
    limits = {"max_bytes": 60_000, "max_pixels": 80_000, "max_frames": 4}
    report = run(tmp_path, list(rows.values()), guard=[str(tmp_path / "guarded.png")], **limits)
    assert outcomes(tmp_path) == {item["id"]: reason for reason, item in rows.items()}
    assert report.counts.outcomes() == dict.fromkeys(sorted([KEPT, *REASONS]), 1)
    (kept,) = stream(tmp_path, "kept")
    assert kept == {**kept, **rows[KEPT], "width": 80, "height": 60}
    dropped = {item["id"]: item for item in stream(tmp_path, "dropped")}
    assert {id for id, item in dropped.items() if item["twin"]} == {"b/0/0", "b/0/1"}
    assert dropped["b/0/1"] == {
        **{"id": "b/0/1", "source": "b", "language": "en", "reason": "near_duplicate", "twin": "a/0/0"}
    }


@pytest.mark.parametrize(
    "text, language, settings, expected",
    [
        ("a dog", "en", {}, None),
        ("dog", "en", {}, "short_text"),
        ("自行车", "zh", {}, "short_text"),  # the paper's rule, read literally
        ("自行车", "zh", {"min_characters": {"zh": 2}}, None),
        ("dog", "en", {"min_characters": {"zh": 2}}, "short_text"),  # 5 where nothing is said
        ("\u3000狗 ", "zh", {"min_characters": {"zh": 2}}, "short_text"),
        ("", "en", {"min_characters": {"en": 1}}, "short_text"),
        ("a dog in the park", "zh", {}, "wrong_language"),
        ("a\x00dog", "en", {}, "broken_text"),
    ],
)
def test_texts(text: str, language: str, settings: dict[str, Any], expected: str | None) -> None:
    assert judge_text(text, language, CleanSettings(**settings)) == (language, expected)


def test_relabelled(tmp_path: Path) -> None:
    settings = CleanSettings(wrong_language="relabel")
    assert judge_text("a dog in the park", "zh", settings) == ("en", None)
    assert judge_text("公園のベンチに座っている", "zh", settings) == ("zh", "wrong_language")
    image = cloud()
    rows = [row("a/0/0", encoded(image), "a dog in the park"), row("a/0/1", encoded(image), "another dog here", "zh")]
    run(tmp_path, rows, wrong_language="relabel")
    # It counts as English from there on, and as the twin that it is.
    assert outcomes(tmp_path) == {"a/0/0": KEPT, "a/0/1": "duplicate"}


def test_duplicates_are_of_one_language_and_not_captions_of_one_image(tmp_path: Path) -> None:
    image = encoded(cloud())
    rows = [
        row("a/0/0/0", image, "a dog runs", image_id="0/0"),
        row("a/0/0/1", image, "the dog is running", image_id="0/0"),
        row("a/0/0/2", image, "a dog runs", image_id="0/0"),
        row("b/0/0", image, "一只狗在跑步", "zh"),
        row("c/0/0", image, "dog, running", image_id="0/0"),  # the same id in another source is another image
    ]
    run(tmp_path, rows, per_part=2)
    assert outcomes(tmp_path) == {
        **{"a/0/0/0": KEPT, "a/0/0/1": KEPT, "a/0/0/2": "duplicate", "b/0/0": KEPT, "c/0/0": "duplicate"}
    }


def test_a_row_that_goes_takes_no_other_along(tmp_path: Path) -> None:
    image = encoded(cloud())
    rows = [
        row("a/0/0", image, "dog"),
        row("a/0/1", image, "ein Hund läuft über die grüne Wiese"),
        row("b/0/0", image, "a dog"),
    ]
    run(tmp_path, rows)
    assert outcomes(tmp_path) == {"a/0/0": "short_text", "a/0/1": "wrong_language", "b/0/0": KEPT}


def test_parts_without_a_good_row(tmp_path: Path) -> None:
    rows = [row(f"a/0/{number}", b"no image", "a good text") for number in range(4)]
    report = run(tmp_path, rows, per_part=2)
    assert report.counts.outcomes() == {"not_an_image": 4} and stream(tmp_path, "kept") == []


def test_the_number_of_buckets_changes_no_byte(tmp_path: Path) -> None:
    images = [cloud() for _ in range(12)]
    rows = [row(f"a/0/{n}", encoded(images[n % 12], "JPEG", quality=30 + n), "a good text") for n in range(40)]
    digests = []
    for per_match in (3, 1000):
        place = tmp_path / str(per_match)
        run(place, rows, rows_per_match=per_match)
        files = sorted((place / "out/clean").glob("*/part-*.parquet"))
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1] and len(digests[0]) == 17
    assert not list((tmp_path / "3/out/clean").rglob("*.arrow"))  # signatures are scratch


def test_a_second_run_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("a/0/0", encoded(cloud()), "a good text")]
    first = run(tmp_path, rows)
    monkeypatch.setattr(clean, "measure", None)
    assert run(tmp_path, rows) == first == read_report(tmp_path / "out/clean")
    with pytest.raises(ValueError, match="max_aspect_ratio was 3.0, is 2.0"):
        run(tmp_path, rows, max_aspect_ratio=2.0)


def test_parts_that_were_changed_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"a/0/{number}", encoded(cloud()), "a good text") for number in range(6)]
    monkeypatch.setattr(clean.MatchTask, "__call__", lambda self, number: 1 / 0)
    with pytest.raises(RuntimeError, match="division by zero"):
        run(tmp_path, rows, per_part=3)
    monkeypatch.undo()
    measured = tmp_path / "out/clean/measure/rows/part-00000.parquet"
    pq.write_table(pq.read_table(measured).slice(1), measured)
    with pytest.raises(RuntimeError, match="argument"):  # zip(strict=True): rows and what was measured of them
        run(tmp_path, rows, per_part=3)
