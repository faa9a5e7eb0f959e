"""The stage "tokenizer": the bilingual vocabulary, learned from the captions of the training shards.

    corpus/tokenizer/tokenizer{,_config}.json     what AutoTokenizer and `training.pretrain --tokenizer` load
    corpus/tokenizer/report.json                  the vocabulary measured on captions it was not learned from

Phases: "tokenizer/count" counts the words of one shard per task, "tokenizer/learn" is one task that adds them up and
learns. Its memory grows with the kinds of words, not with the corpus: `texts` captions at most are counted. Measured
(benchmarks/corpus_tokenizer.json): a million captions take 15 s to count and 25 s to learn 44,000 pieces from, on one
core, with 1 GB. So the learner of `training.tokenizer` serves, and no other is needed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval.files import read_json, write_json

from . import shuffle
from .config import CorpusConfig
from .engine import KEPT, Counts, Report, run_stage, write_report
from .rows import PartWriter, read_rows
from .shard_writers import LANGUAGES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_SAMPLED, HELD_OUT = "not_sampled", "held_out"
REASONS = {NOT_SAMPLED: "more captions than `texts`", HELD_OUT: "kept for the measurement"}
_MEASURED = 20_000  # captions of each language that are held out at most
_MEASURED_SHARE = Fraction(1, 20)  # ... and at most this share of a language's
_WORDS = pa.schema([("word", pa.string()), ("count", pa.int64())])
_TEXTS = pa.schema([("language", pa.string()), ("text", pa.string())])
_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TokenizerSettings:
    """`tokenizer:` of the corpus file."""

    vocab_size: int = 115_244
    """Entries, special tokens included; by default those of the published tokenizer. There are fewer if the captions
    do not hold enough repeated pieces."""
    texts: int = 4_000_000
    """Captions that are learned from at most, chosen by a hash."""
    zh_share: float | None = 0.5
    """Share of Chinese among them, at the price of fewer where a language is short; None: as in the corpus."""
    lowercase: bool = True
    """Fold upper case."""
    max_length: int = 52
    """Tokens of a truncated text, special ones included (paper: 52)."""
    min_character_count: int = 3
    """Characters that occur less often are left out."""

    def __post_init__(self) -> None:
        if self.texts < 1:
            raise ValueError(f"tokenizer.texts is {self.texts}; at least 1.")
        if self.zh_share is not None and not 0 < self.zh_share < 1:
            raise ValueError(f"tokenizer.zh_share is {self.zh_share}; between 0 and 1, or null.")


def run(config: CorpusConfig) -> Report:
    """Learns the tokenizer and measures it.

    Raises:
        ValueError: if there are no shards, a language has no caption though `zh_share` wants it, the vocabulary cannot
            hold the alphabet, or the folder holds the work of other settings.
        RuntimeError: if a task failed.
    """
    settings = config.section("tokenizer", TokenizerSettings)
    folder, shards = config.output / "tokenizer", config.output / "shards"
    if not (shards / "index.json").is_file():
        raise ValueError(f"{shards} has no index.json: the tokenizer reads the shards. Run the stage `shards` first.")
    train_shards.cache_clear()
    files = train_shards(shards)
    limits = sample(read_json(shards / "index.json")["totals"]["train"]["pairs"], settings)
    counted = run_stage(
        config,
        "tokenizer/count",
        len(files),
        CountTask(shards, folder / "count", config.seed, limits, settings.lowercase),
        {"texts": settings.texts, "zh_share": settings.zh_share, "lowercase": settings.lowercase},
        after=["shards"],
    )
    learned = run_stage(
        config, "tokenizer/learn", 1, LearnTask(folder, len(files), settings), vars(settings), after=["tokenizer/count"]
    )
    measured = read_json(folder / "learn" / "measured.json")
    report = Report("tokenizer", len(files), counted.counts, vars(settings), learned.fingerprint, measured)
    write_report(folder, report)
    return report


@lru_cache(maxsize=1)
def train_shards(folder: Path) -> list[Path]:
    """The training shards of one format, listed once per process."""
    index = read_json(folder / "index.json")
    names = sorted(entry["file"] for entry in index["shards"] if entry["split"] == "train")
    formats = {name.rpartition(".")[2] for name in names}
    return [folder / name for name in names if name.endswith(min(formats))]


def sample(pairs: dict[str, int], settings: TokenizerSettings) -> dict[str, tuple[int, int]]:
    """language -> (below which pick a caption is learned from, from which on it is held out).

    Picks are uniform in [0, 2^64), so that the numbers come out right up to their square root.

    Raises:
        ValueError: if a language that is wanted has no caption.
    """
    held = {name: min(Fraction(_MEASURED, max(number, 1)), _MEASURED_SHARE) for name, number in pairs.items()}
    have = {name: number * (1 - held[name]) for name, number in pairs.items()}
    if settings.zh_share is None:
        total = sum(have.values())
        want = {name: number * min(1, settings.texts / total) if total else 0 for name, number in have.items()}
    else:
        zh = Fraction(str(settings.zh_share))
        if not all(pairs.values()):
            raise ValueError(f"tokenizer.zh_share is {settings.zh_share}, but the shards have {pairs}: set it to null.")
        texts = min(settings.texts, have["zh"] / zh, have["en"] / (1 - zh))
        want = {"zh": texts * zh, "en": texts * (1 - zh)}
    return {
        name: (int(Fraction(want[name]) / max(number, 1) * shuffle.PLACES), int((1 - held[name]) * shuffle.PLACES))
        for name, number in pairs.items()
    }


@dataclass(frozen=True)
class CountTask:
    """Counts the words of one shard; writes words/part-* and held_out/part-*."""

    shards: Path
    folder: Path
    seed: int
    limits: dict[str, tuple[int, int]]
    lowercase: bool

    def __call__(self, number: int) -> Counts:
        from training.tokenizer import count_words

        counts, name = Counts(), f"part-{number:05d}.parquet"
        with PartWriter(self.folder / "held_out" / name, _TEXTS) as held_out:

            def sampled() -> Iterator[str]:
                for identity, source, language, text in captions(train_shards(self.shards)[number]):
                    pick, _ = shuffle.hashes(self.seed, f"tokenizer:{identity}")
                    learned, held = self.limits[language]
                    outcome = KEPT if pick < learned else HELD_OUT if pick >= held else NOT_SAMPLED
                    counts.add(source, language, outcome)
                    if outcome == KEPT:
                        yield text
                    elif outcome == HELD_OUT:
                        held_out.write({"language": language, "text": text})

            words = count_words(sampled(), lowercase=self.lowercase)
        with PartWriter(self.folder / "words" / name, _WORDS) as writer:
            for word, count in sorted(words.items()):
                writer.write({"word": word, "count": count})
        return counts


@dataclass(frozen=True)
class LearnTask:
    """Adds up the words of all shards, learns the vocabulary, saves and measures it."""

    folder: Path
    shards: int
    settings: TokenizerSettings

    def __call__(self, number: int) -> Counts:
        from training.tokenizer import tokenizer_from_words

        words: Counter[str] = Counter()
        for part in self._parts("words"):
            for batch in pq.ParquetFile(part).iter_batches():
                words.update(
                    dict(zip(batch.column("word").to_pylist(), batch.column("count").to_pylist(), strict=True))
                )
        settings = self.settings
        tokenizer = tokenizer_from_words(
            words,
            settings.vocab_size,
            max_length=settings.max_length,
            lowercase=settings.lowercase,
            min_character_count=settings.min_character_count,
        )
        scratch = self.folder / "learn" / "scratch"
        tokenizer.save_pretrained(scratch)
        for name in _FILES:
            (scratch / name).replace(self.folder / name)
        shutil.rmtree(scratch)
        held_out = ((row["language"], row["text"]) for part in self._parts("held_out") for row in read_rows(part))
        measured = {"vocab_size": len(tokenizer), "words": len(words), "held_out": measure(tokenizer, held_out)}
        write_json(self.folder / "learn" / "measured.json", measured)
        return Counts()

    def _parts(self, stream: str) -> list[Path]:
        return [self.folder / "count" / stream / f"part-{number:05d}.parquet" for number in range(self.shards)]


def captions(shard: Path) -> Iterator[tuple[str, str, str, str]]:
    """(id, source, language, text) of every caption of a shard; the images are not read."""
    for row in _tar_rows(shard) if shard.suffix == ".tar" else read_rows(shard, [*_TEXT_COLUMNS]):
        for language in LANGUAGES:
            pairs = (pair for pair in row["pairs"] if pair["language"] == language)
            for pair, text in zip(pairs, row[f"captions_{language}"], strict=True):
                yield pair["id"], pair["source"], language, text


_TEXT_COLUMNS = (*(f"captions_{language}" for language in LANGUAGES), "pairs")


def _tar_rows(shard: Path) -> Iterator[dict[str, Any]]:
    import tarfile

    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                yield json.load(tar.extractfile(member))
            tar.members = []  # it would keep every header


def measure(tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """How a tokenizer does on texts, by language.

    Returns:
        language -> `texts`, `characters`; `tokens_per_text` and `tokens_per_character`, special tokens not counted;
        `unknown_tokens`, the share of tokens that stand for characters outside the vocabulary; `truncated`, the share
        of texts that are longer than the tokenizer's maximum. Only languages with a text.
    """
    sums: dict[str, Counter[str]] = {}
    longest = tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add()
    for language, text in texts:
        found = sums.setdefault(language, Counter())
        tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        found["texts"] += 1
        found["characters"] += len(text)
        found["tokens"] += len(tokens)
        found["unknown"] += tokens.count(tokenizer.unk_token_id)
        found["truncated"] += len(tokens) + special > longest
    return {
        language: {
            "texts": found["texts"],
            "characters": found["characters"],
            "tokens_per_text": found["tokens"] / found["texts"],
            "tokens_per_character": found["tokens"] / max(found["characters"], 1),
            "unknown_tokens": found["unknown"] / max(found["tokens"], 1),
            "truncated": found["truncated"] / found["texts"],
        }
        for language, found in sorted(sums.items())
    }
