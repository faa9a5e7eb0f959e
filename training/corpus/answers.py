"""Whether what a model wrote can be a caption: language, length, refusals, echoes of the prompt, repetition, names.

Pure functions of strings. Each check gives None, or the reason that is counted.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_SINGLE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_UNIT = re.compile(rf"[{_SINGLE}]|(?:(?![{_SINGLE}])[^\W\d_])+")
_LABEL = re.compile(
    r"^(?:rewritten|rewritten caption|new caption|caption|translation|chinese|description|answer|"
    r"改写后的描述|改写|描述|译文|翻译|中文翻译|中文|答案)\s*[:：]\s*",
    re.IGNORECASE,
)
_THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "『": "』", "`": "`"}
# At the start, where a model speaks of itself; inside, "cannot" is a word of captions.
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m\s+(?:sorry|unable|not able|an ai)|i am\s+(?:sorry|unable|not able|an ai)|sorry\b|"
    r"i (?:can(?:not|['’]?t| not)|do not|don['’]?t|apologi[sz]e|won['’]?t)\b|as an? (?:ai|language model|assistant)\b|"
    r"unfortunately,? i\b|there is no (?:image|picture)\b|no image (?:was|is|has been) (?:provided|attached)|"
    r"抱歉|很抱歉|非常抱歉|对不起|我无法|我不能|我没有办法|无法(?:识别|描述|改写|翻译|查看|看到|提供|确定)|"
    r"作为(?:一个|一名)?(?:人工智能|AI|语言模型|助手)|没有(?:提供)?图[片像])",
    re.IGNORECASE,
)
# A letter or Han character must be in it: 1000000 and "......" are no loops.
_CHARACTER_LOOP = re.compile(r"(?=[^\W\d_])(.{1,24}?)\1{3,}|([^\W\d_].{1,23}?)\2{3,}")
_WORD_LOOP = re.compile(r"\b([^\W\d_]\w*(?:\W+\w+){0,5})(?:\W+\1\b){2,}", re.IGNORECASE)


def clean(answer: str) -> str:
    """The caption in an answer: one line, without a reasoning model's thoughts, a label in front, or quotes around."""
    text = _THOUGHTS.sub("", answer)
    text = " ".join(text.split())
    text = _LABEL.sub("", text)
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def as_data(text: str) -> str:
    """A caption as it may stand between the tags of a prompt: it cannot close them."""
    return re.sub(r"<\s*/?\s*caption\s*>", " ", text, flags=re.IGNORECASE)


def _units(text: str) -> list[str]:
    """The text as Han, kana and hangul characters and words of other letters, so that one brand name does not outweigh
    a Chinese sentence."""
    return _UNIT.findall(text)


def han_share(text: str) -> float:
    """Han characters among these and the words of other scripts, in [0, 1]; 0 without letters."""
    units = _units(text)
    return sum(bool(_HAN.match(unit)) for unit in units) / len(units) if units else 0.0


def latin_share(text: str) -> float:
    """Words of Latin letters among these and the characters or words of other scripts, in [0, 1]; 0 without letters."""
    units = _units(text)
    return sum(unicodedata.name(unit[0], "").startswith("LATIN") for unit in units) / len(units) if units else 0.0


def is_in(text: str, language: str, share: float) -> bool:
    """Whether at least this share of the text is in the script of the language ("en" or "zh")."""
    return (han_share if language == "zh" else latin_share)(text) >= share


def is_refusal(text: str) -> bool:
    """Whether a model speaks of itself instead of writing a caption."""
    return bool(_REFUSAL.match(text))


def repeats(text: str) -> bool:
    """Whether something is said over and over, as models do when they fall into a loop: up to 24 characters four times
    in a row, up to six words three times in a row, or half of all word pairs twice."""
    if _CHARACTER_LOOP.search(text) or _WORD_LOOP.search(text):
        return True
    words = re.findall(r"[^\W_]+", text.lower())
    if han_share(text) > 0.5:
        words = _HAN.findall(text)
    pairs = list(zip(words, words[1:], strict=False))
    return len(pairs) >= 12 and len(set(pairs)) < 0.5 * len(pairs)


