"""Families of training scenes: alike in what is easy to see, so that the rest has to be looked at.

A contrastive loss teaches only what tells the pairs of a batch apart, and in a random batch colours and numbers do
nearly all of that (docs/log.md). The scenes of a family share background, colours and numbers; shapes, sizes, textures
and relations tell them apart. They are each other's hard negatives if they meet in one batch (`data.neighbours` in
training/configs.py).

Twins are a first lesson, on relations alone: two large plain objects of different colours, and the same two the other
way round. Among all the scenes at once relations are never learned, after the twins they are kept (docs/log.md).

Written by `python -m training.scenes OUT_DIR`.
"""

from __future__ import annotations

import random
from dataclasses import replace

from training.scene_captions import full_facts
from training.scene_world import (
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    Kind,
    Scene,
    place,
    relation_between,
    sample_look,
    sample_scene,
)

FAMILY_SIZE = 4
MAX_ATTEMPTS = 40  # a crowded scene may not have three relatives that fit; then another family is begun


def sample_family(rng: random.Random) -> list[Scene]:
    """FAMILY_SIZE scenes without held-out pairs, no two with the same full description: the same background, colours
    and numbers. Where two kinds of object stand in a relation, every other scene has the opposite one and nothing else
    changed. The same state of `rng` gives the same family."""
    while True:
        first = sample_scene(rng)
        groups = first.groups
        relation = relation_between(*groups.values()) if len(groups) == 2 else None
        kinds, counts = tuple(groups), [len(objects) for objects in groups.values()]
        family = {full_facts(first): first}
        for _ in range(MAX_ATTEMPTS):
            if len(family) == FAMILY_SIZE:
                return list(family.values())
            turned = relation is not None and len(family) % 2 == 1
            if not turned:
                kinds = _relatives(kinds, rng)
            scene = place(rng, first.background, kinds, counts, OPPOSITE[relation] if turned else relation)
            if scene is not None:
                family.setdefault(full_facts(scene), scene)


def sample_twins(rng: random.Random) -> list[Scene]:
    """Two scenes without held-out pairs that differ in the relation of their two objects (and in the exact places)."""
    while True:
        looks = [sample_look(rng, colour) for colour in rng.sample(list(COLOURS), 2)]
        kinds = [replace(look, size=rng.choice(("medium", "large")), texture="solid") for look in looks]
        background, relation = rng.choice(list(BACKGROUNDS)), rng.choice(list(OPPOSITE))
        twins = [place(rng, background, kinds, (1, 1), one) for one in (relation, OPPOSITE[relation])]
        if all(twins):  # two large objects do not always fit
            return [scene for scene in twins if scene is not None]


def _relatives(kinds: tuple[Kind, ...], rng: random.Random) -> tuple[Kind, ...]:
    """Kinds of the same colours that look different otherwise."""
    while True:
        relatives = tuple(sample_look(rng, kind.colour) for kind in kinds)
        if len({(kind.colour, kind.shape) for kind in relatives}) == len(kinds):
            return relatives
