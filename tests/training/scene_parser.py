"""Reads captions back into facts, with vocabularies and sentence frames written by hand for the tests of the captions.

Strict: an unknown word, a wrong article, number, verb or measure word is an error.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Said(NamedTuple):
    """One noun phrase; None is an attribute left unsaid."""

    count: int
    shape: str | None
    colour: str | None
    size: str | None
    texture: str | None


class Statement(NamedTuple):
    """A caption's content. `relation`: (phrase, "left" or "above", phrase), turned round if it says right or below."""

    phrases: frozenset[Said]
    relation: tuple[Said, str, Said] | None
    background: str | None


def _statement(phrases: list[Said], relation: str | None, background: str | None) -> Statement:
    assert len(set(phrases)) == len(phrases), phrases
    related = None
    if relation is not None:
        a, b = phrases
        related = (
            (a, relation, b) if relation in ("left", "above") else (b, {"right": "left", "below": "above"}[relation], a)
        )
    return Statement(frozenset(phrases), related, background)


# -------------------------------------------------------------------------------------------------------------- English

EN = {
    "shape": {
        "circle": "circle",
        "square": "square",
        "triangle": "triangle",
        "star": "star",
        "heart": "heart",
        "diamond": "diamond",
        "rhombus": "diamond",
        "cross": "cross",
        "plus sign": "cross",
        "crescent": "crescent",
        "crescent moon": "crescent",
        "shape": None,
    },
    "colour": {c: c for c in "red orange yellow green cyan blue purple pink brown black".split()},
    "size": {"small": "small", "little": "small", "medium-sized": "medium", "large": "large", "big": "large"},
    "texture": {
        "solid": "solid",
        "striped": "striped",
        "dotted": "dotted",
        "spotted": "dotted",
        "hollow": "hollow",
        "outlined": "hollow",
    },
}
EN_PLURALS = {noun: noun + ("es" if noun in ("cross", "rhombus") else "s") for noun in EN["shape"]}
EN_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
EN_BACKGROUND = r"a (white|grey|beige|light blue|light green) background"
EN_FRAMES = (
    r"a picture of |an image of |a drawing of |the picture (?:shows|contains) |you can see |i can count |exactly "
    r"|(?:there|here) (?P<be>is|are) (?:exactly )?"
)
EN_SIDES = {
    "left": "(?:(?:to|on) the )?left of",
    "right": "(?:(?:to|on) the )?right of",
    "above": "above",
    "below": "below|under|beneath",
}


def parse_english(text: str) -> Statement:
    """The content of an English caption."""
    sentence = text.endswith(".")
    assert text[0].isupper() == sentence, text
    rest = text.removesuffix(".").lower()
    background = None
    if found := re.search(rf"^(?:on )?{EN_BACKGROUND} (?:with )?| (?:on|against) {EN_BACKGROUND}$", rest):
        background = found[1] or found[2]
        rest = rest[: found.start()] + rest[found.end() :]
    frame = re.match(EN_FRAMES, rest)
    rest = rest[frame.end() :] if frame else rest
    be = frame["be"] if frame else None
    phrases, relation, verb_of = _english_content(rest)
    if be is None and (found := re.search(r"\b(is|are)\b", rest)):
        be = found[1]
    if be is not None:
        assert be == ("is" if verb_of.count == 1 else "are"), text
    return _statement(phrases, relation, background)


def _english_content(rest: str) -> tuple[list[Said], str | None, Said]:
    """Phrases, the relation of the first to the second, and the phrase a verb agrees with."""
    for relation, side in EN_SIDES.items():
        if found := re.fullmatch(rf"(?:{side}) (?P<b>.+) there (?:is|are) (?P<a>.+)", rest):
            a, b = _english_phrase(found["a"]), _english_phrase(found["b"])
            return [a, b], relation, a
        place = (
            rf"(?:to|on) (?P<whose>its|their) {relation}"
            if relation in ("left", "right")
            else rf"(?:{side}) (?P<whose>it|them)"
        )
        if found := re.fullmatch(rf"(?P<b>.+) with (?P<a>.+) {place}", rest):
            a, b = _english_phrase(found["a"]), _english_phrase(found["b"])
            assert found["whose"] in (("its", "it") if b.count == 1 else ("their", "them")), rest
            return [a, b], relation, b
        if found := re.fullmatch(rf"(?P<a>.+?)(?: is| are)? (?:{side}) (?P<b>.+)", rest):
            a, b = _english_phrase(found["a"]), _english_phrase(found["b"])
            return [a, b], relation, a
    phrases = [_english_phrase(part) for part in re.split(", | and ", rest)]
    return phrases, None, phrases[0]


