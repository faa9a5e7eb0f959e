"""What can be said of a scene, and how: facts first, then English and Chinese wordings of the same facts.

A caption is made in two steps. `caption_facts` chooses true statements about a scene (`Facts`); `english` and `chinese`
then word them independently of each other, so that a pair of captions never says different things and is hardly ever a
literal translation. `holds` decides whether facts are true of a scene; captions, tasks and tests all use it. Run by
`python -m training.scenes OUT_DIR`.

Conventions, the same in both languages:
* Number words and articles are exact: "a red star" holds of an image with exactly one red star, whatever else is in it.
* Full descriptions name every kind of object; medium size and solid filling mostly go unsaid there.
* A relation can be told from either side. Training captions mostly name the colour first that comes first in `COLOURS`,
  so that "left" alone says something of the image before the order of the words is understood (docs/log.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TypeVar

from training.scene_world import COLOURS, OPPOSITE, Kind, Scene, SceneObject, relation_between

T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]  # random.Random.choice, or `first` for the standard wording

CAPTIONS_PER_SCENE = 6
# Of the relations between two colours in training captions: named in the order of COLOURS; of the rest, half are too.
ORDERED_SHARE = 0.5
_RANK = {colour: rank for rank, colour in enumerate(COLOURS)}


def first(options: Sequence[T]) -> T:
    """The standard wording among equivalent ones."""
    return options[0]


# ---------------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, order=True)
class Phrase:
    """`count` objects with the attributes given (keys of training.scene_world); None is an attribute left unsaid."""

    count: int
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None


@dataclass(frozen=True)
class Facts:
    """A statement about a scene: what is there, how phrases[0] lies to phrases[1], and the background."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None


def matching(phrase: Phrase, scene: Scene) -> tuple[SceneObject, ...]:
    """The objects of the scene that have every attribute the phrase says (the count is not looked at)."""
    return tuple(
        item
        for item in scene.objects
        if phrase.shape in (None, item.kind.shape)
        and phrase.colour in (None, item.kind.colour)
        and phrase.size in (None, item.kind.size)
        and phrase.texture in (None, item.kind.texture)
    )


def holds(facts: Facts, scene: Scene) -> bool:
    """Whether the facts are true: counts exact, phrases about different objects, relation and background right."""
    found = [matching(phrase, scene) for phrase in facts.phrases]
    if any(len(objects) != phrase.count for objects, phrase in zip(found, facts.phrases, strict=True)):
        return False
    if len({item for objects in found for item in objects}) != sum(map(len, found)):
        return False
    if facts.relation is not None and relation_between(found[0], found[1]) != facts.relation:
        return False
    return facts.background in (None, scene.background)


def full_facts(scene: Scene) -> Facts:
    """All kinds of object with all attributes, in a canonical order; of two kinds also their relation. No background.

    Scenes with different full facts have different full descriptions, so this is also the key by which test scenes are
    distinct.
    """
    groups = sorted(scene.groups.items())
    phrases = tuple(Phrase(len(items), kind.shape, kind.colour, kind.size, kind.texture) for kind, items in groups)
    relation = relation_between(groups[0][1], groups[1][1]) if len(groups) == 2 else None
    return Facts(phrases, relation)


def caption_facts(scene: Scene, index: int, rng: random.Random) -> tuple[Facts, bool]:
    """True facts for the scene's caption number `index`, and whether that caption is about the number of objects.

    All but the last describe the scene in full, every other one at times with its background. The last leaves things
    out, or is about a relation or numbers and little else. Such bare captions are few, because many scenes of a batch
    fit them: a contrastive loss takes the others for wrong, and learns shapes several times more slowly (docs/log.md).
    """
    if index < CAPTIONS_PER_SCENE - 1:
        return _full(scene, rng, background_share=0.5 * (index % 2)), False
    kind = rng.choice(("partial", "relation", "count"))
    related = [pair for pair in permutations(scene.groups.items(), 2) if relation_between(pair[0][1], pair[1][1])]
    if kind == "relation" and not related:  # one object alone has neither a relation nor much of a number
        kind = "count" if len(scene.objects) > 1 else "partial"
    if kind == "relation":
        return _relational(scene, rng.choice(related), rng), False
    return (_counting(scene, rng), True) if kind == "count" else (_partial(scene, rng), False)


