"""How the learner of `training.tokenizer` scales: a million captions, 115,244 entries, one core.

    OMP_NUM_THREADS=1 python -m benchmarks.corpus_tokenizer [CAPTIONS] [VOCAB_SIZE]

Captions: half English, half Chinese, drawn from chains of three words (characters) of Flickr8k-CN in `../shared/data`,
with made-up words in between whose frequencies have a long tail, because new kinds of words are what memory grows with.
Writes corpus_tokenizer.json beside this file.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from eval.files import write_json
from training.tokenizer import count_words, tokenizer_from_words

SHARED = Path(__file__).parents[2] / "shared" / "data" / "flickr8k_cn_train.parquet"
SYLLABLES = "ka to mi ran sel der bo ing est ver lo qu art on ish ta ne gro pli wen".split()
Chain = dict[tuple[str | None, str | None], list[str | None]]


def chain(texts: list[list[str]]) -> Chain:
    """What follows two words, None at the ends."""
    follows: Chain = defaultdict(list)
    for words in texts:
        before: tuple[str | None, str | None] = (None, None)
        for word in [*words, None]:
            follows[before].append(word)
            before = (before[1], word)
    return follows


def draw(follows: Chain, made_up: Callable[[], str], share: float, chance: random.Random) -> list[str]:
    words: list[str] = []
    before: tuple[str | None, str | None] = (None, None)
    while (word := chance.choice(follows[before])) is not None:
        before = (before[1], word)
        words.append(made_up() if chance.random() < share else word)
    return words


def captions(number: int) -> Iterator[str]:
    columns = pq.read_table(SHARED, columns=["caption_en", "caption_zh", "caption_zh_mt"]).to_pydict()
    english = chain([text.split() for texts in columns["caption_en"] for text in texts])
    names = ("caption_zh", "caption_zh_mt")
    chinese = chain([list(text) for name in names for texts in columns[name] for text in texts])
    chance = random.Random(0)

    def word() -> str:
        rest, syllables = min(int(chance.paretovariate(0.35)), 20**5 - 1), []
        while rest:
            rest, digit = divmod(rest, 20)
            syllables.append(SYLLABLES[digit])
        return "".join(syllables)

    def character() -> str:
        return chr(0x4E00 + min(int(chance.paretovariate(0.5)), 4999))

    for place in range(number):
        if place % 2:
            yield " ".join(draw(english, word, 0.08, chance))
        else:
            yield "".join(draw(chinese, character, 0.05, chance))


def main() -> None:
    number, size = (int(value) for value in (*sys.argv[1:], "1000000", "115244")[:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    drawn = sum(1 for _ in captions(number))
    drawing = time.process_time() - start
    start = time.process_time()
    words = count_words(captions(number))
    counting = time.process_time() - start - drawing
    start = time.process_time()
    tokenizer = tokenizer_from_words(words, size)
    document = {
        "command": f"python -m benchmarks.corpus_tokenizer {number} {size}",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "captions": drawn,
        "kinds_of_words": len(words),
        "entries_asked_for": size,
        "entries": len(tokenizer),
        "count_cpu_seconds": round(counting, 1),
        "learn_cpu_seconds": round(time.process_time() - start, 1),
        "memory_mb_before": before // 1024,
        "memory_mb_most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    write_json(Path(__file__).with_suffix(".json"), document)
    print(document)


if __name__ == "__main__":
    main()
