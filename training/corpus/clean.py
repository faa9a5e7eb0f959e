"""The stage "clean": the paper's rules, duplicates and evaluation images out; every loss with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

REASONS = (
    # Of the text:
    "broken_text",  # control characters, or U+FFFD, which something before us wrote for bytes that were no UTF-8
    "short_text",  # fewer characters than `min_characters`, blanks at the ends not counted; also the empty text
    "wrong_language",  # the text is in another language than its row says
    # Of the image, in this order; known from its header, before anything is decoded:
    "too_many_bytes",
    "not_an_image",  # no format of `formats`
    "too_many_pixels",
    "too_many_frames",
    "aspect_ratio",
    # ... and from decoding it:
    "broken_image",  # truncated or damaged
    # Of the image among others:
    "evaluation_image",  # equal to, or nearly, an image of the guard list
    "duplicate",  # the same bytes as a row of higher rank in the same language
    "near_duplicate",  # nearly the same pixels as a row of higher rank in the same language
)
"""Why a row is dropped; the first that applies."""


@dataclass(frozen=True)
class CleanSettings:
    """The section `clean`."""

    min_characters: dict[str, int] = field(default_factory=lambda: {"en": 5, "zh": 5})
    """language -> texts with fewer characters are dropped (paper, section 2.2: 5, for both). Read literally this drops
    77 % of the Chinese names of things ("自行车" has 3), which say as much as "bicycle": a setting per language."""
    max_aspect_ratio: float = 3.0
    """Of the longer to the shorter side; more is dropped (paper, section 2.2)."""
    max_pixels: int = 50_000_000
    """Width times height, by the header."""
    max_bytes: int = 50_000_000
    max_frames: int = 1000
    """Of an animation, of which the first picture counts."""
    guard: tuple[str, ...] = ()
    """Evaluation images that must not be trained on: parquet files (columns `image`, or precomputed signatures),
    tars, image files, or folders of these."""
    wrong_language: Literal["drop", "relabel"] = "drop"
    """A text whose language is not its row's: dropped, or given its own label if that is "en" or "zh"."""