def _phrase(kind: Kind, count: int, said: Sequence[str]) -> Phrase:
    return Phrase(count, **{name: getattr(kind, name) for name in said})


def _full(scene: Scene, rng: random.Random, background_share: float) -> Facts:
    """Full facts as a speaker says them. The background only with one or two kinds, or sentences grow too long."""
    facts = full_facts(scene)
    say_defaults = rng.random() < 0.15
    phrases = tuple(
        phrase
        if say_defaults and len(facts.phrases) <= 2
        else replace(
            phrase,
            size=None if phrase.size == "medium" else phrase.size,
            texture=None if phrase.texture == "solid" else phrase.texture,
        )
        for phrase in facts.phrases
    )
    background = scene.background if len(phrases) <= 2 and rng.random() < background_share else None
    return Facts(phrases, facts.relation, background)


_PARTIAL = (("shape",), ("colour", "shape"), ("size", "shape"), ("texture", "shape"), ("colour",), ("size", "colour"))


def _partial(scene: Scene, rng: random.Random) -> Facts:
    """Some of the objects, some of their attributes; now and then only the number of objects and the background."""
    if rng.random() < 0.15:
        return Facts((Phrase(len(scene.objects)),), background=scene.background)
    groups = list(scene.groups.items())
    chosen = rng.sample(groups, rng.randint(1, min(2, len(groups))))
    background = scene.background if rng.random() < 0.25 else None
    for _ in range(6):
        facts = Facts(tuple(_phrase(k, len(items), rng.choice(_PARTIAL)) for k, items in chosen), None, background)
        if holds(facts, scene):
            return facts
    return Facts(tuple(_phrase(k, len(items), ("colour", "shape")) for k, items in chosen), None, background)


def _relational(scene: Scene, pair: Sequence[tuple[Kind, tuple[SceneObject, ...]]], rng: random.Random) -> Facts:
    """How one kind of object lies to another, with as few of their attributes as tell them from the rest."""
    (kind_a, items_a), (kind_b, items_b) = pair
    relation = relation_between(items_a, items_b)
    for said in rng.choices((("shape",), ("colour",), ("colour", "shape")), weights=(2, 1, 1), k=2):
        facts = Facts((_phrase(kind_a, len(items_a), said), _phrase(kind_b, len(items_b), said)), relation)
        if holds(facts, scene):
            return facts
    said = ("colour", "shape")
    return Facts((_phrase(kind_a, len(items_a), said), _phrase(kind_b, len(items_b), said)), relation)


def _counting(scene: Scene, rng: random.Random) -> Facts:
    """How many: of all objects, of each shape, or of one shape, colour or kind."""
    groups = list(scene.groups.items())
    kind, items = rng.choice(groups)
    options = [
        Facts((Phrase(len(scene.objects)),)),
        Facts(tuple(_phrase(k, len(v), ("shape",)) for k, v in groups)),
        Facts((_phrase(kind, len(items), ("shape",)),)),
        Facts((_phrase(kind, len(items), ("colour",)),)),
        Facts((_phrase(kind, len(items), ("colour", "shape")),)),
    ]
    return rng.choice([facts for facts in options if holds(facts, scene)])


# -------------------------------------------------------------------------------------------------------------- English

# The first word is the standard one; a repeated word is a more frequent one.
EN_SHAPES = {
    "circle": ("circle",),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "diamond": ("diamond", "diamond", "diamond", "rhombus"),
    "cross": ("cross", "cross", "cross", "plus sign"),
    "crescent": ("crescent", "crescent", "crescent moon"),
    None: ("shape",),
}
EN_SIZES = {"small": ("small", "small", "little"), "medium": ("medium-sized",), "large": ("large", "large", "big")}
EN_TEXTURES = {
    "solid": ("solid",),
    "striped": ("striped",),
    "dotted": ("dotted", "dotted", "spotted"),
    "hollow": ("hollow", "hollow", "outlined"),
}
EN_WITH = {"striped": "with stripes", "dotted": "with dots"}
EN_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
EN_RELATIONS = {
    "left": ("to the left of", "to the left of", "on the left of", "left of"),
    "right": ("to the right of", "to the right of", "on the right of", "right of"),
    "above": ("above",),
    "below": ("below", "below", "under", "beneath"),
}
EN_PLAIN = (
    "{x}",
    "{x}",
    "a picture of {x}",
    "an image of {x}",
    "a drawing of {x}",
    "There {be} {x}.",
    "Here {be} {x}.",
    "The picture shows {x}.",
    "You can see {x}.",
)
EN_BACKGROUND = (
    "{x} on a {bg} background",
    "{x} against a {bg} background",
    "a {bg} background with {x}",
    "There {be} {x} on a {bg} background.",
    "On a {bg} background there {be} {x}.",
    "The picture shows {x} on a {bg} background.",
)
EN_COUNTING = (
    "{x}",
    "{x}",
    "exactly {x}",
    "There {be} {x}.",
    "There {be} exactly {x}.",
    "I can count {x}.",
    "The picture contains {x}.",
)


