"""The paper's seven fine-grained sets (Table 3), built from public annotations, in Chinese and English.

    build("coco-mcc", {"annotations": Path("instances_val2014.json"), "karpathy": Path("dataset_coco.json"),
                       "images": Path("val2014")}, Path("sets/coco-mcc"))

`BUILDERS` maps a set's name to its sources and rules: coco-mcc, coco-count, vg-pos, hoi-pos, cub, dogs, cars.
docs/fine_grained.md says where each file comes from.

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
        key          string        what the text says, independent of the language, e.g. "person=2 dog=1"
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
        {images, texts, reproduced}, "dropped" {reason: n}, "sources" {role: {file, sha256}}, "tables" {file: sha256},
        "images" {files, sha256} or null, "captions_sha256" {en, zh} (every caption of every row in order, each followed
        by a newline, as UTF-8), "files" {file: sha256}

Positives are decided by text equality: all rows whose captions hold a text are right for it. The seven sets are scored
as retrieval over all rows and all texts (any-hit R@1/5/10 both ways, mean recall); cub, dogs and cars also as zero-shot
classification with `label`, `name_en`, `name_zh`; choice.parquet as accuracy, chance 1 / candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import probe as _probe
from .classes import CARS_RULES, build_cars, build_cub, build_dogs, count_cars
from .coco import COUNT_RULES, DEFAULT_COUNT, DEFAULT_SET, SET_RULES, build_coco, count_coco
from .hico import HICO_RULES, build_hoi_pos, count_hoi_pos
from .layout import check, tables_used, write
from .sources import sha256
from .visual_genome import RULE as VG_RULE
from .visual_genome import build_vg_pos, count_vg_pos

__all__ = ["BUILDERS", "Builder", "build", "probe"]


@dataclass(frozen=True)
class Builder:
    """One of the seven sets."""

    title: str
    about: str
    sources: Mapping[str, str]
    """Role -> what to give for it; those that start with "optional" may be left out. `images` is always optional."""
    paper: tuple[int, int]
    """(images, texts) as the paper counts them."""
    rules: tuple[str, ...]
    default: str
    """The rule of a build that no rule reproduces the paper's counts for."""
    make: _probe.Build
    tables: tuple[str, ...]
    licence: str
    count: _probe.Count | None = None
    """Tries the rules, and other readings of the paper; None for a set with one rule."""


_INSTANCES = "instances_val2014.json (or val2017) of COCO"
_KARPATHY = "optional: dataset_coco.json, or a .jsonl with `image`, to keep Karpathy's 5,000 test images only"
_COCO = {"annotations": _INSTANCES, "karpathy": _KARPATHY}

