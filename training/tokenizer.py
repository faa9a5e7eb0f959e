"""A bilingual tokenizer learned from captions, for models trained from scratch.

`python -m training.tokenizer OUT_DIR --data scenes/train-*.parquet --columns captions_en captions_zh --vocab-size 4000`
"""

from __future__ import annotations

import logging
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from .characters import BLANK, HAN
from .tables import read_captions

logger = logging.getLogger(__name__)

# The published tokenizer's special tokens; the end token is also the padding. Their ids are their places here.
SPECIAL_TOKENS = ("[CLS]", "<|endoftext|>", "[MASK]", "[UNK]", "[SEP]", "[sMASK]", "[gMASK]")
# Always in the vocabulary, so that an English word never seen in training is spelled instead of unknown. The Chinese
# marks are those that NFKC does not turn into ASCII.
_ALPHABET = BLANK + string.ascii_letters + string.digits + string.punctuation + "。、《》“”‘’—"
# What no piece may cross the ends of: runs of Chinese characters, digits, punctuation; not the apostrophe of "man's".
_BOUNDARIES = r"\p{Han}+|▁?\p{N}|▁?(?!(?<=\p{L})['’]\p{L})\p{P}"
_HAN = re.compile(f"[{HAN}]")

MAX_PIECE_LENGTH = 16
MAX_HAN_LENGTH = 3  # words of four characters and more are rare, and made of shorter ones
# Bits of branching entropy on both sides of a place that make it a boundary between Chinese words, see `_phrases`.
MAX_FREEDOM = 1.5


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_length: int = 52,
    lowercase: bool = True,
    min_character_count: int = 3,
) -> PreTrainedTokenizerBase:
    """Learns a unigram vocabulary from captions in both languages and wraps it for transformers.

    A text becomes `[CLS] pieces <|endoftext|>`; longer than `max_length` it loses its beginning; padding is on the
    right with the end token, so only `attention_mask` tells the two apart. Text is NFKC-normalised, runs of blanks
    become one, blanks at the ends go. Names of special tokens in raw text ("[MASK]") are read as these tokens, as in
    the published tokenizer; call the tokenizer with `split_special_tokens=True` to read them as text. A run of
    characters that are not in the vocabulary is one [UNK].

    The same texts give the same vocabulary, in any order. `tokenizers.UnigramTrainer` is not used for two measured
    faults: its log-probabilities differ from run to run, and a word that occurs in one form only never becomes a piece
    ("▁and" did not in 60,000 captions; 16.8 tokens per English caption of Flickr8k against 13.0 here at 4,000 pieces).

    Args:
        texts: captions; read once.
        vocab_size: rows of the vocabulary, special tokens included.
        max_length: tokens of a truncated sequence, [CLS] and end token included.
        lowercase: fold upper case. Case says little about an image, and "Red" is then never rarer than "red".
        min_character_count: characters seen less often are left out; those seen fill half of the vocabulary at most.

    Returns:
        A `TokenizersBackend` that `AutoTokenizer` loads without custom code. It has fewer than `vocab_size` entries,
        with a warning, if the texts do not hold enough repeated pieces.

    Raises:
        ValueError: for no text at all, a vocab_size that cannot hold the special tokens and the alphabet, or other
            arguments out of range.
    """
    _check(vocab_size, max_length, lowercase, min_character_count)  # before any text is read
    words = count_words(texts, lowercase=lowercase)
    return tokenizer_from_words(
        words, vocab_size, max_length=max_length, lowercase=lowercase, min_character_count=min_character_count
    )


def tokenizer_from_words(
    words: Mapping[str, int],
    vocab_size: int,
    *,
    max_length: int = 52,
    lowercase: bool = True,
    min_character_count: int = 3,
) -> PreTrainedTokenizerBase:
    """The second half of `train_tokenizer`, for texts that were counted elsewhere, by several processes.

    Args:
        words: how often each pre-token occurs, the sum of what `count_words` with this `lowercase` gave.

    Raises:
        ValueError: as `train_tokenizer`.
    """
    alphabet = _check(vocab_size, max_length, lowercase, min_character_count)
    if not words:
        raise ValueError("No text to learn from: every text is empty or blank.")
    scores = _learn_pieces(words, vocab_size - len(SPECIAL_TOKENS), alphabet, min_character_count)
    if len(scores) + len(SPECIAL_TOKENS) < vocab_size:
        logger.warning(
            "The vocabulary has %d entries instead of %d: the texts would use no more.",
            len(scores) + len(SPECIAL_TOKENS),
            vocab_size,
        )
    return _wrap(_splitter(lowercase), scores, max_length)


