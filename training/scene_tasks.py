"""The four fine-grained tasks over test scenes: choose the one true text among texts that differ from it by one word.

* attribute: "a red star" | "a blue star". Another colour, shape or texture, or the opposite size, in a scene with only
  one kind of object. 2 candidates.
* counting: "two red stars" | "one red star" | "three red stars" | "four red stars". Numbers are exact. 4 candidates.
* combination: the colour or shape of something else in the scene, so a model that only notes which words occur fails.
  Of one object ("a red star" | "a blue star" where a circle is blue; factors "colour" and "shape"), or with the other
  one named too ("... and a blue circle"; factors "colour of two" and "shape of two"). 2 candidates.
* spatial: "... to the left of ..." | "... to the right of ...", the opposite relation. 2 candidates.

Candidates are worded alike, in standard words and in Chinese with the measure word 个 throughout, so that one word
differs and nothing else; but in English the article follows it (an orange star | a red star) and so does the noun's
plural (one star | two stars). Written by `python -m training.scenes OUT_DIR`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from training.scene_captions import (
    EN_RELATIONS,
    ZH_SIDES,
    Facts,
    Phrase,
    chinese_phrase,
    english_phrase,
    first,
    holds,
    join_chinese,
    join_english,
    matching,
)
from training.scene_world import COLOURS, OPPOSITE, SHAPES, TEXTURES, Kind, Scene, relation_between

MAX_COUNT = 4
# Parallel frames; none has a verb that would have to agree with the number.
FRAMES = (("{x}", "{x}"), ("a picture of {x}", "{x}的图片"), ("The picture shows {x}.", "图中是{x}"))
RELATION_FRAMES = (
    ("{a} {relation} {b}", "{a}在{b}的{relation}"),
    ("a picture of {a} {relation} {b}", "图中{a}在{b}的{relation}"),
)


@dataclass(frozen=True)
class Question:
    """True facts of a scene and false ones that differ in one word. `stratum`: what is balanced within the task."""

    scene: Scene
    factor: str
    stratum: str
    true: Facts
    false: tuple[Facts, ...]


@dataclass(frozen=True)
class TaskRow:
    """One question as text. candidates_en and candidates_zh are parallel; `label` is the index of the true one."""

    scene: Scene
    candidates_en: tuple[str, ...]
    candidates_zh: tuple[str, ...]
    label: int
    factor: str


def attribute_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """One attribute of the only kind of object, against another value of it. Binding attributes to one of several kinds
    is the combination task."""
    if len(scene.groups) > 1:
        return
    for kind, items in scene.groups.items():
        for factor, values in (
            ("colour", COLOURS),
            ("shape", SHAPES),
            ("size", ("small", "large")),
            ("texture", TEXTURES),
        ):
            value = getattr(kind, factor)
            if value not in values:  # medium size: its opposite is a matter of opinion
                continue
            phrase = _phrase(kind, len(items), {"colour", "shape", factor})
            wrong = replace(phrase, **{factor: rng.choice([v for v in values if v != value])})
            yield Question(scene, factor, factor, Facts((phrase,)), (Facts((wrong,)),))


def counting_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The number of one kind of object, of one shape, or of all objects, against every other number up to MAX_COUNT."""
    phrases = [Phrase(len(scene.objects))]
    for kind, items in scene.groups.items():
        phrases += [_phrase(kind, len(items), {"shape"}), _phrase(kind, len(items), {"colour", "shape"})]
    for phrase in phrases:
        if holds(Facts((phrase,)), scene):
            others = [replace(phrase, count=n) for n in range(1, MAX_COUNT + 1) if n != phrase.count]
            factor = "objects" if phrase.shape is None else "kind" if phrase.colour else "shape"
            yield Question(scene, factor, str(phrase.count), Facts((phrase,)), tuple(Facts((p,)) for p in others))


