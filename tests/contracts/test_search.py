"""docs/search.py finds what exact search finds, on folders and parquet files, with each kind of index it names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from modeling_m2encoder.hub_folder import save_hub_folder
from tests.snippets import python

pytest.importorskip("faiss", reason="needs faiss: the search extra")

SCRIPT = Path(__file__).parents[2] / "docs" / "search.py"
QUERIES = ["a red circle", "红色的圆在蓝色方块的左边"]
KINDS = ["Flat", "SQ8", "HNSW32", "RaBitQ,Refine(SQ8)"]


@pytest.fixture
def hub(tiny_model, processor, tmp_path) -> Path:
    return save_hub_folder(tiny_model, processor, tmp_path / "hub")


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sides = rng.integers(20, 60, (40, 2))
    return [Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]


@pytest.fixture
def folder(pictures, tmp_path) -> Path:
    """Pictures in sub-folders, beside what is none."""
    for number, picture in enumerate(pictures):
        path = tmp_path / "photos" / f"day {number // 20}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    (tmp_path / "photos" / "notes.txt").write_text("nothing to see")
    return tmp_path / "photos"


@pytest.fixture
def parquet(pictures, tmp_path) -> Path:
    rows = {"title": ["x"] * len(pictures), "image": pictures}
    features = Features({"title": Value("string"), "image": ImageColumn()})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pictures.parquet")
    return tmp_path / "pictures.parquet"


def search(capsys, *words: object) -> dict[str, list[tuple[float, str]]]:
    """What the script prints: for each query the scores and names."""
    capsys.readouterr()
    python([str(SCRIPT), *map(str, words), *(word for query in QUERIES for word in ("--query", query))])
    found: dict[str, list[tuple[float, str]]] = {}
    for line in capsys.readouterr().out.splitlines():
        if hit := re.fullmatch(r"  (-?\d\.\d{3}) (.+)", line):
            found[next(reversed(found))].append((float(hit[1]), hit[2]))
        elif line in QUERIES:
            found[line] = []
    return found


@pytest.fixture
def exact(tiny_model, processor, pictures) -> dict[str, list[tuple[float, int]]]:
    """For each query the scores and numbers of the five best pictures, by torch."""
    with torch.no_grad():
        images = torch.cat(
            [tiny_model(**processor(images=each, return_tensors="pt")).image_embeds for each in pictures]
        )
        texts = tiny_model(**processor.tokenizer(QUERIES, padding=True, return_tensors="pt")).text_embeds
    best = (texts @ images.T).topk(5)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return {query: list(zip(*pair, strict=True)) for query, pair in zip(QUERIES, pairs, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_pictures_of_parquet_files(kind, hub, parquet, exact, tmp_path, capsys):
    index = tmp_path / "photos.index"
    found = search(capsys, hub, parquet, index, "--kind", kind)
    for query, best in exact.items():
        assert [score for score, _ in found[query]] == pytest.approx([score for score, _ in best], abs=2e-3)
        if kind in ("Flat", "HNSW32"):
            assert [name for _, name in found[query]] == [f"row {number}" for _, number in best]
    written = index.stat().st_mtime_ns
    assert search(capsys, hub, parquet, index) == found  # from the index, which is not written again
    assert index.stat().st_mtime_ns == written


def test_the_best_pictures_of_a_folder(hub, folder, exact, tmp_path, capsys):
    found = search(capsys, hub, folder, tmp_path / "photos.index", "--kind", "Flat")
    for query, best in exact.items():
        assert [Path(name).name for _, name in found[query]] == [f"{number:02}.png" for _, number in best]


def test_folders_of_the_same_name_are_not_confused(hub, pictures, tmp_path, capsys):
    """`datasets` caches what it has read; brackets and stars in names are names here, not patterns."""
    for number in (0, 1):
        (tmp_path / str(number) / "照片 [1]").mkdir(parents=True)
        pictures[number].save(tmp_path / str(number) / "照片 [1]" / "狗 *.png")
    scores = []
    for number in (0, 1):
        folder = tmp_path / str(number) / "照片 [1]"
        found = search(capsys, hub, folder, tmp_path / f"{number}.index", "--kind", "Flat")
        assert [name for _, name in found[QUERIES[0]]] == [str(folder / "狗 *.png")]
        scores.append([found[query][0][0] for query in QUERIES])
    assert scores[0] != scores[1]


def test_an_index_of_other_pictures_is_refused(hub, folder, tmp_path, capsys):
    search(capsys, hub, folder, tmp_path / "photos.index")
    (folder / "day 0" / "00.png").unlink()
    with pytest.raises(AssertionError, match="ended with 2"):
        search(capsys, hub, folder, tmp_path / "photos.index")
    assert "holds 40 vectors for 39 images" in capsys.readouterr().err


def test_it_can_be_copied():
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert not re.search(r"^(from|import) (eval|training|conversion|model_cards)\b", text, re.MULTILINE)
