"""Texts with faults, good texts that a careless rule would drop, and which rule is right about an ordinary one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

GOOD: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Text:
    value: str | bytes | None
    """Bytes: what a source holds where it should hold UTF-8. None: null."""
    what: str = "as it is"
    faults: frozenset[str] = GOOD


def _faulty(what: str, value: str | bytes | None, *reasons: str) -> Text:
    return Text(value, what, frozenset(reasons))


def judged(text: Text, language: str, min_characters: dict[str, int]) -> Text:
    """An ordinary text with its fault, if it is too short."""
    if len(text.value.strip()) < min_characters[language]:
        return dataclasses.replace(text, what="short name", faults=frozenset({"short_text"}))
    return text


SHORT = {"en": _faulty("short", "cat", "short_text"), "zh": _faulty("short", "猫", "short_text")}

_BOTH = [
    _faulty("null", None, "no_text"),
    _faulty("empty", "", "short_text", "no_text"),
    _faulty("blanks", " \u3000\t \n   ", "short_text", "no_text"),
    _faulty("invalid UTF-8: latin-1", b"a photo of a caf\xe9 in the rain", "invalid_utf8"),
    _faulty("invalid UTF-8: GBK", "一只小狗在草地上奔跑".encode("gbk"), "invalid_utf8"),
    _faulty("invalid UTF-8: cut", "雪地里的小狗在奔跑".encode()[:-1], "invalid_utf8"),
    _faulty("invalid UTF-8: a surrogate", b"a photo of a dog \xed\xa0\xbd in the park", "invalid_utf8"),
    _faulty("replaced", "a photo of a caf\ufffd in the rain \ufffd", "broken_text", "wrong_language"),
    _faulty("control characters", "a photo \x00\x01\x02 of a dog", "broken_text", "wrong_language"),
    _faulty("Japanese", "公園のベンチに座っている女の子と白い犬の写真です。", "wrong_language"),
    _faulty("Korean", "공원에서 놀고 있는 강아지 사진입니다", "wrong_language"),
    _faulty("Russian", "Маленькая собака бежит по зелёной траве в парке", "wrong_language"),
    _faulty("Arabic", "صورة كلب صغير يركض في الحديقة الخضراء", "wrong_language"),
    _faulty("Thai", "สุนัขตัวเล็กกำลังวิ่งอยู่ในสวนสาธารณะ", "wrong_language"),
    _faulty("German", "Ein kleiner Hund läuft über die grüne Wiese und spielt mit dem Ball", "wrong_language"),
    _faulty("French", "Un petit chien court dans l'herbe verte avec une balle dans la gueule", "wrong_language"),
    _faulty("Spanish", "Un perro pequeño corre por la hierba verde con una pelota en la boca", "wrong_language"),
]

FAULTS = {
    "en": [
        *_BOTH,
        SHORT["en"],
        _faulty("short between blanks", "    ox      ", "short_text"),
        _faulty("Chinese", "一只棕色的小狗在草地上奔跑。", "wrong_language"),
        _faulty("Chinese name", "长颈鹿和斑马", "wrong_language"),
        _faulty("traditional Chinese", "一隻棕色的小狗在草地上奔跑。", "wrong_language"),
    ],
    "zh": [
        *_BOTH,
        SHORT["zh"],
        _faulty("short between blanks", " \u3000鹿   ", "short_text"),
        _faulty("English", "A small brown dog runs across the grass .", "wrong_language"),
        _faulty("English name", "golden retriever", "wrong_language"),
    ],
}

UNUSUAL = {
    "en": [
        Text("Café in São Paulo — 3 naïve dogs, “best friends” … €5", "accents and signs"),
        Text("Nike Air Max 90 (2019) men's running shoe, size 10.5 US / 44 EU", "a product"),
        Text("two dogs\nplaying in the snow\r\n", "line breaks"),
        Text("👍👍 great photo of a cat 🐱 sleeping", "emoji"),
        Text("croissant", "a loan word"),
        Text("A DOG IN THE PARK!!!", "capitals"),
        Text("zebra", "exactly 5 characters"),
        Text("dog " * 2000, "8,000 characters"),
    ],
    "zh": [
        Text("一只 Golden Retriever 在草地上奔跑", "an English name"),
        Text("一隻小狗在雪地裡奔跑，臺灣的海邊。", "traditional"),
        Text("iPhone 15 Pro Max 手机壳", "a product"),
        Text("①２０２４年新款：连衣裙（红色）￥99！", "wide characters"),
        Text("小狗", "exactly 2 characters"),
        Text("👍👍 可爱的猫咪 🐱", "emoji"),
        Text("两只狗\n在雪地里玩耍\r\n", "line breaks"),
        Text("SOS按钮", "more Latin letters than Chinese"),
    ],
}