def _english_phrase(text: str) -> Said:
    words = text.split()
    definite = words[0] == "the"
    if definite:
        words = words[1:]
    count = EN_COUNTS.get(words[0], 1)
    if words[0] in EN_COUNTS:
        assert not definite or count > 1, text
        if words[0] in ("a", "an"):
            assert words[0] == ("an" if words[1][0] in "aeiou" else "a"), text
        words = words[1:]
    else:
        assert definite, text
    said: dict[str, str | None] = {"colour": None, "size": None, "texture": None}
    for ending, texture in (("with stripes", "striped"), ("with dots", "dotted")):
        if " ".join(words).endswith(ending):
            said["texture"], words = texture, words[:-2]
    nouns = {noun if count == 1 else EN_PLURALS[noun]: shape for noun, shape in EN["shape"].items()}
    length = 2 if " ".join(words[-2:]) in nouns else 1
    said["shape"] = nouns[" ".join(words[-length:])]
    for word in words[:-length]:
        (name,) = [name for name in ("colour", "size", "texture") if word in EN[name]]
        assert said[name] is None, text
        said[name] = EN[name][word]
    return Said(count, **said)


# -------------------------------------------------------------------------------------------------------------- Chinese

ZH = {
    "shape": {
        "圆形": "circle",
        "圆圈": "circle",
        "正方形": "square",
        "方块": "square",
        "三角形": "triangle",
        "星星": "star",
        "五角星": "star",
        "爱心": "heart",
        "心形": "heart",
        "菱形": "diamond",
        "十字": "cross",
        "十字形": "cross",
        "月牙": "crescent",
        "弯月": "crescent",
        "图形": None,
    },
    "colour": {
        "红色": "red",
        "橙色": "orange",
        "橘色": "orange",
        "黄色": "yellow",
        "绿色": "green",
        "青色": "cyan",
        "蓝色": "blue",
        "紫色": "purple",
        "粉色": "pink",
        "粉红色": "pink",
        "棕色": "brown",
        "褐色": "brown",
        "黑色": "black",
    },
    "size": {
        "小": "small",
        "小号": "small",
        "中号": "medium",
        "中等大小": "medium",
        "大": "large",
        "大号": "large",
    },
    "texture": {
        "实心": "solid",
        "条纹": "striped",
        "带条纹": "striped",
        "波点": "dotted",
        "带圆点": "dotted",
        "空心": "hollow",
    },
}
ZH_COUNTS = {"一": 1, "两": 2, "三": 3, "四": 4}
ZH_BACKGROUNDS = {"白色": "white", "灰色": "grey", "米色": "beige", "浅蓝色": "light blue", "浅绿色": "light green"}
ZH_SIDES = {"左边": "left", "左侧": "left", "右边": "right", "右侧": "right"}
ZH_SIDES |= {"上方": "above", "上面": "above", "下方": "below", "下面": "below"}
ZH_WORD = "|".join(sorted((word for words in ZH.values() for word in words), key=len, reverse=True))


def parse_chinese(text: str) -> Statement:
    """The content of a Chinese caption."""
    background = None
    colours = "|".join(ZH_BACKGROUNDS)
    frames = (
        rf"^({colours})的?背景上(?:的|有|画着|，)",
        rf"，背景是({colours})$",
        rf"，({colours})背景$",
        rf"^背景是({colours})，上面有",
    )
    for frame in frames:
        if found := re.search(frame, text):
            assert background is None
            background, text = ZH_BACKGROUNDS[found[1]], text[: found.start()] + text[found.end() :]
    text = re.sub(r"^(?:画着(?P<x>.+)的图片|一张有(?P<y>.+)的图|(?P<z>.+)的图片)$", r"\g<x>\g<y>\g<z>", text)
    text = re.sub(
        r"^(?:数一数，有|图中[有是]|图片里共?有|画面中有|这里有|可以看到|一共有|正好有|图中|画面里)", "", text
    )
    side = "|".join(ZH_SIDES)
    if found := re.fullmatch(rf"(?P<a>.+?)(?:在|位于)(?P<b>.+?)的?(?P<side>{side})", text) or re.fullmatch(
        rf"(?P<b>.+?)的?(?P<side>{side})(?:有(?=[一两三四])|是(?=[一两三四]))(?P<a>.+)", text
    ):
        return _statement(
            [_chinese_phrase(found["a"]), _chinese_phrase(found["b"])], ZH_SIDES[found["side"]], background
        )
    return _statement([_chinese_phrase(part, numeral=True) for part in re.split("[、和]", text)], None, background)


def _chinese_phrase(text: str, numeral: bool = False) -> Said:
    """A noun phrase; without number and measure word it is one known thing, where `numeral` does not forbid that."""
    said: dict[str, str | None] = {"shape": "nothing", "colour": None, "size": None, "texture": None}
    found = re.fullmatch(rf"(?:([一两三四])([个颗]))?((?:(?:{ZH_WORD})的?)*?(?:{ZH_WORD}))", text)
    assert found and (found[1] or not numeral), text
    words = re.findall(ZH_WORD, found[3])
    assert words[-1] in ZH["shape"], text
    for word in words:
        (name,) = [name for name in ZH if word in ZH[name]]
        assert said[name] in (None, "nothing"), text
        said[name] = ZH[name][word]
    if found[2] == "颗":
        assert words[-1] in ("星星", "五角星", "爱心"), text
    return Said(ZH_COUNTS[found[1]] if found[1] else 1, **said)
