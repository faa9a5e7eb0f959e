"""How many good captions and translations the checks of training/corpus/answers.py lose, and how many bad ones pass.

    OMP_NUM_THREADS=1 python -m benchmarks.corpus_answers

Good ones: the five human captions of each photo of Flickr8k-CN's validation split in `../shared/data`, each as the new
caption for the one before it; and the machine translations of all its photos. Bad ones: the same, spoiled in the ways
models spoil them. Writes corpus_answers.json beside this file.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from eval.files import write_json
from training.corpus.answers import CaptionChecks, TranslationChecks
from training.corpus.rewrite import PROMPTS
from training.corpus.translate import PROMPT

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAMES = {"en": "caption_en", "zh": "caption_zh"}

SPOILED: dict[str, Callable[[str, str], str]] = {
    "the source again": lambda source, text: source,
    "half of the source, then the translation": lambda source, text: source[: len(source) // 2] + text,
    "its last quarter over and over": lambda source, text: text + text[-max(3, len(text) // 4) :] * 5,
    "its first two characters": lambda source, text: text[:2],
    "with an apology in front": lambda source, text: f"抱歉，我无法确定，{text}",
    "with the instructions behind": lambda source, text: f"{text} Answer with the translation alone.",
}


def translations() -> dict[str, Any]:
    pairs = []
    for split in ("train", "val"):
        rows = pq.read_table(SHARED / f"flickr8k_cn_{split}.parquet", columns=["caption_en", "caption_zh_mt"])
        for row in rows.to_pylist():
            pairs += list(zip(row["caption_en"], row["caption_zh_mt"], strict=True))
    checks, start = TranslationChecks(), time.process_time()
    reasons = Counter(checks.failure(text, source, PROMPT) or "passed" for source, text in pairs)
    seconds = time.process_time() - start
    ratios = sorted(len(text) / len(source) for source, text in pairs)
    passed = {
        kind: sum(checks.failure(spoil(source, text), source, PROMPT) is None for source, text in pairs) / len(pairs)
        for kind, spoil in SPOILED.items()
    }
    return {
        "pairs": len(pairs),
        "outcomes": dict(reasons.most_common()),
        "length_ratio": {"least": round(ratios[0], 3), "most": round(ratios[-1], 3)},
        "microseconds": round(seconds / len(pairs) * 1e6),
        "spoiled_that_pass": {kind: round(share, 4) for kind, share in passed.items()},
    }


def captions() -> dict[str, Any]:
    rows = pq.read_table(SHARED / "flickr8k_cn_val.parquet", columns=list(NAMES.values())).to_pylist()
    found: dict[str, Any] = {}
    for language, column in NAMES.items():
        pairs = [(row[column][i - 1], row[column][i]) for row in rows for i in range(5)]
        checks, start = CaptionChecks(), time.process_time()
        reasons = Counter(checks.failure(new, raw, PROMPTS[language], language) or "passed" for raw, new in pairs)
        seconds = time.process_time() - start
        outcomes = dict(reasons.most_common())
        found[language] = {"pairs": len(pairs), "outcomes": outcomes, "microseconds": round(seconds / len(pairs) * 1e6)}
    return found


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    document = {"commit": commit, "translations": translations(), "captions": captions()}
    write_json(Path(__file__).with_suffix(".json"), document)


if __name__ == "__main__":
    main()
