"""The converted tokenizer against SentencePiece itself and against ids of the official slow tokenizer.

On the published model where `../shared` has it, and anywhere on a small model of the same kind, trained here.
"""

from __future__ import annotations

import io
import json
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, TokenizersBackend

from conversion.tokenizer import (
    GLM_IDS,
    NORMAL,
    UNREACHABLE,
    USER_DEFINED,
    SentencePieceModel,
    _bpe,
    build_tokenizer,
    glm_tokenizer,
    leftmost_longest,
    read_sentencepiece,
    rewritten_characters,
    wrap,
)

# With and without the blank in front, one inside another, signs, a bracketed name that is no special token.
SYMBOLS = [
    "[CLS]",
    "<|endoftext|>",
    "[MASK]",
    "[UNK]",
    "[SEP]",
    "▁horse",
    "▁horses",
    "▁ho",
    "骑马",
    "骑",
    "。",
    "。“",
    "--",
]
SYMBOLS += [f"<|blank_{n}|>" for n in range(2, 11)] + ["cafe", "^]", "▁a\\b", "ing"]
CORPUS = [
    "a man rides two horses along the river",
    "the horse is standing near a white fence, and a dog is running",
    "three red boats -- no people -- on a quiet lake",
    "café au lait, naïve résumé; 3.14 and 42% of 1000",
    "一个男人骑着马穿过草地。“你好”他说",
    "两只狗在海边奔跑，天空是蓝色的",
    "红色的船停在安静的湖面上",
    "привет мир, カタカナ と ひらがな 한국어",
]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """An `sp.model` with the settings of the published one (BPE, nmt_nfkc, user-defined symbols), 400 pieces."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece as oracle: pip install -e .[dev]")
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=buffer,
        vocab_size=400,
        model_type="bpe",
        user_defined_symbols=SYMBOLS,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "sp.model"
    path.write_bytes(buffer.getvalue())
    return path


@pytest.fixture(scope="module")
def glm_model(shared) -> Path:
    return shared / "parity" / "sp.model"


@pytest.fixture(scope="module")
def glm(glm_model) -> TokenizersBackend:
    return glm_tokenizer(glm_model)


def official_ids(path: Path) -> Callable[[str], list[int]]:
    """The official slow tokenizer, restated around SentencePiece: special names, runs of blanks, [CLS] and the end."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece as oracle: pip install -e .[dev]")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    special = re.compile(r"\s*(\[CLS\]|<\|endoftext\|>|\[MASK\]|\[UNK\])\s*")

    def ids(text: str) -> list[int]:
        found = [pieces.piece_to_id("[CLS]")]
        for i, part in enumerate(special.split(text)):
            if i % 2:
                found.append(pieces.piece_to_id(part))
            elif part:
                for n in range(10, 1, -1):
                    part = part.replace(" " * n, f"<|blank_{n}|>")
                found += pieces.encode(part)
        return [*found, pieces.piece_to_id("<|endoftext|>")]

    return ids


AWKWARD = [
    "",
    " ",
    "   ",
    "\n",
    "\r\n",
    "\t",
    "\u3000",
    "\u00a0",
    "\x00",
    "\u200b",
    "\ufeff",
    "▁",
    "▁▁a",
    "a" * 300,
    "狗" * 300,
]
AWKWARD += [f"a{' ' * n}b" for n in range(1, 24)] + ["  horse  ", "[MASK]", " a [MASK]  b ", "[SEP] x", "<|blank_3|>"]
AWKWARD += [
    "Ａｂｃ１２３",
    "①½㎏Ⅳﬁ",
    "🙂",
    "👍🏽",
    "👨\u200d👩\u200d👧",
    " 🏽",
    "🇨🇳",
    "한국어",
    "हिन्दी",
    "ไทย ก็",
    "مَرْحَبًا",
    "İstanbul ß",
]


def composed(text: str) -> bool:
    """Whether the text is outside the documented exceptions: nothing in it that Unicode would compose."""
    half_width = any("\uff66" <= c <= "\uff9f" or "\uffa0" <= c <= "\uffdc" for c in text)
    marks = any(unicodedata.combining(c) for c in text if ord(c) < 0x600 or 0x3099 <= ord(c) <= 0x309A)
    return unicodedata.normalize("NFC", text) == text and not half_width and not marks and "\ufdd0" not in text


