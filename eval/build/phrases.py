"""What an annotation says, in English and Chinese, from the tables. Different annotations never give the same text
within a language (tests/eval/build/test_tables.py tries them all)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from .tables import read_table

NUMBERS_EN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Before a measure word two is 两.
NUMBERS_ZH = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九", "十")


@cache
def categories() -> dict[str, dict[str, str]]:
    """The COCO categories by name, in the order of their ids."""
    return {row["name"]: row for row in read_table("coco_categories")}


def with_article(noun: str) -> str:
    """ "an airplane", "a European goldfinch", "a pair of skis"."""
    vowel = noun[0].lower() in "aeiou" and not noun.lower().startswith("eu")  # spoken "you"
    return f"{'an' if vowel else 'a'} {noun}"


def category_set(names: Sequence[str]) -> tuple[str, str]:
    """Categories that an image holds -> "a photo of a person, a bicycle and a dog.", 一张有人、自行车和狗的照片。"""
    rows = [categories()[name] for name in names]
    english = _listed([with_article(row["one"]) for row in rows], ", ", " and ")
    chinese = _listed([row["zh"] for row in rows], "、", "和")
    return f"a photo of {english}.", f"一张有{chinese}的照片。"


def category_counts(counts: Mapping[str, int]) -> tuple[str, str]:
    """{category: how many} -> "a photo of two people and one dog.", 一张有两个人和一只狗的照片。

    Numbers above ten are written as digits.
    """
    english, chinese = [], []
    for name, count in counts.items():
        row = categories()[name]
        word = NUMBERS_EN[count] if count < len(NUMBERS_EN) else str(count)
        number = NUMBERS_ZH[count] if count < len(NUMBERS_ZH) else str(count)
        english.append(f"{word} {row['one'] if count == 1 else row['many']}")
        chinese.append(f"{number}{row['measure']}{row['zh']}")
    return f"a photo of {_listed(english, ', ', ' and ')}.", f"一张有{_listed(chinese, '、', '和')}的照片。"


@cache
def _verbs() -> dict[tuple[str, str], dict[str, str]]:
    return {(row["verb"], row["object"]): row for row in read_table("hico_verbs")}


def hico_verbs() -> set[str]:
    return {verb for verb, _ in _verbs()}


def interaction(verb: str, name: str) -> tuple[str, str]:
    """A HICO verb and a COCO category -> "a photo of a person riding a bicycle.", 一张一个人正骑着自行车的照片。"""
    row = _verbs().get((verb, name)) or _verbs()[verb, "*"]
    category = categories()[name]
    english, chinese = with_article(category["one"]), category["zh"]
    if name == "person":
        english, chinese = "another person", "另一个人"
    return (
        f"a photo of a person {row['en'].replace('{o}', english)}.",
        f"一张一个人{row['zh'].replace('{o}', chinese)}的照片。",
    )


@cache
def vg_nouns() -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in read_table("vg_nouns")}


@cache
def vg_predicates() -> dict[str, dict[str, str]]:
    return {row["predicate"]: row for row in read_table("vg_predicates")}


@cache
def _contexts() -> dict[str, dict[tuple[str, str], dict[str, str]]]:
    """By noun, then by (predicate, other noun)."""
    contexts: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for row in read_table("vg_contexts"):
        contexts.setdefault(row["name"], {})[row["predicate"], row["other"]] = row
    return contexts


def relation(subject: str, predicate: str, object: str) -> tuple[str, str]:
    """A relation in the words of VG150 -> "a man wearing a hat", 男人戴着帽子."""
    worn = vg_nouns()[object]
    first, second = _noun(subject, predicate, object), _noun(object, predicate, subject)
    chinese = vg_predicates()[predicate]["zh"].format(
        s=first["zh"], o=second["zh"], wear=worn["wear"] or "穿", ride=worn["ride"] or "骑着"
    )
    return f"{first['en']} {predicate} {second['en']}", chinese


def _noun(name: str, predicate: str, other: str) -> dict[str, str]:
    if special := _contexts().get(name):
        for key in ((predicate, other), (predicate, "*"), ("*", other)):
            if key in special:
                return special[key]
    return vg_nouns()[name]


def _listed(items: Sequence[str], comma: str, last: str) -> str:
    return last.join(filter(None, [comma.join(items[:-1]), items[-1]]))
