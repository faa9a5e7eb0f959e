"""Shards as endless shuffled samples, split over ranks and workers, whose position can be saved to the sample.

Tested by `pytest tests/training/test_streams.py`.

Split: all shards in a new order every epoch make one endless sequence; consumer c of C (a worker of a rank) reads the
shards at its positions c, c + C, c + 2C, ... So no two consumers read the same shard of an epoch, every sample of an
epoch comes exactly once over all of them, none ever runs out, and all read equally many shards. Where shards differ in
length, or C does not divide their number, one consumer is in the next epoch before another: the epochs then overlap in
time by about the difference.

Shuffle: `window` undecoded samples of a consumer are permuted together; a window never reaches into the next epoch.
While one is handed out the next is read, a sample for a sample, so that memory holds `window` samples per worker (4,096
of 50 kB: 200 MB) and no step waits for a whole window, except the first.

Language: a place that wants a language takes the next sample of the window that has it, so the shares of a batch are
exact as long as the window has such samples; only where it has none left, the next sample comes as it is.

Position: the place where the window started to be read, and which of its samples are handed out. A resumed consumer
reads that window again and goes on behind them: the very same samples, as long as the shards can be read as before.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .order import WINDOW, EpochOrder
from .shard_files import resolve_shards
from .shards import Fields, Found, Note, read_shard
from .tables import Row

logger = logging.getLogger(__name__)

# A sample's number: its shard's number * PLACES + its place there (row, or byte of a tar file: 1 TB at most).
PLACES = 2**40
# Shards without a sample, one after the other, that are tried before the data are called unusable.
MAX_BARREN_SHARDS = 100
# Looked at before training starts, to tell a wrong column from a damaged file.
_FIRST_SHARDS, _FIRST_SAMPLES = 3, 64
_LEFT, _TAKEN = b"01"


class StreamedSource:
    """Shards of parquet and tar files, local or remote, see `training.data.open_source`; nothing of them is kept.

    Raises:
        ValueError: if no shard is found, or the first ones give no sample with an image and a caption.
    """

    def __init__(
        self,
        files: Iterable[str | Path],
        image_column: str = "image",
        captions: Mapping[str, str] | None = None,
    ):
        self.columns = dict(captions if captions is not None else {"en": "captions_en", "zh": "captions_zh"})
        if not self.columns:
            raise ValueError("No caption column was named.")
        self.shards = resolve_shards(files)
        self.fields = Fields(image_column, self.columns)
        self._check_first()

    @property
    def languages(self) -> list[str]:
        """The languages that samples may have captions in."""
        return list(self.columns)

    @property
    def fingerprint(self) -> str:
        """Changes with the shards' names and order and with the columns; not with the folder that holds them all."""
        folder = os.path.commonprefix([shard.rpartition("/")[0] + "/" for shard in self.shards]).rpartition("/")[0]
        names = [shard[len(folder) :] for shard in self.shards]
        return hashlib.sha256(repr((names, self.fields.image_column, self.columns)).encode()).hexdigest()[:16]

    def read(self, shard: int, start: int, note: Note) -> Iterator[Found]:
        """The rows of a shard, by its number, see `read_shard`."""
        return read_shard(self.shards[shard], start, self.fields, note)

    def locate(self, number: int) -> str:
        """A sample's place, for messages."""
        shard, place = divmod(number, PLACES)
        return f"The sample at {place} of {self.shards[shard]}"

    def captions(self) -> Iterator[str]:
        """Every caption in every language that is not blank, shard by shard, for training a tokenizer."""
        for shard in range(len(self.shards)):
            for found in self.read(shard, 0, lambda reason, seen: None):
                for language in self.columns:
                    yield from found.row.captions[language]

    def _check_first(self) -> None:
        seen: list[str] = []
        for shard in range(min(_FIRST_SHARDS, len(self.shards))):
            rows = self.read(shard, 0, lambda reason, what: seen.append(f"{reason}: {what}"))
            for found in islice(rows, _FIRST_SAMPLES):
                missing = _missing(found.row, self.languages)
                if missing is None:
                    return
                seen.append(f"{missing}: {self.locate(shard * PLACES + found.place)}")
        raise ValueError(
            f"No sample at the beginning of {', '.join(self.shards[:_FIRST_SHARDS])} has an image "
            f"({self.fields.image_column!r}) and a caption ({', '.join(map(repr, self.columns.values()))}): "
            f"{seen[0] if seen else 'they are empty'}."
        )


def _missing(row: Row, languages: Sequence[str]) -> str | None:
    if not row.image:
        return "no_image"
    return None if any(row.captions[language] for language in languages) else "no_caption"


@dataclass
class _Window:
    turn: int
    """Where it starts: how many shards this consumer has read, ..."""
    start: int
    """... and where in the next one."""
    number: int
    samples: list[tuple[int, Row] | None] = field(default_factory=list)
    """None: handed out."""
    skipped: Counter[str] = field(default_factory=Counter)


