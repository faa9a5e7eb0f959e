"""The picture: the right images in the right order, with Chinese characters that are really drawn."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image

from eval import picture
from eval.data import open_table
from eval.picture import cjk_font, retrieval_picture


@pytest.fixture
def table(write):
    return open_table([write("a.parquet", ["red", "green", "blue"])])


def test_best_images_in_order_and_drawn(colour_encoder, table, tmp_path):
    output = tmp_path / "new" / "found.png"
    order = retrieval_picture(colour_encoder, table, ["red red green", "蓝色"], output, top=2)
    assert order == [[0, 1], [2, 0]]
    assert [item.name for item in output.parent.iterdir()] == ["found.png"]
    pixels = np.asarray(Image.open(output).convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    for row, colours in enumerate((((255, 0, 0), (0, 255, 0)), ((0, 0, 255), (255, 0, 0)))):
        band = pixels[height * row // 2 : height * (row + 1) // 2]
        found = [np.abs(band - colour).sum(-1) < 30 for colour in colours]
        assert all(mask.sum() > 20_000 for mask in found)  # a tile is 216 x 216 pixels
        assert np.nonzero(found[0])[1].mean() < np.nonzero(found[1])[1].mean()


def test_more_images_asked_for_than_there_are(colour_encoder, table, tmp_path):
    assert retrieval_picture(colour_encoder, table, ["green"], tmp_path / "a.png", top=9)[0][0] == 1


def test_the_font_has_chinese_characters():
    font = FT2Font(cjk_font().get_file())
    assert all(font.get_char_index(ord(char)) for char in "一颗红色星星在蓝色圆形的左边，abc")


def test_no_font_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(picture.fontManager, "ttflist", [])
    assert "mplfonts" in cjk_font().get_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install mplfonts"):
        cjk_font()


def test_long_queries_are_wrapped_and_cut():
    assert picture._wrap("two people") == "two people"
    assert picture._wrap("海" * 30).split("\n") == ["海" * 13, "海" * 13, "海" * 4]
    lines = picture._wrap("a dog " * 50).split("\n")
    assert len(lines) == 5 and all(len(line) <= 26 for line in lines) and lines[-1].endswith("…")


def test_queries_are_checked(colour_encoder, table, tmp_path):
    with pytest.raises(ValueError, match="none of them blank"):
        retrieval_picture(colour_encoder, table, ["red", " "], tmp_path / "a.png")
    with pytest.raises(ValueError, match="top must be at least 1"):
        retrieval_picture(colour_encoder, table, ["red"], tmp_path / "a.png", top=0)