def count_words(texts: Iterable[str], *, lowercase: bool = True) -> Counter[str]:
    """How often each pre-token of the texts occurs: English words, numbers, marks, and runs of Chinese characters."""
    tokenizer = _splitter(lowercase)
    words: Counter[str] = Counter()
    for text, count in Counter(texts).items():
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            words[word] += count
    return words


def _check(vocab_size: int, max_length: int, lowercase: bool, min_character_count: int) -> list[str]:
    """The alphabet, if these arguments can be."""
    alphabet = sorted(set(_ALPHABET.lower() if lowercase else _ALPHABET))
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (special tokens and alphabet), got {vocab_size}.")
    if max_length < 3 or min_character_count < 1:
        raise ValueError(
            f"Expected max_length >= 3 and min_character_count >= 1, got {max_length=}, {min_character_count=}."
        )
    return alphabet


def _splitter(lowercase: bool) -> Tokenizer:
    """Without a vocabulary: what becomes of a text before it is cut into pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = _normalizer(lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(BLANK, prepend_scheme="never"), pre_tokenizers.Split(Regex(_BOUNDARIES), "isolated")]
    )
    return tokenizer


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    steps = [
        normalizers.NFKC(),
        *([normalizers.Lowercase()] if lowercase else []),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        # A blank in front, as within a sentence, so that a word has one form; Chinese has no blanks to imitate.
        normalizers.Replace(Regex(r"^(?=[^\p{Han}])"), " "),
    ]
    return normalizers.Sequence(steps)


def _learn_pieces(words: Mapping[str, int], size: int, alphabet: list[str], min_count: int) -> dict[str, float]:
    """At most `size` pieces and their log-probabilities, best first.

    Unigram training (Kudo 2018, arXiv 1804.10959) with the best segmentation of each word in place of the expectation
    over all: counts are integers, so that no order of summation can change the result.
    """
    characters = _frequent_characters(words, size // 2, alphabet, min_count)
    counts = _seed_pieces(words, characters, 20 * size)
    while True:
        for _ in range(2):
            counts = _recount(words, counts, characters)
        surplus = len(counts) - size
        if surplus <= 0:
            break
        pieces = [piece for piece in counts if len(piece) > 1]
        scores = _log_probabilities(counts)
        gain = {piece: counts[piece] * (scores[piece] - _score_without(piece, scores)) for piece in pieces}
        pieces.sort(key=lambda piece: (gain[piece], piece))
        # A few at a time, because each removal changes what the others are worth.
        for piece in pieces[: min(surplus, math.ceil(0.3 * len(pieces)))]:
            del counts[piece]
    return dict(sorted(_log_probabilities(counts).items(), key=lambda item: (-item[1], item[0])))


def _frequent_characters(words: Mapping[str, int], limit: int, alphabet: list[str], min_count: int) -> set[str]:
    """The alphabet, and the most frequent other characters with at least `min_count`, `limit` at most."""
    frequency: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            frequency[character] += count
    others = [c for c, count in frequency.items() if count >= min_count and c not in alphabet]
    others.sort(key=lambda c: (-frequency[c], c))
    return {*alphabet, *others[: max(0, limit - len(alphabet))]}


def _seed_pieces(words: Mapping[str, int], characters: set[str], limit: int) -> dict[str, int]:
    """All characters and the `limit` repeated substrings that cover most text, with their frequencies."""
    frequency: Counter[str] = Counter()
    for word, count in words.items():
        longest = MAX_HAN_LENGTH if _HAN.match(word) else MAX_PIECE_LENGTH
        for start in range(len(word)):
            for end in range(start + 1, min(start + longest, len(word)) + 1):
                if word[end - 1] not in characters:
                    break
                frequency[word[start:end]] += count
    phrases = _phrases({piece: count for piece, count in frequency.items() if _HAN.match(piece)})
    longer = [p for p, count in frequency.items() if len(p) > 1 and count > 1 and p not in phrases]
    longer.sort(key=lambda piece: (-frequency[piece] * len(piece), piece))
    return {piece: frequency[piece] for piece in (*sorted(characters), *longer[:limit])}


def _phrases(frequency: dict[str, int]) -> set[str]:
    """The Chinese strings that hold a word boundary.

    English words end at blanks; Chinese ones end where the next character is hard to guess from the left *and* the
    previous one from the right (branching entropy: Jin and Tanaka-Ishii 2006). Without this test the pieces are the
    commonest phrases of the captions ("大三角|形在中"), and a model that reads them learns neither colours nor shapes.
    """
    followers: dict[str, list[int]] = defaultdict(list)
    leaders: dict[str, list[int]] = defaultdict(list)
    for piece, count in sorted(frequency.items()):
        if len(piece) > 1:
            followers[piece[:-1]].append(count)
            leaders[piece[1:]].append(count)
    after = {piece: _entropy(counts) for piece, counts in followers.items()}
    before = {piece: _entropy(counts) for piece, counts in leaders.items()}

    def is_phrase(piece: str) -> bool:
        freedom = (min(after[piece[:i]], before[piece[i:]]) for i in range(1, len(piece)))
        return max(freedom) > MAX_FREEDOM

    return {piece for piece in frequency if len(piece) > 1 and is_phrase(piece)}


def _entropy(counts: list[int]) -> float:
    """In bits."""
    total = sum(counts)
    return -math.fsum(count / total * math.log2(count / total) for count in counts)


def _recount(words: Mapping[str, int], counts: dict[str, int], characters: set[str]) -> dict[str, int]:
    """How often each piece is used in the best segmentations under `counts`; unused pieces go, characters stay."""
    model = models.Unigram([("[UNK]", 0.0), *sorted(_log_probabilities(counts).items())], 0)
    used: Counter[str] = Counter()
    for word, count in words.items():
        for token in model.tokenize(word):
            used[token.value] += count
    return {piece: used[piece] for piece in counts if used[piece] or piece in characters}


def _log_probabilities(counts: dict[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    # Characters that only occur inside longer pieces are given half an occurrence.
    return {piece: math.log(max(count, 0.5) / total) for piece, count in counts.items()}


def _score_without(piece: str, scores: dict[str, float]) -> float:
    """The log-probability of the best segmentation of `piece` into shorter pieces."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end):
            if end - start < len(piece):
                best[end] = max(best[end], best[start] + scores.get(piece[start:end], -math.inf))
    return best[-1]


