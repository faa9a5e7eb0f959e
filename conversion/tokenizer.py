"""`sp.model` -> a fast tokenizer with the very ids of the official slow one. Used by `python -m conversion.convert`.

The published models use GLM-10b-chinese's SentencePiece model. It is BPE, and 64,044 of its 115,244 pieces are
"user-defined symbols" (mostly whole words), which SentencePiece cuts out first, longest match from the left, before
BPE runs on what lies between. The result was the same for each of 110,338 captions in two languages and of 16,000
awkward strings; each step below says how many of them differ without it (docs/parity.md).

Known differences, all in text that Unicode would compose: a base letter followed by a combining accent (macOS file
names, `cafe` + U+0301), decomposed Hangul, half-width kana with sound marks and half-width jamo; and the
non-characters U+FDD0 and U+FDD1, which this file uses.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import TokenizersBackend

CLS, END, MASK, UNK = "[CLS]", "<|endoftext|>", "[MASK]", "[UNK]"
# Named in a text, these become their ids, and blanks around them vanish; the other bracketed names are plain symbols.
SPECIAL_TOKENS = (CLS, END, MASK, UNK)
# What the rows of the published word embeddings mean (the official tokenizer's ids).
GLM_PIECES = 115_244
GLM_IDS = {
    "<unk>": 0,
    END: 50000,
    "[SEP]": 50001,
    CLS: 50002,
    MASK: 50003,
    UNK: 50004,
    "[gMASK]": 50007,
    "[sMASK]": 50008,
}
# Unicode non-characters: no text may contain them. One marks vocabulary entries that no text may find, the other is put
# between two characters and taken out again.
UNREACHABLE, SEPARATOR = "\ufdd0", "\ufdd1"
# The official tokenizer writes a run of 2 to 10 blanks as one symbol before SentencePiece sees the text.
BLANK_RUNS = range(10, 1, -1)
# Marks, joiners, half-width sound marks and skin tones: what Unicode counts to the grapheme of the character before.
_EXTENDERS = r"[\p{M}\x{200C}\x{200D}\x{FF9E}\x{FF9F}\x{1F3FB}-\x{1F3FF}]"
NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4  # SentencePiece's piece types


@dataclass(frozen=True)
class SentencePieceModel:
    """What `sp.model` says: pieces in id order as (text, score, type), and the table of character rewrites."""

    pieces: tuple[tuple[str, float, int], ...]
    charsmap: bytes

    def texts(self, kind: int) -> list[str]:
        return [text for text, _, its_kind in self.pieces if its_kind == kind]


def glm_tokenizer(path: str | Path, max_length: int = 52) -> TokenizersBackend:
    """The tokenizer of the published models from their `sp.model`.

    Raises:
        ValueError: when the file is no SentencePiece model, or one with another vocabulary.
    """
    model = read_sentencepiece(path)
    ids = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    wrong = [f"{text} is {ids.get(text, 'missing')}, not {i}" for text, i in GLM_IDS.items() if ids.get(text) != i]
    if len(model.pieces) != GLM_PIECES:
        wrong.insert(0, f"it has {len(model.pieces):,} pieces, not {GLM_PIECES:,}")
    if wrong:
        raise ValueError(
            f"{path} is not the vocabulary of the published M2-Encoder models (GLM-10b-chinese): {'; '.join(wrong)}. "
            "Pass the sp.model that lies beside the official code (vlmo/tokenizer/sp.model)."
        )
    return wrap(build_tokenizer(model), max_length)


def wrap(tokenizer: Tokenizer, max_length: int) -> TokenizersBackend:
    """A bare tokenizer as transformers' stock class: no code of ours is needed to load it.

    Long texts lose their beginning, as in the official code. Truncation and padding are not baked into the file: they
    would override what callers of the processor ask for.
    """
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        cls_token=_special(CLS),
        eos_token=_special(END),
        pad_token=_special(END),
        mask_token=_special(MASK),
        unk_token=_special(UNK),
        model_max_length=max_length,
        truncation_side="left",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def _special(text: str) -> AddedToken:
    return AddedToken(text, normalized=False, special=True, lstrip=True, rstrip=True)


# ---- Reading the file ----------------------------------------------------------------------------------------------


def read_sentencepiece(path: str | Path) -> SentencePieceModel:
    """Reads `sentencepiece_model.proto`, the few fields that matter: a protobuf library would be a dependency for
    this alone.

    Raises:
        ValueError: when the file is not a SentencePiece model, or not of the kind that `build_tokenizer` can rebuild.
    """
    try:
        model, problems = _parse(Path(path).read_bytes())
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"{path} is not a SentencePiece model, or is cut off: {error!r}.") from error
    if not model.pieces or not model.charsmap:
        raise ValueError(f"{path} is not a SentencePiece model: it holds no pieces or no normalisation table.")
    if problems:
        raise ValueError(f"{path} is a SentencePiece model of another kind: {'; '.join(problems)}.")
    return model


def _parse(data: bytes) -> tuple[SentencePieceModel, list[str]]:
    pieces, charsmap, problems = [], b"", []
    for field, value in _fields(data):
        message = dict(_fields(value)) if field in (1, 2, 3) else {}
        if field == 1:  # SentencePiece: piece, score, type
            pieces.append((message[1].decode(), message.get(2, 0.0), message.get(3, NORMAL)))
        elif field == 2 and message.get(3, 1) != 2:  # TrainerSpec.model_type
            problems.append(f"its model_type is {message.get(3, 1)}, not 2 (BPE)")
        elif field == 3:  # NormalizerSpec
            charsmap = message.get(2, b"")
            if message.get(3, 1) != 1:
                problems.append("add_dummy_prefix is off")
            if message.get(4, 1) != 0:
                problems.append("remove_extra_whitespaces is on")
    return SentencePieceModel(tuple(pieces), charsmap), problems


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (field number, value) pairs of one protobuf message: integers, floats, or the bytes of texts and messages."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 5:
            (value,), at = struct.unpack("<f", data[at : at + 4]), at + 4
        else:
            length, at = _varint(data, at) if kind == 2 else (8, at)
            value, at = data[at : at + length], at + length
            if at > len(data):
                raise IndexError(f"a field ends at byte {at} of {len(data)}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return result, at


def rewritten_characters(charsmap: bytes) -> list[int]:
    """The code points that the normalisation table rewrites on their own.

    The table starts with a Darts double array: the length in bytes, then units of 32 bits. A unit holds its label
    in bits 0-7 (and 31), whether a key ends there in bit 8, and the offset of its children in the bits above.
    """
    (length,) = struct.unpack("<I", charsmap[:4])
    units = struct.unpack(f"<{length // 4}I", charsmap[4 : 4 + length])

    def children(unit: int) -> int:
        return (unit >> 10) << ((unit & (1 << 9)) >> 6)

    found: list[int] = []
    to_visit = [(children(units[0]), b"")]
    while to_visit:
        base, prefix = to_visit.pop()
        for label in range(1, 256):
            position = base ^ label
            unit = units[position] if position < len(units) else 0
            if unit & ((1 << 31) | 255) != label:
                continue
            key = prefix + bytes([label])
            if unit >> 8 & 1 and len(text := key.decode(errors="ignore")) == 1 and text.encode() == key:
                found.append(ord(text))
            if len(key) < 4:  # UTF-8 needs no more for one character
                to_visit.append((position ^ children(unit), key))
    return sorted(found)


# ---- Building ------------------------------------------------------------------------------------------------------


def build_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """The same ids from the `tokenizers` library: normaliser, symbols cut out, BPE, special tokens, decoder."""
    tokenizer = Tokenizer(_bpe(model))
    tokenizer.normalizer = _normalizer(model.charsmap)
    # User-defined symbols are cut out first, longest match from the left, never split and never merged with
    # neighbours. As 64,040 added tokens this would be exact too, but the file then has 18 MB and takes 4-8 s to
    # load. Without it: 37,777 of 110,338 captions differ.
    symbols = [text for text in model.texts(USER_DEFINED) if text not in SPECIAL_TOKENS]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(leftmost_longest(symbols)), behavior="isolated")
    tokenizer.add_special_tokens([_special(text) for text in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {END}",
        pair=f"{CLS} $A {END} $B {END}",
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in (CLS, END)],
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(f"<|blank_{n}|>", " " * n) for n in BLANK_RUNS]
        + [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert tokenizer.get_vocab_size() == len(model.pieces)
    return tokenizer


def _bpe(model: SentencePieceModel) -> BPE:
    """BPE over the normal pieces; `ignore_merges` maps a cut-out symbol straight to its id."""
    ids = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    scores = {text: score for text, score, kind in model.pieces if kind == NORMAL}
    (unknown,) = model.texts(UNKNOWN)
    probe = BPE(vocab=ids, merges=_merges(ids, scores), unk_token=unknown, fuse_unk=True)
    # 40 normal pieces can never come out, because a better merge always breaks them ("▁people" is "▁pe", "op",
    # "le"). But ignore_merges would find them: they are renamed in the vocabulary and keep their ids. Without it:
    # 580 of 110,338 captions differ.
    unreachable = {text for text in scores if len(probe.tokenize(text)) != 1}
    vocab = {text + UNREACHABLE if text in unreachable else text: i for text, i in ids.items()}
    reachable = {text: score for text, score in scores.items() if text not in unreachable}
    return BPE(
        vocab=vocab,
        merges=_merges(ids, reachable),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=False,
        ignore_merges=True,
    )


def _merges(ids: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """SentencePiece merges any adjacent pair whose concatenation is a piece, the best score first."""
    splits = (
        (-score, ids[text], text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    )
    return [(left, right) for _, _, left, right in sorted(splits)]


def _normalizer(charsmap: bytes) -> normalizers.Normalizer:
    """Runs of blanks, CR LF, the leading ▁, and the model's own table of rewrites (nmt_nfkc).

    `Precompiled` looks up whole graphemes and takes the first prefix that the table has, SentencePiece the longest
    at every character: so CR LF would lose its LF, and a rewritten character would take what extends its grapheme
    with it.

    Differing without: blanks 1,316 of the 16,000 strings, CR LF 657, separator 15, table 7,436 captions, ▁ all of them.
    """
    rewritten = _character_class(sorted({*rewritten_characters(charsmap), ord(" ")}))
    return normalizers.Sequence(
        [normalizers.Replace(" " * n, f"<|blank_{n}|>") for n in BLANK_RUNS]
        + [
            normalizers.Replace("\r\n", "\n\n"),
            normalizers.Prepend("▁"),
            normalizers.Replace(Regex(f"(?<={rewritten})(?={_EXTENDERS})"), SEPARATOR),
            normalizers.Precompiled(charsmap),
            normalizers.Replace(SEPARATOR, ""),
            normalizers.Replace(" ", "▁"),
        ]
    )


def _character_class(code_points: Iterable[int]) -> str:
    """Sorted code points as a regular expression's class, in ranges."""
    runs: list[list[int]] = []
    for code_point in code_points:
        if runs and runs[-1][1] == code_point - 1:
            runs[-1][1] = code_point
        else:
            runs.append([code_point, code_point])
    return "[" + "".join(f"\\x{{{a:x}}}-\\x{{{b:x}}}" for a, b in runs) + "]"