def random_texts(pieces: list[str], captions: list[str], count: int, seed: int) -> list[str]:
    """Captions with awkward bits put in, pieces of the vocabulary glued together, and characters of many scripts."""
    rng = random.Random(seed)
    blocks = [
        (1, 0x7F),
        (0x80, 0x24F),
        (0x370, 0x52F),
        (0x4E00, 0x9FFF),
        (0x3000, 0x30FF),
        (0xFF00, 0xFF65),
        (0x1F300, 0x1FAFF),
    ]

    def inserted() -> str:
        caption = rng.choice(captions)
        at = rng.randint(0, len(caption))
        return caption[:at] + "".join(rng.choices(AWKWARD, k=rng.randint(1, 3))) + caption[at:]

    def glued() -> str:
        return "".join(rng.choices(pieces, k=rng.randint(1, 10)))

    def mixed() -> str:
        return "".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 15)))

    texts = [rng.choice((inserted, glued, mixed))() for _ in range(count)]
    return [text for text in texts if composed(text)]


def differing(tokenizer: TokenizersBackend, ids: Callable[[str], list[int]], texts: list[str]) -> list[str]:
    found = tokenizer(texts, verbose=False)["input_ids"]
    return [text for text, seen in zip(texts, found, strict=True) if seen != ids(text)]


# ---- The small model -----------------------------------------------------------------------------------------------


def test_small_model_equals_sentencepiece(small_model):
    model = read_sentencepiece(small_model)
    tokenizer, ids = wrap(build_tokenizer(model), 52), official_ids(small_model)
    pieces = [text.replace("▁", " ") for text in model.texts(NORMAL) + model.texts(USER_DEFINED)]
    texts = CORPUS + AWKWARD + random_texts(pieces, CORPUS, 3000, seed=1)
    assert len(texts) > 2500
    assert differing(tokenizer, ids, texts) == []


def test_saved_and_loaded_it_is_the_same(small_model, tmp_path):
    tokenizer = wrap(build_tokenizer(read_sentencepiece(small_model)), 20)
    tokenizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is TokenizersBackend
    for text in CORPUS + AWKWARD:
        assert loaded(text, truncation=True) == tokenizer(text, truncation=True)
    assert (loaded.model_max_length, loaded.truncation_side, loaded.padding_side) == (20, "left", "right")
    assert loaded.model_input_names == ["input_ids", "attention_mask"]


def test_truncation_padding_and_mask(small_model):
    tokenizer = wrap(build_tokenizer(read_sentencepiece(small_model)), 12)
    cls, end = tokenizer.cls_token_id, tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    whole = tokenizer.backend_tokenizer.encode(CORPUS[1]).ids
    batch = tokenizer([CORPUS[1], "a"], truncation=True, padding=True)
    assert batch["input_ids"][0] == [cls, *whole[-11:]]  # the beginning goes
    real = sum(batch["attention_mask"][1])
    assert batch["input_ids"][1][real - 1 :] == [end] * (13 - real)  # the end token itself is not masked
    assert len(tokenizer(CORPUS[1], verbose=False)["input_ids"]) == len(whole)  # nothing is baked in


