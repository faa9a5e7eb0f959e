"""benchmarks/search.py measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss", reason="needs faiss: the search extra")

from benchmarks.search import INDEXES, compare, made_up, markdown, measure, sign_bits  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_the_guide_shows_what_was_measured():
    result = json.loads((ROOT / "benchmarks" / "search.json").read_text("utf-8"))
    assert markdown(result) in (ROOT / "docs" / "search.md").read_text("utf-8")


def test_recall_of_two_of_ten():
    """Exact search finds its own ten; an index that gives two of them for each query has a recall of 0.2."""
    exact = {"zh": np.arange(40).reshape(4, 10)}
    partly = np.concatenate([exact["zh"][:, :2], np.full((4, 8), -1)], axis=1)
    queries = {"zh": np.zeros((4, 3), dtype=np.float32)}
    assert measure(lambda _: exact["zh"], queries, exact)["recall_at_10"] == {"zh": 1.0}
    assert measure(lambda _: partly, queries, exact)["recall_at_10"] == {"zh": 0.2}


def test_all_indexes_of_a_small_collection():
    vectors, queries = made_up(2_000, 64, 20)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    found = compare("small", vectors, {"vectors": queries})["indexes"]
    assert set(INDEXES) <= set(found)
    recall = {title: row["recall_at_10"]["vectors"] for title, row in found.items()}
    assert recall["float32, exact"] == 1
    assert recall["int8"] > 0.9 > recall["binary"]
    assert recall["binary"] < recall["binary, 4x rescored with int8"] <= recall["binary, 40x rescored with int8"]
    size = {title: row["bytes_per_vector"] for title, row in found.items()}
    assert size["float32, exact"] == 4 * 64 and size["int8"] == 64 and size["binary"] < 20


def test_signs_by_hand():
    """Three bits: of eight corners, the nearest by Hamming distance; rescoring puts the best by inner product first."""
    corners = np.array([[a, b, c, 1, 1, 1, 1, 1] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)] * 2, np.float32)
    corners[8:, 0] *= 0.5
    search, size = sign_bits(corners, 1)
    best = search(np.array([[1, 1, 1, 1, 1, 1, 1, 1]], np.float32))[0]
    assert list(best[:2]) == [7, 15] and size == 1
