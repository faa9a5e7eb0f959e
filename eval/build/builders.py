"""The seven sets: what each is made from, by which rules, and what the paper counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .classes import CARS_RULES, build_cars, build_cub, build_dogs, count_cars
from .coco import COUNT_RULES, DEFAULT_COUNT, DEFAULT_SET, SET_RULES, build_coco, count_coco
from .hico import HICO_RULES, build_hoi_pos, count_hoi_pos
from .layout import FineGrainedSet
from .visual_genome import RULE as VG_RULE
from .visual_genome import build_vg_pos, count_vg_pos

Make = Callable[[Mapping[str, Path], str, int], FineGrainedSet]
"""(sources, rule, seed) -> the set."""
Count = Callable[[Mapping[str, Path], Sequence[str], int], dict[str, tuple[int, int]]]
"""(sources, rules, seed) -> (images, texts) by rule, and by other readings of the paper."""


@dataclass(frozen=True, kw_only=True)
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
    """The rule to take where none reproduces the paper's counts."""
    make: Make
    count: Count | None = None
    """None for a set with one rule."""
    tables: tuple[str, ...]
    licence: str
    """The Hub's id for what the annotations allow."""


_COCO = {
    "annotations": "instances_val2014.json (or val2017) of COCO",
    "karpathy": "optional: dataset_coco.json, or a .jsonl with `image`, to keep Karpathy's 5,000 test images only",
}

BUILDERS: dict[str, Builder] = {
    "coco-mcc": Builder(
        title="COCO-MCC (multi-class classification)",
        about="Which of the 80 COCO categories does the image hold?",
        sources=_COCO,
        paper=(2222, 2222),
        rules=SET_RULES,
        default=DEFAULT_SET,
        make=build_coco,
        count=count_coco,
        tables=("coco_categories",),
        licence="cc-by-4.0",
    ),
    "coco-count": Builder(
        title="COCO-Count",
        about="How many objects of which categories does the image hold?",
        sources=_COCO,
        paper=(3240, 3238),
        rules=COUNT_RULES,
        default=DEFAULT_COUNT,
        make=build_coco,
        count=count_coco,
        tables=("coco_categories",),
        licence="cc-by-4.0",
    ),
    "vg-pos": Builder(
        title="VG-POS (relations and positions)",
        about="Which relations do the objects of the image have?",
        sources={
            "relationships": "relationships.json (or .json.zip) of Visual Genome",
            "object_alias": "optional: object_alias.txt of Visual Genome",
            "predicate_alias": "optional: relationship_alias.txt of Visual Genome",
        },
        paper=(3000, 53806),
        rules=(VG_RULE,),
        default=VG_RULE,
        make=build_vg_pos,
        count=count_vg_pos,
        tables=("vg_nouns", "vg_predicates", "vg_contexts"),
        licence="cc-by-4.0",
    ),
    "hoi-pos": Builder(
        title="HOI-POS (human-object interactions)",
        about="What does the person do with the object?",
        sources={
            "annotations": "anno.mat of HICO (image-level labels), or anno_bbox.mat or instances_test2015.json (boxes)"
        },
        paper=(8593, 520),  # the columns of its table exchanged
        rules=HICO_RULES,
        default=HICO_RULES[0],
        make=build_hoi_pos,
        count=count_hoi_pos,
        tables=("coco_categories", "hico_verbs"),
        licence="other",
    ),
    "cub": Builder(
        title="CUB-200-2011 with Chinese names",
        about="Which of 200 species of birds is it?",
        sources={"annotations": "the folder CUB_200_2011 with classes.txt, images.txt and the two others"},
        paper=(5794, 200),
        rules=("test",),
        default="test",
        make=build_cub,
        tables=("cub_birds",),
        licence="other",
    ),
    "dogs": Builder(
        title="Stanford Dogs with Chinese names",
        about="Which of 120 breeds of dogs is it?",
        sources={"annotations": "test_list.mat of Stanford Dogs"},
        paper=(8580, 120),
        rules=("test",),
        default="test",
        make=build_dogs,
        tables=("stanford_dogs",),
        licence="other",
    ),
    "cars": Builder(
        title="Stanford Cars with Chinese names",
        about="Which of 196 models of cars is it?",
        sources={
            "annotations": "cars_test_annos_withlabels.mat (or cars_annos.mat) of Stanford Cars",
            "meta": "optional: cars_meta.mat, needed with cars_test_annos_withlabels.mat",
        },
        paper=(4021, 196),
        rules=CARS_RULES,
        default="all",
        make=build_cars,
        count=count_cars,
        tables=("stanford_cars",),
        licence="other",
    ),
}


def find_builder(name: str, sources: Mapping[str, str | Path]) -> tuple[Builder, dict[str, Path]]:
    """The builder of a set, and its sources as paths.

    Raises:
        ValueError: for an unknown name, a source that the set does not have, and one that it needs.
    """
    if name not in BUILDERS:
        raise ValueError(f"There is no fine-grained set {name!r}; there are: {', '.join(BUILDERS)}.")
    known = BUILDERS[name].sources
    unknown = sorted(set(sources) - set(known) - {"images"})
    missing = [role for role, text in known.items() if role not in sources and not text.startswith("optional")]
    if unknown or missing:
        fault = f"there is no source {unknown[0]!r}" if unknown else f"the source {missing[0]!r} is missing"
        roles = "; ".join(f"{role}: {text}" for role, text in known.items())
        raise ValueError(f"{name}: {fault}. Its sources are {roles}; images: optional, the folder of the image files.")
    return BUILDERS[name], {role: Path(path) for role, path in sources.items()}
