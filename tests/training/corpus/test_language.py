"""Languages: sure cases by hand, and that no good caption of real data is lost."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from training.corpus.language import is_broken, languages_of

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a dog", "en"),
        ("A man in a red shirt rides a horse .", "en"),
        ("TWO DOGS IN THE PARK!!!", "en"),
        ("croissant", "en"),
        ("Café in São Paulo — 3 naïve dogs", "en"),
        ("flag: Hong Kong SAR China", "en"),  # names are no evidence for another language
        ("Nike Air Max 90 (2019) men's shoe, size 10.5", "en"),
        ("a 寺 in Kyoto, seen from the south", "en"),
        ("一只狗", "zh"),
        ("自行车", "zh"),
        ("一隻小狗在雪地裡奔跑", "zh"),
        ("SOS按钮", "zh"),
        ("iPhone 15 Pro Max 手机壳", "en zh"),  # taken at its row's word
        ("优の良品 纯棉家居服", "zh"),  # one の makes no Japanese
        ("DNA", "en zh"),
        ("OK", "en zh"),
        ("2019", "en zh"),
        ("👍👍", "en zh"),
        ("公園のベンチに座っている女の子", ""),
        ("サッカー", ""),
        ("공원에서 놀고 있는 강아지", ""),
        ("Собака бежит по траве", ""),
        ("كلب يركض على العشب", ""),
        ("สุนัขตัวเล็ก", ""),
        ("Ein Hund läuft über die grüne Wiese", ""),
        ("Deux enfants jouent sur la plage avec un ballon", ""),
        ("Dos niños juegan en la playa con una pelota", ""),
        ("Due bambini giocano sulla spiaggia con una palla", ""),
        ("Uma mulher de vestido vermelho sentada em um banco", ""),
        ("Twee kinderen spelen op het strand met een bal", ""),
        ("Dwoje dzieci bawi się na plaży piłką", ""),
        ("Một con chó chạy trên cỏ xanh", ""),
        ("BIR KÖPEK ÇIMENLERIN ÜZERINDE KOŞUYOR", ""),
    ],
)
def test_by_hand(text: str, expected: str) -> None:
    assert languages_of(text) == frozenset(expected.split())


@pytest.mark.parametrize(
    "text, broken",
    [
        ("a dog\nin the park\r\n\t.", False),
        ("naïve “quotes” — 𠀀 🐱 \u200d", False),
        ("a\x00dog", True),
        ("a\x07dog", True),
        ("caf\ufffd", True),
        ("caf\x92", True),  # Windows-1252 read as Latin-1
    ],
)
def test_broken(text: str, broken: bool) -> None:
    assert is_broken(text) is broken


@pytest.mark.parametrize(
    "name, column, most",
    [
        ("flickr8k_cn_val.parquet", "caption_en", 0),
        ("flickr8k_cn_val.parquet", "caption_zh", 0),
        ("flickr8k_cn_val.parquet", "caption_zh_mt", 1),  # "雪cappedhills skiiers"
        ("emoji_bilingual.parquet", "caption_en", 0),
        ("emoji_bilingual.parquet", "caption_zh", 0),
        ("tiny_imagenet_bilingual_train.parquet", "caption_en", 0),
        ("tiny_imagenet_bilingual_train.parquet", "caption_zh", 0),
    ],
)
def test_no_real_caption_is_lost(name: str, column: str, most: int) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"needs {SHARED / name}, which is not part of the project")
    values = pq.read_table(SHARED / name, columns=[column])[column].to_pylist()
    texts = {text for value in values for text in ([value] if isinstance(value, str) else value)}
    language = "en" if column.endswith("en") else "zh"
    lost = [text for text in texts if language not in languages_of(text)]
    assert len(lost) <= most, lost
    other = {"en": "zh", "zh": "en"}[language]
    both = [text for text in texts if other in languages_of(text)]
    assert len(both) <= 0.01 * len(texts), both
