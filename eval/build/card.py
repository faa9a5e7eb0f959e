"""The dataset card of a fine-grained set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

# By the Hub's id of a licence.
LICENCES = {
    "cc-by-4.0": "The annotations that the texts are made from are under CC BY 4.0, and so are the texts.",
    "other": "The publisher of the annotations allows non-commercial research; the texts are made from them.",
}


def card(title: str, about: str, licence: str, manifest: Mapping[str, Any]) -> str:
    """README.md: metadata that `datasets` loads by, and what a reader must know. It depends on the arguments only."""
    counts, paper = manifest["counts"], manifest["paper"]
    front = yaml.safe_dump(_metadata(title, licence, manifest), sort_keys=False, allow_unicode=True)
    if manifest["images"]:
        pixels = (
            "The image files are inside. They belong to their owners and their licences differ: look up the terms of\n"
            "the original data set before you pass this folder on."
        )
    else:
        pixels = (
            "The images are not inside, since not all of them may be passed on: get them from the publisher and join\n"
            "them by `file_name`, or build the set again with the source `images`."
        )
    if paper["reproduced"]:
        verdict = "These are the counts that the paper prints."
    else:
        verdict = (
            f"The paper prints {paper['images']:,} images and {paper['texts']:,} texts: this is another selection."
        )
    dropped = "".join(f"* {reason}: {number:,}\n" for reason, number in manifest["dropped"].items())
    return f"""---
{front}---

# {title}

{about}

One of the seven fine-grained sets of the M2-Encoder paper (arXiv 2401.15896, Table 3), rebuilt from public annotations
with `python -m eval build {manifest["name"]}`. Rule `{manifest["rule"]}`, seed {manifest["seed"]}.

| images | texts per language | right image-text pairs | choice questions |
|---|---|---|---|
| {counts["images"]:,} | {counts["texts"]:,} | {counts["pairs"]:,} | {counts["choices"]:,} |

{verdict}

* default config, split `test`: one row per image, with the texts that are right for it (`captions_en`, `captions_zh`;
  entry i of the one translates entry i of the other).
* `texts`: every text once. A text is right for every image whose captions hold it.
{_choice_line(manifest)}
{pixels}

{LICENCES[licence]} The Chinese is our own work.

Left out:

{dropped or "nothing"}

Hashes of all sources, tables and files are in `manifest.json`.
"""


def _choice_line(manifest: Mapping[str, Any]) -> str:
    if not manifest["counts"]["choices"]:
        return ""
    return (
        "* `choice`: one true text (number `label`) among others that differ from it in one thing (`factor`);\n"
        "  chance is 1 / candidates.\n"
    )


def _metadata(title: str, licence: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    configs = [{"config_name": "default", "data_files": [{"split": "test", "path": "test-*.parquet"}], "default": True}]
    for name in ("texts", "choice"):
        if f"{name}.parquet" in manifest["files"]:
            configs.append({"config_name": name, "data_files": [{"split": "test", "path": f"{name}.parquet"}]})
    images = manifest["counts"]["images"]
    size = "n<1K" if images < 1_000 else "1K<n<10K" if images < 10_000 else "10K<n<100K"
    return {
        "pretty_name": title,
        "language": ["en", "zh"],
        # The annotations' licence does not cover the images.
        "license": "other" if manifest["images"] else licence,
        "task_categories": ["zero-shot-image-classification", "image-feature-extraction"],
        "tags": ["image-text-retrieval", "fine-grained", "bilingual"],
        "size_categories": [size],
        "configs": configs,
    }