def _wrap(tokenizer: Tokenizer, scores: dict[str, float], max_length: int) -> PreTrainedTokenizerBase:
    """Model, special tokens and template around the pieces, as transformers wants them."""
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS] + list(scores.items())
    tokenizer.model = models.Unigram(vocabulary, SPECIAL_TOKENS.index("[UNK]"))
    special = {token: AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS}
    tokenizer.add_special_tokens(list(special.values()))
    start, end = SPECIAL_TOKENS[:2]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B {end}",
        special_tokens=[(start, 0), (end, 1)],
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        cls_token=special["[CLS]"],
        bos_token=special["[CLS]"],
        eos_token=special["<|endoftext|>"],
        pad_token=special["<|endoftext|>"],
        mask_token=special["[MASK]"],
        unk_token=special["[UNK]"],
        sep_token=special["[SEP]"],
        extra_special_tokens=[special["[sMASK]"], special["[gMASK]"]],
        model_max_length=max_length,
        truncation_side="left",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True)
class TokenizerArguments:
    """Learns a tokenizer from the captions of parquet files."""

    output_dir: tyro.conf.Positional[Path]
    """Folder to write; must not exist or be empty."""
    data: tuple[str, ...]
    """Parquet files, globs, or folders."""
    columns: tuple[str, ...] = ("captions_en", "captions_zh")
    """Columns with a caption or a list of captions."""
    vocab_size: int = 4000
    """Entries, special tokens included."""
    lowercase: bool = True
    """Fold upper case."""


def main(arguments: TokenizerArguments) -> None:
    """Trains, saves beside, renames, and prints what was made."""
    target = arguments.output_dir
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: choose another output folder.")
    texts: Iterator[str] = read_captions(arguments.data, arguments.columns)
    tokenizer = train_tokenizer(texts, arguments.vocab_size, lowercase=arguments.lowercase)
    beside = target.with_name(target.name + ".part")
    tokenizer.save_pretrained(beside)
    beside.replace(target)
    print(f"{target}: {len(tokenizer)} entries ({arguments.vocab_size} asked for)")


if __name__ == "__main__":
    main(tyro.cli(TokenizerArguments))
