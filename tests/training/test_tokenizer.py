"""The bilingual tokenizer: special tokens, truncation, round trips, what it learns, what it does with strange text."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.scene_captions import caption_scene
from training.scene_world import sample_scene
from training.tokenizer import SPECIAL_TOKENS, TokenizerArguments, main, train_tokenizer

COLOURS = {"red": "红色", "blue": "蓝色", "green": "绿色", "purple": "紫色", "yellow": "黄色", "black": "黑色"}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星星", "heart": "爱心"}
PLACES = {"left of": "左边", "right of": "右边", "above": "上方", "below": "下方"}
COUNTS = {"A": "一个", "Two": "两个", "Three": "三个"}


def corpus() -> list[str]:
    generator = random.Random(0)
    texts = []
    for _ in range(1500):
        c1, c2 = generator.sample(list(COLOURS), 2)
        s1, s2 = generator.sample(list(SHAPES), 2)
        count, place = generator.choice(list(COUNTS)), generator.choice(list(PLACES))
        texts.append(f"{count} {c1} {s1} is {place} a {c2} {s2}.")
        texts.append(f"{COUNTS[count]}{COLOURS[c1]}的{SHAPES[s1]}在{COLOURS[c2]}{SHAPES[s2]}的{PLACES[place]}。")
    return texts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(corpus(), 400)


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:-1]


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    named = ("cls", "bos", "eos", "pad", "mask", "unk", "sep")
    got = {name: getattr(tokenizer, f"{name}_token") for name in named}
    end = "<|endoftext|>"
    assert got == dict(zip(named, ("[CLS]", "[CLS]", end, end, "[MASK]", "[UNK]", "[SEP]"), strict=True))
    assert tokenizer.model_max_length == 52 and tokenizer.model_input_names == ["input_ids", "attention_mask"]
    ids = tokenizer("a red circle").input_ids
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.eos_token_id and len(ids) == 5


def test_words_of_the_scenes_become_pieces() -> None:
    """On the captions of the default data set: words, not characters and not phrases, in both languages."""
    generator = random.Random(0)
    texts = [text for _ in range(1500) for side in caption_scene(sample_scene(generator), generator) for text in side]
    tokenizer = train_tokenizer(texts, 2000)
    english = pieces(tokenizer, "Two purple triangles are above a red heart.")
    assert english == ["▁two", "▁purple", "▁triangles", "▁are", "▁above", "▁a", "▁red", "▁heart", "."]
    chinese = pieces(tokenizer, "两个紫色的三角形在一颗红色爱心的左边。")
    assert chinese == ["两个", "紫色", "的", "三角形", "在", "一颗", "红色", "爱心", "的", "左边", "。"]
    # No piece holds a colour and the beginning of a shape, so combinations never seen are read like all others.
    vocabulary = tokenizer.get_vocab()
    for colour in (*COLOURS, *COLOURS.values()):
        for shape in (*SHAPES, *SHAPES.values()):
            assert not any(colour in piece and shape[0] in piece.replace(colour, "") for piece in vocabulary)


def test_save_and_load_through_auto_tokenizer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*corpus()[:200], "", "   ", "[MASK] red", "unsichtbar ☃ 龘", "x" * 500]
    options = {"padding": True, "truncation": True}
    assert dict(loaded(texts, **options)) == dict(tokenizer(texts, **options))
    assert len(loaded) == len(tokenizer) and type(loaded).__name__ == "TokenizersBackend"
    assert (loaded.truncation_side, loaded.padding_side, loaded.model_max_length) == ("left", "right", 52)
    assert loaded.all_special_ids == tokenizer.all_special_ids


def test_truncation_keeps_both_ends_and_the_last_words(tokenizer: PreTrainedTokenizerBase) -> None:
    words = ["red", "blue", "circle", "square"] * 20
    full = tokenizer(" ".join(words)).input_ids
    assert len(full) == 82
    assert tokenizer(" ".join(words), truncation=True).input_ids == [full[0], *full[-51:]]
    assert tokenizer(" ".join(words), truncation=True, max_length=4).input_ids == [full[0], *full[-3:]]
    assert tokenizer(" ".join(words[:50]), truncation=True).input_ids == tokenizer(" ".join(words[:50])).input_ids


def test_padding_is_not_the_end_token_of_the_mask(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["red", "a red circle is above a blue star"], padding=True)
    assert batch.input_ids[0][2:] == [tokenizer.eos_token_id] * 8
    assert batch.attention_mask == [[1] * 3 + [0] * 7, [1] * 10]  # the real end token is attended to
    assert len(tokenizer("red", padding="max_length").input_ids) == 52


def test_empty_and_blank(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("", " ", "\t\n \u3000\u00a0"):
        assert tokenizer(text).input_ids == [tokenizer.cls_token_id, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "text", ["red " * 2500, "红色的" * 3334, "龘" * 10_000, "x" * 10_000, "☃" * 10_000, " " * 10_000]
)
def test_very_long_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, truncation=True).input_ids
    assert 2 <= len(ids) <= 52 and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.eos_token_id


def test_unknown_characters_are_marked(tokenizer: PreTrainedTokenizerBase) -> None:
    assert pieces(tokenizer, "红色☃") == ["红色", "[UNK]"]
    assert tokenizer("☃☃☃").input_ids.count(tokenizer.unk_token_id) == 1  # one for a run
    # Letters, digits and punctuation never seen are spelled.
    ids = tokenizer("Jazz qwerty 0123456789 !?#").input_ids
    assert tokenizer.unk_token_id not in ids


def test_decode_is_readable(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in (
        "a red circle is above a blue star.",
        "一个红色的圆形在蓝色正方形的左边。",
        "red 红色 star",
        "man's dog, 3!",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    # What is folded: case, blanks, compatibility forms.
    for text, shown in ((" A  RED\ncircle ", "a red circle"), ("Ｒｅｄ，红色！", "red,红色!"), ("ﬁne", "fine")):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == shown


def test_special_names_in_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in the published tokenizer they are the special tokens, unless the caller says otherwise."""
    assert pieces(tokenizer, "a [MASK] circle") == ["▁a", "[MASK]", "▁circle"]
    assert "".join(pieces(tokenizer, "a [mask] circle")) == "▁a▁[mask]▁circle"
    ids = tokenizer("a [MASK] circle", split_special_tokens=True).input_ids
    assert tokenizer.mask_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a [mask] circle"


