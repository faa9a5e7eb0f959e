"""Where the cosines of right and wrong image-text pairs of a model lie, and which thresholds follow: for its card.

    python -m benchmarks.pair_cosines --model DIR --data "validation-*.parquet" --held-out "test-*.parquet" \
        --captions zh=caption_zh en=caption_en --output cosines.json

Thresholds are chosen on `--data`, as quantiles of the wrong pairs; how many wrong and right pairs they keep is counted
on `--held-out`, or on the same data without it. Every image with every text that is none of its own makes a wrong pair,
so a text that happens to fit another image counts as wrong: on data with such texts, thresholds come out too high.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.data import Table, caption_list, open_table
from eval.embed import Encoder
from eval.files import write_json
from eval.models import load
from eval.ranks import text_equal_pairs

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Shares of wrong pairs that a threshold may keep.
WRONG = (0.05, 0.01, 0.001)


@dataclass(frozen=True)
class Cosines:
    """Of all pairs of N images and M texts: [right pairs] and [wrong pairs], fp32."""

    right: torch.Tensor
    wrong: torch.Tensor


def measure(
    model: str,
    data: Sequence[str],
    *,
    captions: Mapping[str, str],
    held_out: Sequence[str] = (),
    image_column: str = "image",
    first: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The document that a card shows: quantiles of both kinds of pairs, and thresholds with what they keep.

    Args:
        model: a folder, or what else `eval.models.load` takes.
        data: parquet files, globs or folders; thresholds are chosen on them.
        captions: language -> column of one caption or a list of captions.
        held_out: data of the same layout on which the thresholds are tried out.
        first: use so many captions of each image and language.
        limit: use so many images of each data set, evenly spaced.

    Raises:
        ValueError: for a model or data that cannot be read, or pairs of one kind only.
    """
    adapter = load(model)
    encoder = Encoder(adapter)
    chosen = _pairs(encoder, data, captions, image_column, first, limit)
    tried = _pairs(encoder, held_out, captions, image_column, first, limit) if held_out else chosen
    about = adapter.describe()
    return {
        "about": {name: about[name] for name in ("weights", "preprocessing", "dtype", "library")},
        "data": _names(data),
        "held_out": _names(held_out) if held_out else None,
        "quantiles": list(QUANTILES),
        "languages": {
            language: {
                "right_pairs": len(own.right),
                "wrong_pairs": len(own.wrong),
                "right": quantiles(own.right, QUANTILES),
                "wrong": quantiles(own.wrong, QUANTILES),
                "thresholds": thresholds(own, tried[language]),
            }
            for language, own in chosen.items()
        },
    }


def thresholds(chosen: Cosines, tried: Cosines) -> list[dict[str, float]]:
    """For each share of WRONG the cosine that so many wrong pairs of `chosen` exceed, and the shares of wrong and right
    pairs of `tried` at or above it."""
    found = []
    for share, value in zip(WRONG, quantiles(chosen.wrong, [1 - share for share in WRONG]), strict=True):
        kept = {kind: (getattr(tried, kind) >= value).double().mean().item() for kind in ("wrong", "right")}
        found.append({"asked": share, "threshold": value, **kept})
    return found


def quantiles(values: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """The value below which each share of the values lies: the one at that place in order (torch.quantile takes no more
    than 16 M values)."""
    ordered = values.sort().values
    return [ordered[round(share * (len(ordered) - 1))].item() for share in shares]


def _pairs(
    encoder: Encoder,
    files: Sequence[str],
    captions: Mapping[str, str],
    image_column: str,
    first: int | None,
    limit: int | None,
) -> dict[str, Cosines]:
    table = open_table(files).limited(limit)
    table.require(image_column, *captions.values())
    images = encoder.images(table, image_column)
    return {language: _of_language(encoder, table, images, column, first) for language, column in captions.items()}


def _of_language(encoder: Encoder, table: Table, images: torch.Tensor, column: str, first: int | None) -> Cosines:
    lists = [caption_list(cell)[:first] for cell in table.column(column)]
    texts = [text for own in lists for text in own]
    if not texts:
        raise ValueError(f"Column {column!r} of {table.files[0]} holds no caption.")
    owner = torch.tensor([i for i, own in enumerate(lists) for _ in own])
    pairs = text_equal_pairs(texts, owner)  # [right pairs, 2]: (text, image)
    scores = encoder.texts(texts) @ images.T
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[pairs[:, 0], pairs[:, 1]] = True
    if right.all():
        raise ValueError(f"All texts of column {column!r} belong to all images: there are no wrong pairs.")
    return Cosines(scores[right], scores[~right])


def _names(files: Sequence[str]) -> str:
    """The last two parts of each path: which data, not where they lay."""
    return ", ".join("/".join(Path(name).parts[-2:]) for name in files)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair_cosines", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="thresholds are chosen on it")
    parser.add_argument("--held-out", nargs="+", default=(), metavar="FILE", help="and tried out on this")
    parser.add_argument("--captions", required=True, nargs="+", metavar="LANGUAGE=COLUMN")
    parser.add_argument("--image-column", default="image", metavar="NAME")
    parser.add_argument("--first", type=int, metavar="N", help="captions of each image and language")
    parser.add_argument("--limit", type=int, metavar="N", help="images of each data set, evenly spaced")
    parser.add_argument("--output", required=True, metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        parts = [pair.partition("=") for pair in args.captions]
        if wrong := ["".join(part) for part in parts if not (part[0] and part[2])]:
            raise ValueError(f"--captions takes LANGUAGE=COLUMN, not {wrong[0]!r}.")
        document = measure(
            args.model,
            args.data,
            captions={language: column for language, _, column in parts},
            held_out=args.held_out,
            image_column=args.image_column,
            first=args.first,
            limit=args.limit,
        )
        write_json(Path(args.output), document)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for language, own in document["languages"].items():
        for one in own["thresholds"]:
            print(
                f"{language}: a threshold of {one['threshold']:.3f} keeps {100 * one['wrong']:.2f} % of the wrong and "
                f"{100 * one['right']:.1f} % of the right pairs."
            )


if __name__ == "__main__":
    main()