def test_decoding(small_model):
    tokenizer = wrap(build_tokenizer(read_sentencepiece(small_model)), 52)
    for text in ("a man  rides   two horses", "两只狗在海边奔跑。“马"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


# ---- The published model -------------------------------------------------------------------------------------------


def test_every_official_case(glm, shared):
    cases = [json.loads(line) for line in (shared / "parity" / "tokenizer_cases.jsonl").open(encoding="utf-8")]
    assert len(cases) == 271
    wrong = [case["text"] for case in cases if glm(case["text"], truncation=True)["input_ids"] != case["input_ids"]]
    assert wrong == []
    assert len(glm) == 115_244 and glm.convert_tokens_to_ids(list(GLM_IDS)) == list(GLM_IDS.values())


def test_published_model_equals_sentencepiece(glm, glm_model):
    model = read_sentencepiece(glm_model)
    pieces = [text.replace("▁", " ") for text in model.texts(NORMAL) + model.texts(USER_DEFINED)]
    texts = CORPUS + AWKWARD + random_texts(pieces, CORPUS, 6000, seed=2)
    assert differing(glm, official_ids(glm_model), texts) == []


def test_the_known_exceptions_are_these(glm, glm_model):
    """Documented in conversion/tokenizer.py. A difference that goes away here may leave the list."""
    exceptions = ["minute\u0323r", "\uff76\uff9e", unicodedata.normalize("NFD", "\ud55c")]
    assert not any(map(composed, exceptions))
    assert differing(glm, official_ids(glm_model), exceptions) == exceptions


# ---- Wrong files ---------------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused(small_model):
    with pytest.raises(ValueError, match=r"it has 400 pieces, not 115,244.*\[CLS\] is \d+, not 50002"):
        glm_tokenizer(small_model)


def test_another_kind_of_model_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece as oracle: pip install -e .[dev]")
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=buffer, vocab_size=100, model_type="unigram", minloglevel=2
    )
    (tmp_path / "sp.model").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"model_type is 1, not 2 \(BPE\); remove_extra_whitespaces is on"):
        glm_tokenizer(tmp_path / "sp.model")


def test_broken_files_are_refused(small_model, tmp_path):
    whole = small_model.read_bytes()
    contents = [
        b"",
        b"hello world",
        b"\x0a\xff\xff\xff\xff\xff",
        bytes(1000),
        whole[:1000],
        whole[:-3],
        b"\x80\x02K\x01.",
    ]
    for content in contents:
        (tmp_path / "sp.model").write_bytes(content)
        with pytest.raises(ValueError, match="SentencePiece model"):
            read_sentencepiece(tmp_path / "sp.model")
    with pytest.raises(OSError):
        read_sentencepiece(tmp_path / "none.model")


# ---- The parts -----------------------------------------------------------------------------------------------------


def test_leftmost_longest_against_brute_force():
    rng = random.Random(0)
    alphabet = "ab^]-[&\\.▁中"
    for _ in range(30):
        words = {"".join(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 60))}
        split = Split(Regex(leftmost_longest(words)), behavior="isolated")
        for _ in range(30):
            text = "".join(rng.choices(alphabet, k=rng.randint(1, 20)))
            expected, at, gap = [], 0, ""
            while at < len(text):
                longest = max((word for word in words if text.startswith(word, at)), key=len, default="")
                if longest:
                    expected += [gap] * bool(gap) + [longest]
                    gap = ""
                else:
                    gap += text[at]
                at += len(longest) or 1
            expected += [gap] * bool(gap)
            assert [part for part, _ in split.pre_tokenize_str(text)] == expected, (words, text)


def test_pieces_that_bpe_never_reaches():
    """b and c merge first, so that "abcd" (of "ab" and "cd") never comes out, though it is in the vocabulary."""
    scores = {"a": -9, "b": -9, "c": -9, "d": -9, "bc": -1, "ab": -2, "cd": -3, "abcd": -4}
    pieces = [("<unk>", 0.0, 2), *((text, float(score), NORMAL) for text, score in scores.items()), ("abc", 0.0, 4)]
    bpe = _bpe(SentencePieceModel(tuple(pieces), b""))
    assert [token.value for token in bpe.tokenize("abcd")] == ["a", "bc", "d"]
    assert [token.value for token in bpe.tokenize("abc")] == ["abc"]  # a symbol, cut out before
    assert [token.value for token in bpe.tokenize("cdab")] == ["cd", "ab"]
    assert bpe.token_to_id("abcd" + UNREACHABLE) == 8 and bpe.token_to_id("abcd") is None


def test_rewritten_characters(small_model):
    found = set(map(chr, rewritten_characters(read_sentencepiece(small_model).charsmap)))
    assert {"Ａ", "①", "ﬁ", "\u3000", "\t", "\n"} <= found
    assert not found & {"a", "中", "é", "。", "🙂"}