def test_no_piece_crosses_a_boundary() -> None:
    """Chinese, digits and punctuation share no piece with their neighbours, however often they stand together."""
    texts = ["红色red", "red红色", "2024年", "red,blue", "(red) 33", "the man's 'red'", "红色，蓝色"] * 50
    tokenizer = train_tokenizer(texts, 200)
    expected = [
        ["红色", "red"],
        ["▁red", "红色"],
        ["▁2", "0", "2", "4", "年"],
        ["▁red", ",", "blue"],
        ["▁(", "red", ")", "▁3", "3"],
        ["▁the", "▁man's", "▁'", "red", "'"],
        ["红色", ",", "蓝色"],
    ]
    assert [pieces(tokenizer, text) for text in texts[:7]] == expected


def test_case_can_be_kept() -> None:
    kept = train_tokenizer(corpus(), 300, lowercase=False)
    assert pieces(kept, "A red circle") == ["▁A", "▁red", "▁circle"]
    assert kept.decode(kept("A Red").input_ids, skip_special_tokens=True) == "A Red"


def test_same_vocabulary_in_any_order_and_process(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = corpus()
    random.Random(1).shuffle(texts)
    shuffled = train_tokenizer(iter(texts), 400)
    assert shuffled.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    # In another process with other string hashes, so that no order of a set can matter.
    code = (
        "import json, sys; from training.tokenizer import train_tokenizer;"
        "print(train_tokenizer(json.load(sys.stdin), 400).backend_tokenizer.to_str())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(out.stdout) == json.loads(tokenizer.backend_tokenizer.to_str())


def test_vocabulary_size(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["".join(random.Random(i).choices("abcdefghij", k=8)) for i in range(400)] + corpus()
    exact = train_tokenizer(texts, 200)
    assert abs(len(exact) - 200) <= 3 and len(exact) <= 200
    ids = exact.get_vocab().values()
    assert sorted(ids) == list(range(len(exact)))
    caplog.clear()
    small = train_tokenizer(["a red circle"] * 2, 300)
    assert len(small) < 300 and f"{len(small)} entries instead of 300" in caplog.text


def test_characters_seen_too_rarely_are_unknown() -> None:
    texts = corpus() + ["龘"] * 2 + ["犇"] * 3
    tokenizer = train_tokenizer(texts, 400)
    assert tokenizer.unk_token_id in tokenizer("龘").input_ids
    assert tokenizer.unk_token_id not in tokenizer("犇").input_ids
    # Characters fill half of the vocabulary at most.
    many = corpus() + [chr(0x4E00 + i) for i in range(1000) for _ in range(3)]
    assert sum(len(token) == 1 for token in train_tokenizer(many, 400).get_vocab()) <= 200


@pytest.mark.parametrize(
    "texts, size, options, message",
    [
        ([], 300, {}, "No text"),
        (["", "  "], 300, {}, "No text"),
        (["red"], 50, {}, "at least"),
        (["red"], 300, {"max_length": 2}, "max_length"),
        (["red"], 300, {"min_character_count": 0}, "min_character_count"),
    ],
)
def test_bad_arguments(texts: list[str], size: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, size, **options)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = corpus()
    table = pa.table({"en": texts[::2], "zh": [[text, None, " "] for text in texts[1::2]]})
    pq.write_table(table, tmp_path / "train-0.parquet")
    arguments = TokenizerArguments(tmp_path / "out", (str(tmp_path),), ("en", "zh"), 400)
    main(arguments)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert f"{len(loaded)} entries" in capsys.readouterr().out
    assert pieces(loaded, "red 红色") == ["▁red", "▁", "红色"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train-0.parquet"]
    with pytest.raises(ValueError, match="not an empty folder"):
        main(arguments)
    with pytest.raises(ValueError, match="no column 'fr'; it has en, zh"):
        main(TokenizerArguments(tmp_path / "other", (str(tmp_path),), ("fr",), 400))
    assert not (tmp_path / "other").exists()