def leaks(text: str, prompt: str, raw: str) -> bool:
    """Whether the answer quotes the instructions: five words or ten Han characters of the prompt in a row, which are
    not also in the raw caption."""
    found = _runs(text) & _prompt_runs(prompt)
    return bool(found and found - _runs(raw))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+|" + _HAN.pattern, text.lower())
    found = set()
    for start, word in enumerate(words):
        length = 10 if _HAN.match(word) else 5
        if start + length <= len(words):
            found.add(tuple(words[start : start + length]))
    return found


_prompt_runs = lru_cache(maxsize=16)(_runs)


def numbers(text: str) -> list[str]:
    """The numbers in digits, as they are compared: full-width digits and thousands separators made plain. Not those
    inside of names such as IMG_2041 or B737."""
    plain = unicodedata.normalize("NFKC", text)
    plain = re.sub(r"(?<=\d)[,，](?=\d{3}(?!\d))", "", plain)
    found = re.findall(r"(?<![A-Za-z_\d.\-])\d+(?:\.\d+)?(?![A-Za-z_\d]*_)", plain)
    return [re.sub(r"^0+(?=\d)", "", number) for number in found]


_DIGITS = "零一二三四五六七八九"


def chinese_numeral(value: int) -> str:
    """0 .. 99,999,999 in Chinese characters: 120 -> 一百二十, 20000 -> 二万."""
    if value >= 10_000:
        rest = value % 10_000
        tail = "" if not rest else ("零" if rest < 1000 else "") + chinese_numeral(rest)
        return chinese_numeral(value // 10_000) + "万" + tail
    text, zero = "", False
    for place, unit in zip((1000, 100, 10, 1), ("千", "百", "十", ""), strict=True):
        digit = value // place % 10
        if digit:
            text += ("零" if zero and text else "") + _DIGITS[digit] + unit
            zero = False
        else:
            zero = True
    return (text or "零").removeprefix("一") if 10 <= value < 20 else text or "零"


def has_number(text: str, number: str) -> bool:
    """Whether a Chinese text says a number, in digits or characters: 12 is 十二 or 一打, 30000 is 3万 or 三万, 2 is 两,
    1984 is 一九八四."""
    if number in numbers(text):
        return True
    if "." in number:
        return False
    value = int(number) if len(number) <= 8 else -1
    forms = {"".join(_DIGITS[int(digit)] for digit in number), "".join("〇一二三四五六七八九"[int(d)] for d in number)}
    if value >= 0:
        forms |= {chinese_numeral(value), chinese_numeral(value).replace("二", "两", 1)}
    if value >= 10_000:
        myriads = Fraction(value, 10_000)
        forms |= {f"{float(myriads):g}万", f"{float(myriads):g} 万"}
    forms |= {"一打", "一对", "双"} if value in (2, 12) else set()
    return any(form in text for form in forms)


_SMALL_IN_TITLES = set("a an and as at by for from in is of on or the to vs with".split())


def names(text: str) -> list[str]:
    """Names of people, places and brands, where they can be told: in English, capitalised words that do not begin a
    sentence, in a text that is not in capitals throughout; in Chinese, Latin words and titles in 《》."""
    if han_share(text) > 0.3:
        return re.findall(r"《([^》]+)》", text) + re.findall(
            r"(?<![A-Za-z\d._])[A-Za-z][A-Za-z&'’-]+(?![A-Za-z\d._])", text
        )
    words = list(re.finditer(r"(?<![\w.])[^\W\d_][\w&'’-]*(?![\w]*\.\w)", text))
    inner = [word for word in words if not re.search(r"(?:^|[.!?:;|\-–—\"“(]\s*)$", text[: word.start()])]
    capital = [word.group() for word in inner if word.group()[0].isupper()]
    small = {word.group() for word in inner if word.group().islower()} - _SMALL_IN_TITLES
    # In a Title of a Page, or IN CAPITALS, they say nothing.
    if text.lstrip("\"'“‘(")[:1].isupper() and not small:
        return []
    return [word for word in capital if word.lower() not in ("i", "i'm", "i’m")]


def kept_share(raw: str, text: str) -> float:
    """The share of the names and numbers of the raw caption that the new one has, in [0, 1]; 1 if there are none."""
    terms = [*numbers(raw), *names(raw)]
    lowered = text.lower()
    numbers_now = set(numbers(text))
    kept = sum(
        term in numbers_now or has_number(text, term) if term[0].isdigit() else term.lower() in lowered
        for term in terms
    )
    return kept / len(terms) if terms else 1.0


def invents(raw: str, text: str) -> bool:
    """Whether the new caption has a full name (two capitalised words in a row, or a title in 《》) or a number of two
    digits or more that the raw one does not have: a model cannot see what somebody is called or when it was."""
    lowered = raw.lower()
    own = set(numbers(raw))
    if any(len(number) > 1 and number not in own and number not in raw for number in numbers(text)):
        return True
    found = names(text)
    if han_share(text) > 0.3:
        return any(f"《{name}》" in text and name not in raw for name in found)
    pairs = zip(found, found[1:], strict=False)
    return any(
        f"{first} {second}" in text and not (first.lower() in lowered and second.lower() in lowered)
        for first, second in pairs
    )


@dataclass(frozen=True)
class CaptionChecks:
    """What a rewritten caption must be."""

    script_share: float = 0.7
    """Of it, in the script of the row's language."""
    min_characters: dict[str, int] = field(default_factory=lambda: {"en": 10, "zh": 4})
    max_characters: dict[str, int] = field(default_factory=lambda: {"en": 400, "zh": 150})
    keep_terms: float = 0.5
    """Of the names and numbers of the raw caption that can be told as such; not all, since part of what pages say is
    no matter of the picture."""

    def failure(self, text: str, raw: str, prompt: str, language: str) -> str | None:
        """The reason why `text` cannot replace `raw`, or None. `prompt` is the instructions without the raw caption."""
        if not text:
            return "empty"
        if is_refusal(text):
            return "refusal"
        if len(text) > self.max_characters.get(language, 400):
            return "too_long"
        if not is_in(text, language, self.script_share):
            return "wrong_language"
        if len(text) < self.min_characters.get(language, 1):
            return "too_short"
        if leaks(text, prompt, raw):
            return "prompt_echo"
        if repeats(text):
            return "repeated"
        if kept_share(raw, text) < self.keep_terms:
            return "lost_terms"
        return "invented" if invents(raw, text) else None


@dataclass(frozen=True)
class TranslationChecks:
    """What a Chinese translation must be."""

    han_share: float = 0.5
    """Han characters by these and the words in other letters: names may stay."""
    min_ratio: float = 0.08
    """Its characters by those of the English text; measured on machine translations, see docs/corpus.md."""
    max_ratio: float = 1.0
    max_copied_words: int = 3
    """English words in a row that may stand in it again: a name."""

    def failure(self, text: str, source: str, prompt: str = "") -> str | None:
        """The reason why `text` is no translation of the English `source`, or None."""
        if not text:
            return "empty"
        if " ".join(text.lower().split()) == " ".join(source.lower().split()):
            return "untranslated"
        if is_refusal(text) and not is_refusal(source):
            return "refusal"
        if repeats(text) and not repeats(source):
            return "repeated"
        if _copies(source, text, self.max_copied_words + 1):
            return "untranslated"
        if han_share(text) < self.han_share:
            return "wrong_language"
        if not self.min_ratio <= len(text) / len(source) <= self.max_ratio:
            return "length_ratio"
        if prompt and leaks(text, prompt, source):
            return "prompt_echo"
        if not all(has_number(text, number) for number in numbers(source)):
            return "lost_numbers"
        return None


def _copies(source: str, text: str, number: int) -> bool:
    """Whether so many words of the source in a row, or all if it has fewer, stand in the text."""
    own, there = (re.findall(r"[a-z]+", part.lower()) for part in (source, text))
    number = min(number, len(own))
    runs = {tuple(own[start : start + number]) for start in range(len(own) - number + 1)}
    return number > 0 and any(tuple(there[start : start + number]) in runs for start in range(len(there) - number + 1))