class SampleStream:
    """The endless samples of one consumer.

    Args:
        source: the shards.
        languages: those that places will want; a sample without any of them is skipped.
        seed: 0 or more.
        consumer, consumers: which of how many; not more than shards.
        window: samples shuffled together.
    """

    def __init__(
        self,
        source: StreamedSource,
        languages: Sequence[str],
        seed: int,
        consumer: int,
        consumers: int,
        window: int,
    ):
        self.source, self.languages, self.seed, self.window = source, list(languages), seed, window
        self.consumer, self.consumers = consumer, consumers
        self.skipped: Counter[str] = Counter()
        """By reason, what was skipped up to the window that the last sample came from; the caller clears it."""
        self._order = EpochOrder(len(source.shards), seed)
        self._told: set[str] = set()
        self._start(_Window(turn=0, start=0, number=0))

    def take(self, language: str) -> tuple[int, Row]:
        """The next sample, with its number (see `PLACES`): one with a caption in this language if the window has one.

        Raises:
            ValueError: when MAX_BARREN_SHARDS shards in a row have no sample.
        """
        if not self._left:
            self._turn_over()
            self.skipped += self._current.skipped
        next(self._reading, None)
        for queue in (self._queues[language], self._queues[None]):
            while queue:
                place = queue.popleft()
                sample = self._current.samples[place]
                if sample is not None:
                    self._current.samples[place] = None
                    self._left -= 1
                    return sample
        raise AssertionError("a window that is not empty has a sample")

    def state_dict(self) -> dict[str, Any]:
        """Numbers and one string: where the window starts, and 1 for each of its samples that is handed out."""
        window = self._current if self._left else self._ahead
        taken = bytes(_LEFT if sample else _TAKEN for sample in window.samples) if self._left else b""
        return {"turn": window.turn, "start": window.start, "number": window.number, "taken": taken.decode()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the last sample taken before `state_dict`.

        Raises:
            ValueError: when the window that is read again has another number of samples than before.
        """
        self._start(_Window(state["turn"], state["start"], state["number"]))
        if not state["taken"]:
            return
        self._turn_over()  # what it skips was counted before
        if len(self._current.samples) != len(state["taken"]):
            raise ValueError(
                f"{len(self._current.samples)} samples were read where {len(state['taken'])} had been before: the "
                "shards have changed or cannot be read now. Restore them, or leave the data position out."
            )
        for place, mark in enumerate(state["taken"].encode()):
            if mark == _TAKEN:
                self._current.samples[place] = None
                self._left -= 1

    def _start(self, window: _Window) -> None:
        self._left = 0
        self._turn, self._offset = window.turn, window.start
        self._shard: Iterator[tuple[int, Row]] | None = None
        self._ahead, self._reading = window, self._read_into(window)

    def _turn_over(self) -> None:
        """Reads what is missing of the next window, and shuffles it; the one after begins to be read."""
        for _ in self._reading:
            pass
        self._current = window = self._ahead
        self._left = len(window.samples)
        generator = np.random.default_rng((self.seed, WINDOW, self.consumer, window.number))
        self._queues: dict[str | None, deque[int]] = {name: deque() for name in (None, *self.languages)}
        for place in generator.permutation(self._left).tolist():
            _, row = window.samples[place]
            self._queues[None].append(place)
            for language in self.languages:
                if row.captions[language]:
                    self._queues[language].append(place)
        self._ahead = _Window(self._turn, self._offset, window.number + 1)
        self._reading = self._read_into(self._ahead)

    def _read_into(self, window: _Window) -> Iterator[None]:
        """Fills a window from where the last one ended, and pauses after each sample."""
        barren = 0
        while True:
            position = self.consumer + self._turn * self.consumers
            # Left open from one window to the next: to enter a parquet row group costs its rows before.
            self._shard = self._shard or self._open(self._order[position])
            for number, row in self._shard:
                barren = 0
                window.samples.append((number, row))
                if len(window.samples) == self.window:
                    return
                yield
            self._shard, self._turn, self._offset = None, self._turn + 1, 0
            shards = self._order.num_rows
            if window.samples and (position + self.consumers) // shards != position // shards:
                return
            barren += 1
            if barren == MAX_BARREN_SHARDS:
                raise ValueError(f"{barren} shards in a row gave no sample: {dict(window.skipped)}.")

    def _open(self, shard: int) -> Iterator[tuple[int, Row]]:
        """The rest of a shard's samples; what is wrong counts for the window that is being read."""

        def note(reason: str, seen: str) -> None:
            self._ahead.skipped[reason] += 1
            if reason not in self._told:
                self._told.add(reason)
                logger.warning("%s in %s: %s. More are only counted.", reason, self.source.shards[shard], seen)

        for found in self.source.read(shard, self._offset, note):
            self._offset = found.after
            missing = _missing(found.row, self.languages)
            if missing is None:
                yield shard * PLACES + found.place, found.row
            else:
                note(missing, f"the sample at {found.place}")