BUILDERS: dict[str, Builder] = {
    "coco-mcc": Builder(
        "COCO-MCC (multi-class classification)",
        "Which of the 80 COCO categories does the image hold?",
        _COCO,
        (2222, 2222),
        SET_RULES,
        DEFAULT_SET,
        build_coco,
        ("coco_categories",),
        "cc-by-4.0",
        count_coco,
    ),
    "coco-count": Builder(
        "COCO-Count",
        "How many objects of which categories does the image hold?",
        _COCO,
        (3240, 3238),
        COUNT_RULES,
        DEFAULT_COUNT,
        build_coco,
        ("coco_categories",),
        "cc-by-4.0",
        count_coco,
    ),
    "vg-pos": Builder(
        "VG-POS (relations and positions)",
        "Which relations do the objects of the image have?",
        {
            "relationships": "relationships.json (or .json.zip) of Visual Genome",
            "object_alias": "optional: object_alias.txt of Visual Genome",
            "predicate_alias": "optional: relationship_alias.txt of Visual Genome",
        },
        (3000, 53806),
        (VG_RULE,),
        VG_RULE,
        build_vg_pos,
        ("vg_nouns", "vg_predicates", "vg_contexts"),
        "cc-by-4.0",
        count_vg_pos,
    ),
    "hoi-pos": Builder(
        "HOI-POS (human-object interactions)",
        "What does the person do with the object?",
        {"annotations": "anno.mat of HICO (image-level labels), or anno_bbox.mat or instances_test2015.json (boxes)"},
        (8593, 520),
        HICO_RULES,
        HICO_RULES[0],
        build_hoi_pos,
        ("coco_categories", "hico_verbs"),
        "other",
        count_hoi_pos,
    ),
    "cub": Builder(
        "CUB-200-2011 with Chinese names",
        "Which of 200 species of birds is it?",
        {"annotations": "the folder CUB_200_2011 with classes.txt, images.txt and the two others"},
        (5794, 200),
        ("test",),
        "test",
        build_cub,
        ("cub_birds",),
        "other",
    ),
    "dogs": Builder(
        "Stanford Dogs with Chinese names",
        "Which of 120 breeds of dogs is it?",
        {"annotations": "test_list.mat of Stanford Dogs"},
        (8580, 120),
        ("test",),
        "test",
        build_dogs,
        ("stanford_dogs",),
        "other",
    ),
    "cars": Builder(
        "Stanford Cars with Chinese names",
        "Which of 196 models of cars is it?",
        {
            "annotations": "cars_test_annos_withlabels.mat (or cars_annos.mat) of Stanford Cars",
            "meta": "optional: cars_meta.mat, needed with cars_test_annos_withlabels.mat",
        },
        (4021, 196),
        CARS_RULES,
        "all",
        build_cars,
        ("stanford_cars",),
        "other",
        count_cars,
    ),
}


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
    builder, paths = _builder(name), _sources(name, sources)
    if rule is not None and rule not in builder.rules:
        raise ValueError(f"{name} has no rule {rule!r}; there are: {', '.join(builder.rules)}.")
    found = builder.count(paths, builder.rules, seed) if builder.count and rule is None else {}
    chosen = rule or (_probe.choose(found, builder.rules, builder.paper, builder.default) if found else builder.default)
    built = builder.make(paths, chosen, seed)
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
        "probe": {own: list(counts) for own, counts in found.items()},
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


def probe(name: str, sources: Mapping[str, str | Path], *, seed: int = 0) -> dict[str, tuple[int, int]]:
    """(images, texts) that each rule of a set gives for these annotations; `eval.build.probe.table` prints them.

    Besides the rules that can be built this counts other readings of the paper, such as VG-POS in free-form English.

    Raises:
        ValueError: as `build` does for the annotations.
    """
    builder, paths = _builder(name), _sources(name, sources)
    if builder.count:
        return builder.count(paths, builder.rules, seed)
    built = builder.make(paths, builder.default, seed)
    return {builder.default: (len(built.images), len(built.texts))}


def _builder(name: str) -> Builder:
    if name not in BUILDERS:
        raise ValueError(f"There is no fine-grained set {name!r}; there are: {', '.join(BUILDERS)}.")
    return BUILDERS[name]


def _sources(name: str, sources: Mapping[str, str | Path]) -> dict[str, Path]:
    known = BUILDERS[name].sources
    unknown = sorted(set(sources) - set(known) - {"images"})
    missing = [role for role, text in known.items() if role not in sources and not text.startswith("optional")]
    if unknown or missing:
        fault = f"there is no source {unknown[0]!r}" if unknown else f"the source {missing[0]!r} is missing"
        roles = "; ".join(f"{role}: {text}" for role, text in known.items())
        raise ValueError(f"{name}: {fault}. Its sources are {roles}; images: optional, the folder of the image files.")
    return {role: Path(path) for role, path in sources.items()}


def _hashes(paths: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Of every annotation file; a folder counts as its text files."""
    files = {}
    for role, path in sorted(paths.items()):
        if role != "images":
            inside = sorted(path.glob("*.txt")) if path.is_dir() else [path]
            files |= {role if file == path else f"{role}/{file.name}": file for file in inside}
    return {role: {"file": file.name, "sha256": sha256(file)} for role, file in files.items()}