def plural(noun: str) -> str:
    """`noun` in the plural: crosses, rhombuses, stars."""
    return noun + ("es" if noun.endswith("s") else "s")


def english_phrase(phrase: Phrase, pick: Pick, *, determiner: str = "a", trailing: bool = False) -> str:
    """A noun phrase such as "an orange star", "two small striped red circles".

    determiner: "a", "one" or "the"; of several objects always the number word, after "the" if asked for.
    trailing: a texture may follow the noun ("a star with stripes").
    """
    noun = pick(EN_SHAPES[phrase.shape])
    words = [pick(EN_SIZES[phrase.size])] if phrase.size else []
    if trailing and phrase.texture in EN_WITH and pick((False, True)):
        noun_phrase = [*([phrase.colour] if phrase.colour else []), noun if phrase.count == 1 else plural(noun)]
        words += [*noun_phrase, EN_WITH[phrase.texture]]
    else:
        look = [pick(EN_TEXTURES[phrase.texture])] if phrase.texture else []
        if phrase.colour:
            look.insert(pick((1, 0)) if phrase.texture in EN_WITH else len(look), phrase.colour)
        words += [*look, noun if phrase.count == 1 else plural(noun)]
    if phrase.count > 1:
        words.insert(0, EN_NUMBERS[phrase.count])
        return " ".join(["the", *words] if determiner == "the" else words)
    if determiner == "a" and words[0][0] in "aeiou":
        determiner = "an"
    return " ".join([determiner, *words])


