"""The paper's seven fine-grained sets (Table 3), built from public annotations, in Chinese and English.

    build("coco-mcc", {"annotations": Path("instances_val2014.json"), "karpathy": Path("dataset_coco.json"),
                       "images": Path("val2014")}, Path("sets/coco-mcc"))

`BUILDERS` maps a set's name to its sources and rules: coco-mcc, coco-count, vg-pos, hoi-pos, cub, dogs, cars;
`eval.build.probe` tells what each rule of a set gives. docs/fine_grained.md says where each file comes from.

The folder that `build` writes (`datasets.load_dataset(folder)` loads the default config, split `test`):

    test-00000-of-00001.parquet, ...   one row per image (config "default")
        image_id     string        unique
        file_name    string        the image file, as the annotations name it, relative to the publisher's image folder
        image        Image         the file's own bytes; the column is there only if the source "images" was given
        captions_en  list[string]  the texts that are right for this image, distinct, at least one
        captions_zh  list[string]  the same texts in Chinese, in the same order: entry i translates entry i
        text_ids     list[int32]   rows of texts.parquet, in the same order
        label        ClassLabel    cub, dogs, cars only: 0-based class number (names in English); as are
        name_en, name_zh  string   the bare class name, for prompt ensembles
    texts.parquet                      the gallery: one row per distinct text (config "texts")
        text_id      int32         0, 1, ...
        key          string        what the text says, independent of the language, e.g. "person=2, dog=1"
        text_en, text_zh  string   distinct within each language (checked when writing)
        images       int32         how many images it is right for (0 only for a class without an image)
        name_en, name_zh  string   cub, dogs, cars only
    choice.parquet                     hard negatives (config "choice"); coco-mcc, coco-count, vg-pos, hoi-pos only
        image_id     string
        candidates_en, candidates_zh  list[string]   one is true of the image, each of the others differs in one thing
        label        int64         which one is true
        factor       string        what differs: category, count, roles, relation, verb
    README.md                          dataset card
    manifest.json                      "name", "rule", "seed", "counts" {images, texts, pairs, choices}, "paper"
        {images, texts, reproduced}, "probe" {rule: [images, texts]} where rules were tried, "dropped" {reason: n},
        "sources" {role: {file, sha256}}, "tables" {file: sha256}, "images" {files, sha256} or null, "captions_sha256"
        {en, zh} (every caption of every row in order, each followed by a newline, as UTF-8), "files" {file: sha256}

Positives are decided by text equality: all rows whose captions hold a text are right for it. The seven sets are scored
as retrieval over all rows and all texts (any-hit R@1/5/10 both ways, mean recall); cub, dogs and cars also as zero-shot
classification with `label`, `name_en`, `name_zh`; choice.parquet as accuracy, chance 1 / candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import sha256_of
from .builders import BUILDERS, Builder, find_builder
from .layout import check, tables_used, write
from .probe import choose, probe

__all__ = ["BUILDERS", "Builder", "build"]


def build(
    name: str,
    sources: Mapping[str, str | Path],
    output: str | Path,
    *,
    rule: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Builds one of the seven sets as the folder that this module describes; returns its manifest.

    Everything is decided by the annotations, the rule and the seed; the same inputs give the same bytes. A build of the
    same inputs may be repeated over itself.

    Args:
        name: one of `BUILDERS`.
        sources: role -> file or folder, as `BUILDERS[name].sources` describes them; with "images", the folder of the
            image files, these are checked and written into the set.
        rule: one of `BUILDERS[name].rules`; without it the first that reproduces the paper's counts, else the default.
        seed: for the choices that a rule leaves open: which images, which false candidates.

    Raises:
        ValueError: for an unknown name, rule or source, a missing or malformed file, categories without a translation,
            images that are missing or damaged, and an `output` that holds something else.
    """
    builder, paths = find_builder(name, sources)
    if rule is not None and rule not in builder.rules:
        raise ValueError(f"{name} has no rule {rule!r}; there are: {', '.join(builder.rules)}.")
    found = probe(name, paths, seed=seed) if rule is None and builder.count else {}
    built = builder.make(paths, rule or choose(builder, found), seed)
    check(name, built)
    images, texts = builder.paper
    manifest = {
        "name": name,
        "rule": built.rule,
        "seed": seed,
        "counts": built.counts,
        "paper": {
            "images": images,
            "texts": texts,
            "reproduced": (len(built.images), len(built.texts)) == builder.paper,
        },
        "probe": {tried: list(counts) for tried, counts in found.items()},
        "dropped": dict(built.dropped),
        "sources": _hashes(paths),
        "tables": tables_used(builder.tables),
    }
    return write(
        Path(output),
        built,
        manifest,
        title=builder.title,
        about=builder.about,
        licence=builder.licence,
        images=paths.get("images"),
    )


def _hashes(paths: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Of every annotation file; a folder counts as its text files."""
    files = {}
    for role, path in sorted(paths.items()):
        if role != "images":
            inside = sorted(path.glob("*.txt")) if path.is_dir() else [path]
            files |= {role if file == path else f"{role}/{file.name}": file for file in inside}
    return {role: {"file": file.name, "sha256": sha256_of(file)} for role, file in files.items()}
