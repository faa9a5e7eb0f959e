"""The data card: README.md beside the shards, with the table of sources that the paper's Table 12 has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from .shard_writers import FEATURES, LANGUAGES, TAR_FEATURES

if TYPE_CHECKING:
    from .manifest import Ledger

_LICENCES, _CELL = 10, 100  # lines for each source, characters
_TEXT = """\
# {title}

Images with captions in English and Chinese, built by `python -m training.corpus` of M2-Encoder after the recipe of
BM-6B (arXiv 2401.15896, section 2.2). One row is one image with all its captions: `captions_en` and `captions_zh` are
lists, and `pairs` says of each caption where it comes from (the k-th pair of a language is about its k-th caption).

{counts}

```python
from datasets import load_dataset

data = load_dataset("{name}", split="train", streaming=True)
print(next(iter(data)))
```

`index.json` lists every shard with its rows, its pairs per language, its size and its SHA-256;
`python -m training.corpus.verify FOLDER` compares. `manifest.json` holds the settings of every stage and what became of
every row.

## Sources

{sources}

Rows in: what the source gave. Pairs: what the shards hold of it, after cleaning, scoring and translation.

## What was left out

{losses}

## Licences

{licences}

The images belong to their authors. This data set may be used as far as the licences of all its sources allow.
"""


def card(
    title: str,
    name: str,
    index: Mapping[str, Any],
    ledgers: Sequence[Ledger],
    licences: Mapping[str, Mapping[str, int]],
) -> str:
    """The whole README.md.

    Args:
        name: what `load_dataset` takes: a folder or an id on the Hub.
        index: as `manifest.gathered` gives it.
        licences: source -> licence -> pairs.
    """
    totals = index["totals"]
    extension = min(shard["file"].rpartition(".")[2] for shard in index["shards"])
    return f"---\n{_metadata(title, totals, extension, licences).to_yaml()}\n---\n\n" + _TEXT.format(
        title=title,
        name=name,
        counts=_table(
            ["split", "images", *(f"pairs {language}" for language in LANGUAGES), "bytes"],
            [
                [split, total["images"], *(total["pairs"][language] for language in LANGUAGES), total["bytes"]]
                for split, total in totals.items()
            ],
        ),
        sources=sources_table(ledgers),
        losses=losses_table(ledgers),
        licences=_table(
            ["source", "licence", "pairs"],
            [[source, licence, n] for source, held in sorted(licences.items()) for licence, n in _most(held)],
        ),
    )


def sources_table(ledgers: Sequence[Ledger]) -> str:
    """Markdown: source | language | rows in | pairs | share, as Table 12 of the paper, with a last line of sums."""
    everything = sum(entry.kept for entry in ledgers)
    lines = []
    for entry in ledgers:
        for language in sorted({*entry.rows_in, *LANGUAGES}):
            rows = entry.rows_in.get(language, 0)
            pairs = sum(of_split.get(language, 0) for of_split in entry.pairs.values())
            if rows or pairs:
                name = entry.source if rows or not entry.translated else f"{entry.source} (translated)"
                lines.append([name, language, rows, pairs, _share(pairs, everything)])
    rows = sum(line[2] for line in lines)
    lines.append(
        ["all", ", ".join(sorted({line[1] for line in lines})), rows, everything, _share(everything, everything)]
    )
    return _table(["source", "language", "rows in", "pairs", "share"], lines)


def losses_table(ledgers: Sequence[Ledger]) -> str:
    """Markdown: stage | reason | rows, summed over sources, and each source's in columns of its own."""
    reasons = dict.fromkeys(
        (stage, reason) for entry in ledgers for stage, lost in entry.lost.items() for reason in lost
    )
    if not reasons:
        return "Nothing."
    lines = [
        [stage, reason, sum(numbers), *numbers]
        for stage, reason in reasons
        for numbers in [[entry.lost.get(stage, {}).get(reason, 0) for entry in ledgers]]
    ]
    return _table(["stage", "reason", "rows", *(entry.source for entry in ledgers)], lines)


def _most(held: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent licences of a source, and how many pairs have one of the others."""
    order = sorted(held.items(), key=lambda item: (-item[1], item[0]))
    others = sum(number for _, number in order[_LICENCES:])
    return order[:_LICENCES] + ([(f"{len(order) - _LICENCES} others", others)] if others else [])


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        # Names of licences are somebody else's text: one line, no markup.
        plain = " ".join(str(value).split())[:_CELL]
        return plain.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")

    rows = [list(head), ["---"] * len(head), *([cell(value) for value in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _metadata(
    title: str, totals: Mapping[str, Any], extension: str, licences: Mapping[str, Mapping[str, int]]
) -> DatasetCardData:
    names = {licence.lower() for held in licences.values() for licence in held}
    known = names & {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0"}
    images = sum(total["images"] for total in totals.values())
    data = DatasetCardData(
        pretty_name=title,
        language=[name for name in LANGUAGES if any(total["pairs"][name] for total in totals.values())],
        **({"license": min(known)} if names == known and len(known) == 1 else _OTHER),
        task_categories=["zero-shot-image-classification", "image-to-text", "text-to-image"],
        size_categories=[_size(images)],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}-*.{extension}"} for split in totals],
            }
        ],
    )
    info = datasets.DatasetInfo(
        features=datasets.Features.from_dict(FEATURES if extension == "parquet" else TAR_FEATURES)
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data


_OTHER = {"license": "other", "license_name": "licences-of-its-sources"}


def _size(number: int) -> str:
    bounds = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    larger = ((10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"))
    return next((name for bound, name in (*bounds, *larger) if number < bound), "10B<n<100B")
