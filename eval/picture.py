"""A picture of what a model finds: one row per query, the query and its best images with their scores.

    python -m eval picture --model DIR --data FILES --query "a dog on the beach" --query 海滩上的狗 --output found.png

Queries may be in any language; Chinese needs a font that has Chinese characters (see `cjk_font`).
"""

from __future__ import annotations

import importlib.util
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from PIL import Image, ImageOps

from .files import replaced

if TYPE_CHECKING:
    from .data import Table
    from .embed import Encoder

# Families with simplified Chinese characters that come with Linux distributions, macOS and Windows.
CJK_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti SC",
    "STHeiti",
    "Microsoft YaHei",
    "SimHei",
    "Noto Sans CJK JP",  # the first face of the NotoSansCJK collections, which is the one that matplotlib reads
    "Droid Sans Fallback",
    "Arial Unicode MS",
)
PACKAGED_FONT = "fonts/NotoSansCJKsc-Regular.otf"  # in the package mplfonts

# In inches.
TILE, GAP, LABEL, CAPTION, MARGIN, HEAD = 1.35, 0.14, 2.5, 0.22, 0.25, 0.45
INK, SOFT, RULE, PAPER = "#1b1f24", "#6a737d", "#d8dee4", "#f6f8fa"
DPI = 160
PIXELS = 432  # twice the side of a tile at DPI, so that it is drawn sharp; other shapes than squares get borders


def retrieval_picture(
    encoder: Encoder,
    table: Table,
    queries: Sequence[str],
    output: str | Path,
    *,
    image_column: str = "image",
    top: int = 5,
    title: str = "",
) -> list[list[int]]:
    """Search the images of a table for each query, draw the `top` best, and return their rows, best first.

    The score under each image is the cosine similarity of query and image; ties are shown in the order of the rows.

    Raises:
        ValueError: without queries, with blank ones, for `top` < 1, or when no font with Chinese characters is found.
    """
    if not queries or not all(query.strip() for query in queries):
        raise ValueError(f"Give at least one query, none of them blank, not {list(queries)}.")
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}.")
    font = cjk_font()
    scores = encoder.texts(queries) @ encoder.images(table, image_column).T
    top = min(top, len(table))
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :top]
    figure, axes = _grid(len(queries), top, title or f"{len(table):,} images searched", font)
    for row, query in enumerate(queries):
        best = order[row].tolist()
        _label(figure, row, query, font)
        for axis, image, found in zip(axes[row], table.images(best, image_column), best, strict=True):
            axis.imshow(ImageOps.pad(image.convert("RGB"), (PIXELS, PIXELS), Image.Resampling.LANCZOS, color=PAPER))
            axis.set_xlabel(f"{scores[row, found]:.3f}", color=SOFT, fontproperties=font, fontsize=9, labelpad=4)
    with replaced(Path(output)) as beside:
        figure.savefig(beside, dpi=DPI)
    return order.tolist()


def cjk_font() -> FontProperties:
    """An installed font with Chinese characters, or else the one in the package `mplfonts` (part of the `eval` extra).

    Raises:
        ValueError: when there is neither; the message says what to install.
    """
    installed = {entry.name: entry.fname for entry in fontManager.ttflist}
    for family in CJK_FAMILIES:
        if family in installed:
            return FontProperties(fname=installed[family])
    spec = importlib.util.find_spec("mplfonts")  # located, not imported: importing it changes matplotlib's settings
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / PACKAGED_FONT).is_file():
            return FontProperties(fname=str(Path(folder) / PACKAGED_FONT))
    raise ValueError(
        "No font with Chinese characters was found: `pip install mplfonts`, or install one of "
        f"{', '.join(CJK_FAMILIES[:3])} (Debian and Ubuntu: `apt install fonts-noto-cjk`)."
    )


def _grid(rows: int, columns: int, title: str, font: FontProperties) -> tuple[Figure, list[list[Axes]]]:
    """Empty image axes laid out in inches below a title, so that tiles are square whatever their number."""
    width = 2 * MARGIN + LABEL + columns * TILE + (columns - 1) * GAP
    height = HEAD + rows * (TILE + CAPTION + GAP) + MARGIN
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(MARGIN / width, 1 - 0.62 * HEAD / height, title, color=SOFT, fontproperties=font, fontsize=9)
    axes = []
    for row in range(rows):
        bottom = height - HEAD - row * (TILE + CAPTION + GAP) - TILE
        line = []
        for column in range(columns):
            left = MARGIN + LABEL + column * (TILE + GAP)
            axis = figure.add_axes((left / width, bottom / height, TILE / width, TILE / height))
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=RULE, linewidth=0.8)
            line.append(axis)
        axes.append(line)
    return figure, axes


def _label(figure: Figure, row: int, query: str, font: FontProperties) -> None:
    """The query, wrapped, at the left of its row and centred on the images."""
    width, height = figure.get_size_inches()
    middle = height - HEAD - row * (TILE + CAPTION + GAP) - TILE / 2
    style = {"color": INK, "fontproperties": font, "fontsize": 11, "va": "center", "linespacing": 1.35}
    figure.text(MARGIN / width, middle / height, _wrap(query), **style)


def _wrap(text: str, columns: int = 26, lines: int = 5) -> str:
    """Break text into lines of at most `columns` terminal columns; a Chinese character takes two and may end a line."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    per_line = columns // 2 if wide * 2 > len(text) else columns
    return "\n".join(textwrap.wrap(text, per_line, max_lines=lines, placeholder=" …"))
