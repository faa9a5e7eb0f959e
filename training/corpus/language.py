"""Which of the corpus's languages a text can be in, without a network: by its script, and for longer texts in Latin
letters by a model.

Made not to lose a good text: short texts and those with letters of both are taken at their row's word, and the model
is only believed when it is sure. `benchmarks/corpus_twins.json` has what is lost of captions and names.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

_HAN = re.compile(r"[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff9f]")
_LATIN = re.compile(r"[A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a]")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W\d_]+")
_SHORT_NAME = re.compile(r"\W*([A-Z]{1,6}|[A-Za-z]{1,3}[A-Z][A-Za-z]{0,2})\W*")  # DNA, OK, WiFi: Chinese has no others

# A Chinese character says as much as several letters: "iPhone 15 Pro Max 手机壳" is Chinese.
_LETTERS_PER_HAN = 5
_HAN_PER_LATIN = 0.5  # above it a text is not English any more: "a 寺 in Kyoto" is, "T恤" is not
_MAX_KANA = 0.2  # of Chinese and Japanese signs: Chinese advertising likes a の
# py3langid's log-probability of the best language less that of English, divided by the root of the bytes (its own
# scale for texts of different length). English captions of 5 words stay below 2.7, those made of foreign words below
# 4.9, sentences in other languages begin at 5.6, most at 9; names ("flag: Hong Kong SAR China": 5.6) are no evidence,
# hence the words in small letters.
_WORDS, _SMALL_WORDS, _SURE = 5, 3, 5.5


def languages_of(text: str) -> frozenset[str]:
    """Which of "en" and "zh" a text can be in: both for one without letters, none for a text in another language."""
    letters = len(_LETTER.findall(text))
    if letters == 0 or _is_short_name(text):
        return frozenset({"en", "zh"})
    if text.isascii():
        return frozenset() if _is_foreign(text) else frozenset({"en"})
    han, kana, latin = (len(script.findall(text)) for script in (_HAN, _KANA, _LATIN))
    if kana > _MAX_KANA * (han + kana) or letters - han - kana - latin > letters / 2:
        return frozenset()
    found = set()
    if han and _LETTERS_PER_HAN * han >= latin:
        found.add("zh")
    if latin and han <= _HAN_PER_LATIN * latin and not _is_foreign(text):
        found.add("en")
    return frozenset(found)


def _is_short_name(text: str) -> bool:
    return len(text) < 20 and _SHORT_NAME.fullmatch(text) is not None


def _is_foreign(text: str) -> bool:
    """Whether a text in Latin letters is surely not English."""
    words = _WORD.findall(text[:1000])
    small = sum(word[0].islower() or word.isupper() and text.isupper() for word in words)
    if len(words) < _WORDS or small < _SMALL_WORDS:
        return False
    text = text[:1000].lower()
    identifier = _identifier()
    scores = identifier._decide(text)
    english = scores[identifier.nb_classes.index("en")]
    return float(scores.max() - english) / math.sqrt(len(text.encode())) > _SURE


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # half a second, and only some corpora need it

    return LanguageIdentifier.from_model_file(MODEL_FILE)


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ufffe\uffff\ud800-\udfff]")


def is_broken(text: str) -> bool:
    """Whether a text has control characters, or signs for what was no text before us."""
    return _CONTROL.search(text) is not None
