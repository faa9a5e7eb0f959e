"""Positions to batches: which samples lie there, and how they become tensors. Used by `training.data`.

Tested by `pytest tests/training/test_data.py tests/training/test_streamed_batches.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from .images import Augmentation, Decoded, PixelTransform, UnusableImage, decode
from .masking import Masker
from .order import SAMPLE, EpochOrder
from .streams import SampleStream, StreamedSource
from .tables import CaptionDataset, Row

logger = logging.getLogger(__name__)

# Samples tried for one place in a batch before the data is called unusable.
MAX_REPLACEMENTS = 100

# ---- Where a batch's samples come from


class Draw(Protocol):
    """Gives samples for positions, and says where it is."""

    def __call__(
        self, positions: Sequence[int], languages: Sequence[str], usable: Usable, skipped: Counter[str]
    ) -> list[tuple[int, Row, Decoded]]: ...

    def state(self) -> dict[str, Any] | None: ...


Usable = Callable[[Row], Decoded]
"""The image of a row; raises `UnusableImage`."""


class Plan(Protocol):
    """A source with its order: what `BatchStream` needs to know of it. Lanes are independent positions in it."""

    maker: BatchMaker
    lanes: int
    advice: str

    def open(self, lane: int, state: dict[str, Any] | None) -> Draw: ...

    def identity(self) -> dict[str, Any]: ...


@dataclasses.dataclass
class IndexedPlan:
    dataset: CaptionDataset
    maker: BatchMaker
    seed: int
    global_batch_size: int
    neighbours: int
    lanes = 1  # one position, whoever computes the batch
    advice = "Go on with the seed and the files of the run, or start a new one without it."

    def open(self, lane: int, state: dict[str, Any] | None) -> IndexedDraw:
        return IndexedDraw(self)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "indexable",
            "data": self.dataset.fingerprint,
            "seed": self.seed,
            "neighbours": self.neighbours,
        }


class IndexedDraw:
    def __init__(self, plan: IndexedPlan):
        self.dataset, self.stride = plan.dataset, plan.global_batch_size
        self.order = EpochOrder(len(plan.dataset), plan.seed, plan.neighbours)
        self.told: set[str] = set()

    def state(self) -> None:
        return None

    def __call__(
        self, positions: Sequence[int], languages: Sequence[str], usable: Usable, skipped: Counter[str]
    ) -> list[tuple[int, Row, Decoded]]:
        rows = self.dataset.rows([self.order[position] for position in positions])
        return [self._usable(p, row, usable, skipped) for p, row in zip(positions, rows, strict=True)]

    def _usable(self, position: int, row: Row, usable: Usable, skipped: Counter[str]) -> tuple[int, Row, Decoded]:
        """The row at this position, or else the row at the same place of the next global batch, the one after, ...

        Not the next row: that one is in this batch already, and would be a false negative to itself.
        """
        for _ in range(MAX_REPLACEMENTS):
            index = self.order[position]
            try:
                return index, row, usable(row)
            except UnusableImage as error:
                count_skipped(error, f"Row {index}", skipped, self.told)
            position += self.stride
            (row,) = self.dataset.rows([self.order[position]])
        raise ValueError(f"{MAX_REPLACEMENTS} rows in a row cannot be used: {dict(skipped)}.")


@dataclasses.dataclass
class StreamedPlan:
    source: StreamedSource
    maker: BatchMaker
    seed: int
    rank: int
    world_size: int
    lanes: int
    """One per worker of this rank."""
    window: int
    advice = (
        "A streamed position is exact only for the shards, ranks, workers and window it was saved with: go on with "
        "those, or leave the position out and choose another seed, so that the data come in a new order."
    )

    def open(self, lane: int, state: dict[str, Any] | None) -> StreamedDraw:
        consumer, consumers = self.rank * self.lanes + lane, self.world_size * self.lanes
        stream = SampleStream(self.source, self.maker.languages, self.seed, consumer, consumers, self.window)
        if state is not None:
            stream.load_state_dict(state)
        return StreamedDraw(stream)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "streamed",
            "data": self.source.fingerprint,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "workers": self.lanes,
            "shuffle_window": self.window,
        }


class StreamedDraw:
    def __init__(self, stream: SampleStream):
        self.stream = stream
        self.told: set[str] = set()

    def state(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def __call__(
        self, positions: Sequence[int], languages: Sequence[str], usable: Usable, skipped: Counter[str]
    ) -> list[tuple[int, Row, Decoded]]:
        picked = [self._usable(language, usable, skipped) for language in languages]
        skipped.update(self.stream.skipped)
        self.stream.skipped.clear()
        return picked

    def _usable(self, language: str, usable: Usable, skipped: Counter[str]) -> tuple[int, Row, Decoded]:
        for _ in range(MAX_REPLACEMENTS):
            place, row = self.stream.take(language)
            try:
                return place, row, usable(row)
            except UnusableImage as error:
                count_skipped(error, self.stream.source.locate(place), skipped, self.told)
        raise ValueError(f"{MAX_REPLACEMENTS} samples in a row cannot be used: {dict(skipped)}.")


def count_skipped(error: UnusableImage, what: str, skipped: Counter[str], told: set[str]) -> None:
    """Counts a sample that cannot be used; the first of each reason is told."""
    reason = error.args[0]
    skipped[reason] += 1
    if reason not in told:
        told.add(reason)
        logger.warning("%s is skipped: %s (%s). More are only counted.", what, reason, error.__cause__)


# ---- Samples to a batch


class BatchMaker:
    """Positions and a source of samples to a batch."""

    def __init__(
        self,
        processor: Any,
        cycle: list[str],
        seed: int,
        augment: Augmentation,
        flip: bool,
        draft: bool,
        masker: Masker | None,
    ):
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer
        self.transform = PixelTransform(self.image_processor, augment, flip)
        self.cycle, self.languages = cycle, list(dict.fromkeys(cycle))
        self.seed, self.draft, self.masker = seed, draft, masker

    def set_image_size(self, side: int) -> bool:
        """Whether that changes anything."""
        old = self.transform
        if (side, side) == (old.height, old.width):
            return False
        masker = self.masker
        if masker is not None and masker.num_patches:
            patch = old.width // math.isqrt(masker.num_patches)
            if side < 2 * patch or side % patch:
                raise ValueError(f"An image side must be a multiple of {patch}, at least two patches, got {side}.")
            masker = dataclasses.replace(masker, num_patches=(side // patch) ** 2)
        elif side < 1:
            raise ValueError(f"An image side must be positive, got {side}.")
        self.transform = PixelTransform(self.image_processor, old.augment, old.flip, size=(side, side))
        self.masker = masker
        return True

    def __call__(self, positions: range, draw: Draw) -> dict[str, Any]:
        generators = [np.random.default_rng((self.seed, SAMPLE, position)) for position in positions]
        wanted = [self.cycle[position % len(self.cycle)] for position in positions]
        skipped: Counter[str] = Counter()
        samples = draw(positions, wanted, self._usable, skipped)
        texts, languages = [], []
        for language, (_, row, _), generator in zip(wanted, samples, generators, strict=True):
            if not row.captions[language]:
                skipped[f"no_{language}_caption"] += 1
                language = next(other for other in self.languages if row.captions[other])
            captions = row.captions[language]
            texts.append(captions[generator.integers(len(captions))])
            languages.append(language)
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        pixel_values = self.transform([image for _, _, image in samples], generators)
        masks = self.masker(**inputs, generators=generators) if self.masker else {}
        return {
            "pixel_values": pixel_values,
            **inputs,
            **masks,
            "languages": languages,
            "rows": torch.tensor([index for index, _, _ in samples]),
            "skipped": dict(skipped),
        }

    def _usable(self, row: Row) -> Decoded:
        if not any(row.captions[language] for language in self.languages):
            raise UnusableImage("no_caption")
        return decode(row.image, (self.transform.width, self.transform.height) if self.draft else None)