# ---- The symbols as one regular expression -------------------------------------------------------------------------

_WIDE = 12  # branches a regular expression may try one by one


def leftmost_longest(words: Iterable[str]) -> str:
    """A regular expression that matches the longest of the words at the first place where one begins.

    Alternatives written one after the other would be tried one after the other, 64,040 at every character. The
    words' trie needs one branch per character, and "longest" is the order in which an optional rest is tried.
    """
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}  # a word ends here
    return _expression(trie)


def _expression(node: dict[str, Any]) -> str:
    leaves = sorted(c for c, child in node.items() if c and set(child) == {""})
    branches = sorted((c, _escape(c) + _expression(child)) for c, child in node.items() if c and c not in set(leaves))
    parts = [_alternatives(branches)] if branches else []
    if leaves:
        parts.append(_escape(leaves[0]) if len(leaves) == 1 else _one_of(leaves))
    if not parts:
        return ""
    return "(?:" + "|".join(parts) + ")" + ("?" if "" in node else "")


def _alternatives(branches: list[tuple[str, str]]) -> str:
    """Branches by first character; behind a look-ahead per bucket where they are many, so that few are tried."""
    if len(branches) <= _WIDE:
        return "|".join(expression for _, expression in branches)
    size = max(_WIDE // 2, math.isqrt(len(branches)))
    buckets = (branches[i : i + size] for i in range(0, len(branches), size))
    return "|".join(
        f"(?={_one_of([c for c, _ in bucket])})(?:" + "|".join(expression for _, expression in bucket) + ")"
        for bucket in buckets
    )


def _one_of(characters: list[str]) -> str:
    return "[" + "".join("\\" + c if c in "\\]^-[&" else c for c in characters) + "]"


def _escape(character: str) -> str:
    return re.escape(character) if character.isascii() else character