def join_english(items: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _be(phrase: Phrase) -> str:
    return "is" if phrase.count == 1 else "are"


def english(facts: Facts, rng: random.Random, *, counting: bool = False, ordered: float = 0.0) -> str:
    """One English wording of the facts. A sentence has a capital and a full stop; a bare noun phrase has neither.

    counting: the caption is about the numbers, so it says "one", not "a".
    ordered: how often, in [0, 1], a relation is told in the order of the colours.
    """
    if facts.relation is not None:
        text, subject = _english_relation(facts, rng, ordered)
    else:
        phrases = rng.sample(facts.phrases, len(facts.phrases))
        determiner = "one" if counting else "a"
        single = len(phrases) == 1
        text = join_english([english_phrase(p, rng.choice, determiner=determiner, trailing=single) for p in phrases])
        subject = phrases[0]
    if not text.endswith("."):
        templates = EN_COUNTING if counting else EN_BACKGROUND if facts.background else EN_PLAIN
        text = rng.choice(templates).format(x=text, be=_be(subject), bg=facts.background)
    return text[0].upper() + text[1:] if text.endswith(".") else text


def _english_relation(facts: Facts, rng: random.Random, ordered: float) -> tuple[str, Phrase]:
    """The relation as a noun phrase or, with a full stop, as a sentence; and the phrase that its verb agrees with."""
    a, b, relation = _either_way(facts, rng, ordered)
    words = rng.choice(EN_RELATIONS[relation])
    form = rng.choice(("noun", "noun", "with", "definite", "fronted"))
    if form == "definite" and facts.background is None:
        the_a, the_b = (english_phrase(phrase, rng.choice, determiner="the") for phrase in (a, b))
        return f"{the_a} {_be(a)} {words} {the_b}.", a
    text_a, text_b = english_phrase(a, rng.choice), english_phrase(b, rng.choice)
    if form == "fronted" and facts.background is None:
        return f"{words} {text_b} there {_be(a)} {text_a}.", a
    if form == "with":
        if relation in ("left", "right"):
            place = f"{rng.choice(('on', 'to'))} {'its' if b.count == 1 else 'their'} {relation}"
        else:
            place = f"{words} {'it' if b.count == 1 else 'them'}"
        return f"{text_b} with {text_a} {place}", b
    return f"{text_a} {words} {text_b}", a


def _either_way(facts: Facts, rng: random.Random, ordered: float) -> tuple[Phrase, Phrase, str]:
    """ "a left of b" or, which is the same, "b right of a"."""
    a, b = facts.phrases
    assert facts.relation is not None
    if a.colour and b.colour and a.colour != b.colour and ordered and rng.random() < ordered:
        a_first = _RANK[a.colour] < _RANK[b.colour]
    else:
        a_first = rng.random() < 0.5
    return (a, b, facts.relation) if a_first else (b, a, OPPOSITE[facts.relation])


# -------------------------------------------------------------------------------------------------------------- Chinese

ZH_SHAPES = {
    "circle": ("圆形", "圆形", "圆圈"),
    "square": ("正方形", "正方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星星", "星星", "五角星"),
    "heart": ("爱心", "爱心", "心形"),
    "diamond": ("菱形",),
    "cross": ("十字", "十字", "十字形"),
    "crescent": ("月牙", "月牙", "弯月"),
    None: ("图形",),
}
# Measure words (量词): 个 fits every shape; stars and hearts are mostly counted with 颗.
ZH_MEASURES = {"星星": ("个", "颗", "颗"), "五角星": ("个", "颗", "颗"), "爱心": ("个", "颗", "颗")}
ZH_COLOURS = {
    "red": ("红色",),
    "orange": ("橙色", "橙色", "橘色"),
    "yellow": ("黄色",),
    "green": ("绿色",),
    "cyan": ("青色",),
    "blue": ("蓝色",),
    "purple": ("紫色",),
    "pink": ("粉色", "粉色", "粉红色"),
    "brown": ("棕色", "棕色", "褐色"),
    "black": ("黑色",),
}
ZH_SIZES = {"small": ("小", "小", "小号"), "medium": ("中等大小的", "中号"), "large": ("大", "大", "大号")}
ZH_TEXTURES = {
    "solid": ("实心", "实心的"),
    "striped": ("条纹", "带条纹的"),
    "dotted": ("波点", "带圆点的"),
    "hollow": ("空心", "空心的"),
}
ZH_BACKGROUNDS = {"white": "白色", "grey": "灰色", "beige": "米色", "light blue": "浅蓝色", "light green": "浅绿色"}
ZH_NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四"}  # 两, not 二: a number before a measure word
ZH_SIDES = {
    "left": ("左边", "左边", "左侧"),
    "right": ("右边", "右边", "右侧"),
    "above": ("上方", "上方", "上面"),
    "below": ("下方", "下方", "下面"),
}
ZH_SHORT = 3  # the first templates of the lists below keep an enumeration of four under about 40 characters
ZH_PLAIN = (
    "{x}",
    "{x}",
    "图中有{x}",
    "图片里有{x}",
    "画面中有{x}",
    "这里有{x}",
    "可以看到{x}",
    "画着{x}的图片",
    "一张有{x}的图",
)
ZH_BACKGROUND = (
    "{bg}背景上的{x}",
    "{bg}背景上有{x}",
    "{bg}的背景上画着{x}",
    "{x}，背景是{bg}",
    "图中有{x}，{bg}背景",
    "背景是{bg}，上面有{x}",
)
ZH_COUNTING = ("{x}", "{x}", "图中有{x}", "一共有{x}", "正好有{x}", "数一数，有{x}", "图片里共有{x}")
ZH_RELATION_PLAIN = ("{x}", "{x}", "图中{x}", "画面里{x}")
ZH_RELATION_BACKGROUND = ("{bg}背景上，{x}", "{x}，背景是{bg}", "{bg}的背景上，{x}")


def chinese_phrase(phrase: Phrase, pick: Pick, *, numeral: bool = True, terse: bool = False) -> str:
    """A noun phrase such as 一颗橙色星星, 两个红色条纹小圆形.

    numeral=False leaves out number and measure word, as Chinese does for one known thing (红色星星在...).
    terse: the shortest forms, for enumerations of three and more.
    """
    noun = pick(ZH_SHAPES[phrase.shape])
    colour = pick(ZH_COLOURS[phrase.colour]) if phrase.colour else ""
    texture = (first if terse else pick)(ZH_TEXTURES[phrase.texture]) if phrase.texture else ""
    size = (first if terse else pick)(ZH_SIZES[phrase.size]) if phrase.size else ""
    if colour and texture.endswith("的"):
        look = texture + colour
    else:
        look = colour + texture
    if colour and not texture and not terse and pick((False, True)):
        look += "的"
    # 小 and 大 stand right before the noun (红色小圆形), 小号 and 中等大小的 before everything else.
    words = look + size + noun if size in ("小", "大") else size + look + noun
    if not numeral and phrase.count == 1:
        return words
    return ZH_NUMBERS[phrase.count] + pick(ZH_MEASURES.get(noun, ("个",))) + words


def join_chinese(items: Sequence[str]) -> str:
    """甲；甲和乙；甲、乙和丙."""
    return "和".join(filter(None, ("、".join(items[:-1]), items[-1])))


def chinese(facts: Facts, rng: random.Random, *, counting: bool = False, ordered: float = 0.0) -> str:
    """One Chinese wording of the facts, without a final full stop, as captions have it; arguments as for `english`."""
    background = ZH_BACKGROUNDS[facts.background] if facts.background else ""
    if facts.relation is not None:
        text = _chinese_relation(facts, rng, ordered)
        templates = ZH_RELATION_BACKGROUND if background else ZH_RELATION_PLAIN
    else:
        phrases = rng.sample(facts.phrases, len(facts.phrases))
        text = join_chinese([chinese_phrase(p, rng.choice, terse=len(phrases) > 2) for p in phrases])
        templates = ZH_COUNTING if counting else ZH_BACKGROUND if background else ZH_PLAIN
        if len(phrases) > 2:
            templates = templates[:ZH_SHORT]
    return rng.choice(templates).format(x=text, bg=background)


def _chinese_relation(facts: Facts, rng: random.Random, ordered: float) -> str:
    a, b, relation = _either_way(facts, rng, ordered)
    side = rng.choice(ZH_SIDES[relation])
    known = rng.random() < 0.5
    text_b = chinese_phrase(b, rng.choice, numeral=not known)
    form = rng.choice(("{a}在{b}{side}", "{a}在{b}的{side}", "{a}位于{b}{side}", "{b}的{side}有{a}", "{b}{side}是{a}"))
    # What exists or is (有, 是) is new and keeps its number; what lies somewhere (在, 位于) may be known.
    text_a = chinese_phrase(a, rng.choice, numeral=not known or form.endswith("{a}"))
    return form.format(a=text_a, b=text_b, side=side)


def caption_scene(scene: Scene, rng: random.Random, *, ordered: float = 0.0) -> tuple[list[str], list[str]]:
    """CAPTIONS_PER_SCENE captions in English and in Chinese; captions at the same index state the same facts."""
    return _captions(lambda index: caption_facts(scene, index, rng), scene, rng, ordered)


def caption_twin(scene: Scene, rng: random.Random) -> tuple[list[str], list[str]]:
    """Captions as of `caption_scene` that say the colours of two kinds of object, their relation, and no more."""
    groups = scene.groups
    phrases = tuple(_phrase(kind, len(items), ("colour",)) for kind, items in groups.items())
    facts = Facts(phrases, relation_between(*groups.values()))
    return _captions(lambda index: (facts, False), scene, rng, ORDERED_SHARE)


def _captions(
    facts_at: Callable[[int], tuple[Facts, bool]], scene: Scene, rng: random.Random, ordered: float
) -> tuple[list[str], list[str]]:
    captions_en: list[str] = []
    captions_zh: list[str] = []
    while len(captions_en) < CAPTIONS_PER_SCENE:
        facts, counting = facts_at(len(captions_en))
        assert holds(facts, scene), (facts, scene)
        text_en = english(facts, rng, counting=counting, ordered=ordered)
        text_zh = chinese(facts, rng, counting=counting, ordered=ordered)
        if text_en not in captions_en and text_zh not in captions_zh:
            captions_en.append(text_en)
            captions_zh.append(text_zh)
    return captions_en, captions_zh