def combination_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The colour or the shape of one kind of object exchanged for that of another kind."""
    for (a, items_a), (b, items_b) in permutations(scene.groups.items(), 2):
        for factor in ("colour", "shape"):
            phrase, other = (_phrase(k, len(v), {"colour", "shape"}) for k, v in ((a, items_a), (b, items_b)))
            wrong = replace(phrase, **{factor: getattr(b, factor)})
            if wrong == phrase or matching(wrong, scene):
                continue
            yield Question(scene, factor, factor, Facts((phrase,)), (Facts((wrong,)),))
            both = f"{factor} of two"
            yield Question(scene, both, both, Facts((phrase, other)), (Facts((wrong, other)),))


def spatial_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The relation of two kinds of object against its opposite; they are named by shape, or by colour and shape."""
    for (a, items_a), (b, items_b) in permutations(scene.groups.items(), 2):
        relation = relation_between(items_a, items_b)
        if relation is None:
            continue
        for said in ({"shape"}, {"colour", "shape"}):
            true = Facts((_phrase(a, len(items_a), said), _phrase(b, len(items_b), said)), relation)
            if holds(true, scene):
                factor = "horizontal" if relation in ("left", "right") else "vertical"
                yield Question(scene, factor, relation, true, (replace(true, relation=OPPOSITE[relation]),))


TASKS: dict[str, Callable[[Scene, random.Random], Iterator[Question]]] = {
    "attribute": attribute_questions,
    "counting": counting_questions,
    "combination": combination_questions,
    "spatial": spatial_questions,
}


def _phrase(kind: Kind, count: int, said: set[str]) -> Phrase:
    return Phrase(count, **{name: getattr(kind, name) for name in said})


def build_task(name: str, scenes: Sequence[Scene], size: int, rng: random.Random) -> list[TaskRow]:
    """`size` questions of the task `name` (key of TASKS), one per scene as long as there are scenes.

    Balanced: over the strata (the changed attribute, the true number, the true relation) as far as the scenes allow, so
    that no answer is more likely before one looks at the image; and the position of the true candidate.

    Raises:
        ValueError: the scenes allow fewer than `size` different questions.
    """
    strata: dict[str, list[Question]] = {}
    for scene in scenes:
        for question in dict.fromkeys(TASKS[name](scene, rng)):
            strata.setdefault(question.stratum, []).append(question)
    available = sum(map(len, strata.values()))
    if available < size:
        raise ValueError(
            f"the {len(scenes)} test scenes allow only {available} questions for the task {name!r}, not {size}: "
            "lower task_size or raise test"
        )
    chosen = _choose(strata, size, rng)
    determiner = "one" if name == "counting" else "a"
    rows = [_row(question, position, determiner, rng) for position, question in enumerate(chosen)]
    rng.shuffle(rows)
    return rows


def _choose(strata: dict[str, list[Question]], size: int, rng: random.Random) -> list[Question]:
    """Take from the strata in turn; from each a random question about a scene not asked about yet, if it has one."""
    fresh = {stratum: rng.sample(questions, len(questions)) for stratum, questions in sorted(strata.items())}
    later: dict[str, list[Question]] = {stratum: [] for stratum in fresh}  # about scenes already asked about
    asked: set[Scene] = set()
    chosen: list[Question] = []
    while len(chosen) < size:
        for stratum in fresh:
            while fresh[stratum] and fresh[stratum][-1].scene in asked:
                later[stratum].append(fresh[stratum].pop())
            pool = fresh[stratum] or later[stratum]
            if pool:
                chosen.append(pool.pop())
                asked.add(chosen[-1].scene)
    return chosen[:size]


def _row(question: Question, position: int, determiner: str, rng: random.Random) -> TaskRow:
    assert holds(question.true, question.scene) and not any(holds(f, question.scene) for f in question.false), question
    false = rng.sample(question.false, len(question.false))
    label = position % (len(false) + 1)
    candidates = [*false[:label], question.true, *false[label:]]
    frames = RELATION_FRAMES if question.true.relation else FRAMES
    frame = rng.choice(frames)
    texts = [_texts(facts, frame, determiner) for facts in candidates]
    return TaskRow(question.scene, tuple(en for en, _ in texts), tuple(zh for _, zh in texts), label, question.factor)


def _texts(facts: Facts, frame: tuple[str, str], determiner: str) -> tuple[str, str]:
    """The facts in English and Chinese in standard words."""
    en = [english_phrase(phrase, first, determiner=determiner) for phrase in facts.phrases]
    zh = [chinese_phrase(phrase, first) for phrase in facts.phrases]
    if facts.relation is None:
        return frame[0].format(x=join_english(en)), frame[1].format(x=join_chinese(zh))
    return (
        frame[0].format(a=en[0], b=en[1], relation=EN_RELATIONS[facts.relation][0]),
        frame[1].format(a=zh[0], b=zh[1], relation=ZH_SIDES[facts.relation][0]),
    )
