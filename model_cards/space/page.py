"""What the page looks like: the style, and the pieces of HTML between gradio's own parts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from encoder import language

if TYPE_CHECKING:
    from encoder import Score

# Fonts of the visitor's own system: nothing is fetched from anywhere.
LATIN = ["-apple-system", "Segoe UI", "Roboto", "Noto Sans"]
CHINESE = ["PingFang SC", "Microsoft YaHei", "Noto Sans SC", "Noto Sans CJK SC"]
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    radius_size="md",
    font=[*LATIN, *CHINESE, "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_600",
    block_info_text_color="*neutral_600",
    block_label_text_color="*neutral_700",
    block_shadow="none",
    color_accent="*primary_700",
    input_placeholder_color="*neutral_500",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_text_color="white",
)
STYLE = Path(__file__).with_name("style.css")
# gradio writes lang="en" or nothing, depending on the version; the page's own words are English.
HEAD = "<script>document.documentElement.lang = 'en';</script>"


def head(model: str, images: str, count: int, bad: dict[str, str]) -> str:
    """The title, and what is searched; images that could not be read are named."""
    passed_over = ""
    if bad:
        named = "".join(f"<li>{escape(label)}: {escape(why)}</li>" for label, why in list(bad.items())[:100])
        rest = f"<li>and {len(bad) - 100:,} more</li>" if len(bad) > 100 else ""
        summary = f"{len(bad):,} {'image' if len(bad) == 1 else 'images'} could not be read"
        passed_over = f'<details class="note"><summary>{summary}</summary><ul>{named}{rest}</ul></details>'
    return (
        "<h1>M2-Encoder</h1><p>Images and text in Chinese and English, in one space: "
        f"<b>{escape(model)}</b> over {count:,} images of <b>{escape(images)}</b>.</p>{passed_over}"
    )


def heading(text: str) -> str:
    return f'<h2 class="result">{escape(text)}</h2>'


def note(text: str) -> str:
    """A line of explanation; `text` is HTML."""
    return f'<p class="note" role="status">{text}</p>'


def problem(text: str) -> str:
    """A line that says what to do differently; `text` is plain."""
    return f'<p class="note" role="alert">{escape(text)}</p>'


def in_its_language(text: str) -> str:
    """Plain text as HTML that says which language it is in, for screen readers and for the choice of glyphs."""
    return f'<span lang="{"zh-Hans" if language(text) == "zh" else "en"}">{escape(text)}</span>'


def score_table(scores: Sequence[Score]) -> str:
    """Labels with a bar and the number of their probability, and their cosine."""
    rows = "".join(
        f'<tr><th scope="row" class="label">{in_its_language(score.label)}</th>'
        f'<td><div class="track"><div class="bar" style="width: {100 * score.probability:.2f}%"></div></div></td>'
        f'<td class="number">{100 * score.probability:.1f} %</td><td class="number">{score.cosine:.3f}</td></tr>'
        for score in scores
    )
    return (
        '<table class="scores"><caption>Probabilities compare the labels with each other; the cosine is the raw '
        'similarity of image and text.</caption><thead><tr><th scope="col">Label</th><th scope="col">'
        '<span class="unseen">Bar</span></th><th scope="col" class="number">Probability</th>'
        f'<th scope="col" class="number">Cosine</th></tr></thead><tbody>{rows}</tbody></table>'
    )
