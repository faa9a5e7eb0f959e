"""Makes the shards of one bucket: the second pass of the shuffle, see `training.corpus.shuffle`."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from eval.files import write_json

from . import shuffle
from .engine import KEPT, Counts
from .shard_writers import LANGUAGES, OVERHEAD, PAIR_FIELDS, ShardWriter

SHARDS_PER_BUCKET = 4
_LICENCES = 1000  # told of in each bucket
BALANCE, VALIDATION = "balance", "validation"
"""Outcomes of a pair beside KEPT: left out for the balance of languages, in a validation shard."""


@dataclass(frozen=True)
class ShardTask:
    """Writes `<split>-<bucket>-<shard>.<format>` and `write/index/<bucket>.json` with the facts of each."""

    folder: Path
    formats: tuple[str, ...]
    bytes: int
    validation: float
    fan_out: int
    limit: tuple[str, int] | None
    """A language and the pick from which on its pairs are left out."""

    def __call__(self, number: int) -> Counts:
        files = sorted((self.folder / "scatter" / "buckets" / f"{number:05d}").glob("part-*"))
        scratch = self.folder / "write" / "scratch" / f"{number:05d}"
        shutil.rmtree(scratch, ignore_errors=True)
        made = _Made(self, number)
        if files:
            starts, groups = self._layout(files)
            made.write(self._sorted(files, groups, scratch), starts)
        shutil.rmtree(scratch, ignore_errors=True)
        document = {"shards": made.facts, "licences": _frequent(made.licences)}
        write_json(self.folder / "write" / "index" / f"{number:05d}.json", document)
        return made.counts

    def stays(self, language: str, pick: int) -> bool:
        """Whether the balance of languages leaves room for this pair."""
        return self.limit is None or language != self.limit[0] or pick < self.limit[1]

    def split(self, draw: int) -> str:
        return "validation" if draw < self._held_out else "train"

    @property
    def _held_out(self) -> int:
        return int(self.validation * shuffle.PLACES)

    def _layout(self, files: Sequence[Path]) -> tuple[dict[str, list[int]], list[int]]:
        """The places where the shards of each split begin; those where groups of images begin that fit in memory."""
        names = ["place", "draw", "pick", "image_size", "pair_size", "language"]
        keys = shuffle.read_keys(files, names)
        order = np.argsort(keys["place"], kind="stable")
        keys = {name: column[order] for name, column in keys.items()}
        places, first = np.unique(keys["place"], return_index=True)
        stays = np.ones(len(order), bool)
        if self.limit is not None:
            stays = (keys["language"] != self.limit[0]) | (keys["pick"] < np.uint64(self.limit[1]))
        texts = np.add.reduceat(np.where(stays, keys["pair_size"], 0), first)
        overhead = max(OVERHEAD[name] for name in self.formats)
        sizes = keys["image_size"][first] + texts + overhead
        held_out = keys["draw"][first] < np.uint64(self._held_out)
        left = np.add.reduceat(stays.astype(np.int64), first) > 0
        starts = {}
        for split, chosen in (("train", left & ~held_out), ("validation", left & held_out)):
            starts[split] = places[chosen][shuffle.cut(sizes[chosen], self.bytes)].tolist()
        weights = np.add.reduceat(keys["image_size"] + keys["pair_size"], first)
        most = max(2 * SHARDS_PER_BUCKET * self.bytes, 2 * int(weights.sum()) // self.fan_out)
        return starts, places[shuffle.cut(weights, most)].tolist()

    def _sorted(self, files: Sequence[Path], groups: Sequence[int], scratch: Path) -> Iterator[dict[str, Any]]:
        """All rows by place; a bucket of several groups is scattered once more, and read group by group."""
        if len(groups) == 1:
            yield from shuffle.sorted_rows(files)
            return
        begins = np.array(groups, np.uint64)
        with shuffle.Scatter(scratch, "rows.parquet") as scatter:
            for batch in shuffle.batches(files):
                places = batch.column("place").to_numpy()
                scatter.write(batch, np.searchsorted(begins, places, side="right") - 1)
        for file in sorted(scratch.glob("*/rows.parquet")):
            yield from shuffle.sorted_rows([file])
            file.unlink()


def _frequent(licences: Mapping[tuple[str, str | None], int]) -> list[tuple[str, str | None, int]]:
    """(source, licence, pairs): a column of licences may hold anything, also a different one in each row."""
    order = sorted(licences.items(), key=lambda item: (-item[1], str(item[0])))
    others: Counter[str] = Counter()
    for (source, _), pairs in order[_LICENCES:]:
        others[source] += pairs
    rest = [(source, "others", pairs) for source, pairs in sorted(others.items())]
    return [(*key, pairs) for key, pairs in order[:_LICENCES]] + rest


class _Made:
    """What becomes of the rows of a bucket: shards, their facts, and counts."""

    def __init__(self, task: ShardTask, bucket: int):
        self.task, self.bucket = task, bucket
        self.counts = Counts()
        self.licences: Counter[tuple[str, str | None]] = Counter()
        """(source, licence) -> pairs in shards."""
        self.facts: list[dict[str, Any]] = []

    def write(self, rows: Iterator[dict[str, Any]], starts: Mapping[str, Sequence[int]]) -> None:
        """Every shard of a split is a range of places; those of the two splits are written side by side."""
        open_shards: dict[str, tuple[int, ExitStack, list[ShardWriter]]] = {}
        with ExitStack() as everything:
            for (place, _), of_image in groupby(rows, lambda row: (row["place"], row["image_hash"])):
                pairs = list(of_image)
                split = self.task.split(pairs[0]["draw"])
                image = self._image(pairs, split)
                if image is None:
                    continue
                shard = bisect_right(starts[split], place) - 1
                if split not in open_shards or open_shards[split][0] != shard:
                    self._close(open_shards.pop(split, None))
                    stack = everything.enter_context(ExitStack())
                    stem = f"{split}-{self.bucket:05d}-{shard:05d}"
                    paths = [self.task.folder / f"{stem}.{name}" for name in self.task.formats]
                    open_shards[split] = (shard, stack, [stack.enter_context(ShardWriter(path)) for path in paths])
                for writer in open_shards[split][2]:
                    writer.write(image)
            for shard in open_shards.values():
                self._close(shard)
        self.facts.sort(key=lambda facts: facts["file"])

    def _close(self, shard: tuple[int, ExitStack, list[ShardWriter]] | None) -> None:
        if shard is not None:
            _, stack, writers = shard
            stack.close()
            self.facts += [writer.facts for writer in writers]

    def _image(self, pairs: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any] | None:
        """One row of a shard from all pairs of an image; None if the balance leaves none of them."""
        ids = [pair["id"] for pair in pairs]
        if len({*ids}) < len(ids):
            raise ValueError(f"An id occurs twice among {ids[:5]}: ids must be unique in the corpus.")
        left = [pair for pair in pairs if self.task.stays(pair["language"], pair["pick"])]
        for pair in pairs:
            kept = KEPT if split == "train" else VALIDATION
            outcome = kept if self.task.stays(pair["language"], pair["pick"]) else BALANCE
            self.counts.add(pair["source"], pair["language"], outcome)
        if not left:
            return None
        self.licences.update((pair["source"], pair["licence"]) for pair in left)
        captions = {
            f"captions_{name}": [pair["text"] for pair in left if pair["language"] == name] for name in LANGUAGES
        }
        measured = next((pair for pair in pairs if pair["width"] is not None), pairs[0])
        return {
            "image": next(pair["image"] for pair in pairs if pair["image"] is not None),
            **captions,
            "image_hash": pairs[0]["image_hash"],
            "width": measured["width"],
            "height": measured["height"],
            "pairs": [{name: pair[name] for name in PAIR_FIELDS} for pair in left],
        }
