"""Image-caption pairs to training batches, from any source. Tested by `pytest tests/training`.

`open_source` says what the data are, `batches` makes a `BatchStream` of them:

    source = open_source(["data/train-*.parquet"])                  # local parquet: indexable
    source = open_source(["s3://bucket/shard-{00000..09999}.tar"])   # anything else: streamed
    for batch in batches(source, processor, seed=0, global_batch_size=1024, num_steps=1000): ...

Indexable: the batch of a step is a pure function of (seed, samples before it, global batch size). Processes and workers
change nothing, and a run goes on with any number of them. Streamed: for data that cannot be indexed; exact for a fixed
number of processes and workers, see `training.streams`.

Shapes: B samples of this rank, L text tokens of the longest of them, S image side in pixels, P patches.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .images import Augmentation, PixelTransform, UnusableImage, decode_image
from .masking import Masker
from .order import SAMPLE, EpochOrder, language_cycle
from .shard_files import is_local_parquet
from .streams import SampleStream, StreamedSource
from .tables import CaptionDataset, Row, read_captions, resolve_files

__all__ = [
    "BatchStream",
    "CaptionDataset",
    "StreamedSource",
    "batches",
    "decode_image",
    "open_source",
    "read_captions",
    "resolve_files",
]

logger = logging.getLogger(__name__)

# Samples tried for one place in a batch before the data is called unusable.
MAX_REPLACEMENTS = 100
STATE_FORMAT = 1


def open_source(
    files: Iterable[str | Path],
    *,
    image_column: str = "image",
    captions: Mapping[str, str] | None = None,
    streaming: bool | Literal["auto"] = "auto",
    cache_dir: str | Path | None = None,
) -> CaptionDataset | StreamedSource:
    """The data that paths, globs, folders, URLs and Hub ids stand for.

    Args:
        files: parquet or tar (WebDataset) shards. Local paths, globs and folders; URLs of any protocol that fsspec
            knows (`hf://`, `s3://`, `https://`, `memory://`, ...; globs where the protocol can list); the id of a data
            set on the Hub (`owner/name`, its train split); with `{00000..00099}` for a range of numbers.
        image_column: column of the encoded image; in tar files the member with this extension, or else `.jpg`, `.jpeg`,
            `.png` or `.webp`.
        captions: language -> column with one caption or a list of captions; in tar files a field of the `.json` member
            or the extension of a text member ("txt", "zh.txt"). With one language, `.txt` is its caption.
        streaming: "auto" streams what is not local parquet; True streams local parquet too, which saves the Arrow copy
            that an indexable source needs on disk; False refuses what cannot be indexed.
        cache_dir: where that Arrow copy goes; by default the cache of `datasets`.

    Raises:
        ValueError: for names that match nothing, files of another kind, missing columns, or shards of which none of the
            first can be read.
    """
    files = [str(file) for file in files]
    local = all(map(is_local_parquet, files))
    if streaming is False and not local:
        raise ValueError(
            f"Only local parquet files can be indexed, not {next(f for f in files if not is_local_parquet(f))!r}: "
            "leave streaming at 'auto', or download the files."
        )
    if streaming is True or not local:
        return StreamedSource(files, image_column=image_column, captions=captions)
    return CaptionDataset(files, image_column=image_column, captions=captions, cache_dir=cache_dir)


def batches(
    source: CaptionDataset | StreamedSource,
    processor: Any,
    *,
    seed: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    num_steps: int,
    num_workers: int = 0,
    language_weights: Mapping[str, float] | None = None,
    augment: Augmentation = "none",
    flip: bool = False,
    draft: bool = True,
    neighbours: int = 1,
    shuffle_window: int = 4096,
    masker: Masker | None = None,
) -> BatchStream:
    """This rank's share of the global batches `start_step`, ..., `start_step + num_steps - 1`.

    Step s takes the positions s * global_batch_size and on of an endless sequence, and each rank a contiguous slice of
    them. The language of a position follows a fixed pattern with the weights' shares (`language_cycle`); caption,
    augmentation and masks are drawn with (seed, position). What lies at a position:

    - indexable source: sample p % n of epoch p // n, each epoch a new permutation of all n rows. The batch in which an
      epoch ends goes on with the next one.
    - streamed source: the next sample of this rank's (and worker's) own shards, see `training.streams`.

    Samples that cannot be used are replaced and counted, never dropped in silence: see `decode_image` and
    `training.shards` for the reasons, "no_caption" for a sample without one. One that only lacks the language of its
    place gives another language's caption and counts as "no_<language>_caption".

    Args:
        source: what `open_source` gives.
        processor: the model's processor; its `image_processor` defines the pixels, its `tokenizer` the tokens.
        seed: 0 or more.
        global_batch_size: samples over all ranks; a multiple of `world_size`, at most the number of rows if that is
            known.
        rank, world_size: this process among those that share each batch.
        start_step, num_steps: which steps. A resumed run passes the whole run's and calls `load_state_dict`; on an
            indexable source `start_step` alone does the same.
        num_workers: processes that read and decode ahead; 0 does it here. Changes nothing but speed for an indexable
            source; a streamed one gives every worker shards of its own.
        language_weights: share of each language of the source; equal by default.
        augment, flip: see `PixelTransform`.
        draft: decode JPEGs that are much larger than the target at a fraction of their size, see `decode_image`.
        neighbours: rows of the files that stay together when shuffled, see `EpochOrder`. Indexable sources only.
        shuffle_window: undecoded samples shuffled together per worker. Streamed sources only.
        masker: draws what the masked losses hide.

    Raises:
        ValueError: at once, for arguments that contradict each other, or fewer shards than workers over all ranks;
            while iterating, if the data cannot fill a batch.
    """
    weights = dict(language_weights) if language_weights is not None else dict.fromkeys(source.languages, 1.0)
    if set(weights) != set(source.languages):
        raise ValueError(f"language_weights names {sorted(weights)}, but the captions are in {source.languages}.")
    if global_batch_size < 1 or world_size < 1 or global_batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            "global_batch_size must be a positive multiple of world_size, and 0 <= rank < world_size, got "
            f"{global_batch_size=}, {world_size=}, {rank=}."
        )
    if seed < 0 or start_step < 0 or num_steps < 0 or num_workers < 0:
        raise ValueError(f"Expected 0 or more, got {seed=}, {start_step=}, {num_steps=}, {num_workers=}.")
    if neighbours < 1 or shuffle_window < 1:
        raise ValueError(f"Expected at least 1, got {neighbours=}, {shuffle_window=}.")
    maker = _BatchMaker(processor, language_cycle(weights), seed, augment, flip, draft, masker)
    if isinstance(source, StreamedSource):
        _check_streamed(source, world_size, max(1, num_workers), start_step, neighbours)
        plan: _Plan = _StreamedPlan(source, maker, seed, rank, world_size, max(1, num_workers), shuffle_window)
    else:
        if global_batch_size > len(source):
            raise ValueError(
                f"A global batch of {global_batch_size} would hold some of the {len(source)} rows twice: use at most "
                "that."
            )
        plan = _IndexedPlan(source, maker, seed, global_batch_size, neighbours)
    return BatchStream(plan, global_batch_size, rank, world_size, start_step, num_steps, num_workers)


def _check_streamed(source: StreamedSource, world_size: int, workers: int, start_step: int, neighbours: int) -> None:
    consumers = world_size * workers
    if len(source.shards) < consumers:
        raise ValueError(
            f"{len(source.shards)} shards cannot be split over {world_size} ranks x {workers} workers = {consumers}: "
            f"write at least {consumers} shards (several times that balances better), or use at most "
            f"{len(source.shards) // world_size} workers."
            if len(source.shards) >= world_size
            else f"{len(source.shards)} shards cannot be split over {world_size} ranks: write at least "
            f"{consumers} shards, or leave out streaming for local parquet files."
        )
    if neighbours > 1:
        raise ValueError(f"A streamed source cannot keep {neighbours} neighbours together: that needs local parquet.")
    if start_step:
        raise ValueError("A streamed source cannot start at a step: call load_state_dict with the state of that step.")


class BatchStream(Iterator[dict[str, Any]]):
    """An iterator of batches whose position can be saved and set.

    A batch holds `pixel_values` [B, 3, S, S] float32; `input_ids`, `attention_mask` [B, L] int64, padded to the longest
    of this rank; `text_mask` [B, L] and `patch_mask` [B, P] bool, as the `masker` gives them; `languages` list of B
    names; `rows` [B] int64, the samples used (row numbers; for a streamed source see `streams.PLACES`); `skipped`
    reason -> count in this rank's share.

    Made by `batches`. Workers start with the first batch.
    """

    def __init__(
        self,
        plan: _Plan,
        global_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int,
        num_steps: int,
        num_workers: int,
    ):
        self._plan, self._global_batch_size = plan, global_batch_size
        self._rank, self._world_size, self._num_workers = rank, world_size, num_workers
        self._end = start_step + num_steps
        self._step, self._samples = start_step, start_step * global_batch_size
        self._lanes: list[dict[str, Any] | None] = [None] * plan.lanes
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._step >= self._end:
            self.close()
            raise StopIteration
        if self._iterator is None:
            self._iterator = iter(self._loader())
        batch, lane, state = next(self._iterator)
        self._lanes[lane] = state
        self._step += 1
        self._samples += self._global_batch_size
        return batch

    def _loader(self) -> DataLoader:
        steps = _Steps(
            self._plan,
            range(self._step, self._end),
            self._samples,
            self._global_batch_size,
            self._rank,
            self._world_size,
            self._lanes,
        )
        if self._num_workers:
            # Without a word on it, tokenizers warns once per forked worker, and does the same.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # batch_size=None: an item is a batch already.
        return DataLoader(steps, batch_size=None, num_workers=self._num_workers, pin_memory=torch.cuda.is_available())

    def state_dict(self) -> dict[str, Any]:
        """The position just after the last batch handed out, whatever the workers have prepared beyond it.

        Numbers, strings, lists and dicts only. One per rank: the states of a streamed source differ between ranks,
        those of an indexable one do not.
        """
        return {
            "format": STATE_FORMAT,
            **self._plan.identity(),
            "step": self._step,
            "samples": self._samples,
            "lanes": list(self._lanes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where the stream that gave `state` was, until the end that `batches` was told.

        An indexable source takes the state of any world size, number of workers and batch size: the next batch begins
        with the sample after the last one that was used. A streamed source takes that of the same ones only.

        Raises:
            ValueError: for a state of other data, another seed, or (streamed) another rank, world size, number of
                workers or window; says what differs and what to do.
        """
        mine = {"format": STATE_FORMAT, **self._plan.identity()}
        other = {name: state.get(name) for name in mine if state.get(name) != mine[name]}
        if other:
            differs = "; ".join(f"{name} {value!r}, here {mine[name]!r}" for name, value in other.items())
            raise ValueError(f"The saved data position belongs to another stream: {differs}. {self._plan.advice}")
        if not 0 <= state["step"] <= self._end:
            raise ValueError(f"The saved data position is step {state['step']}, but this stream ends at {self._end}.")
        self.close()
        self._step, self._samples, self._lanes = state["step"], state["samples"], list(state["lanes"])

    def set_image_size(self, side: int) -> None:
        """From the next batch on, images of `side` x `side` pixels (and as many masked patches as they have).

        Exact also with workers: what they prepared in the old size is thrown away, and they start again from the
        position after the last batch handed out, which costs their start and a window. The same size costs nothing.
        Not part of the state: after a resume, set it again.

        Raises:
            ValueError: for a side that is not a positive multiple of the masker's patch size.
        """
        if self._plan.maker.set_image_size(side):
            self.close()

    def close(self) -> None:
        """Ends the workers; the next batch starts new ones."""
        self._iterator = None  # the loader's iterator ends its workers when nothing refers to it


class _Steps(IterableDataset):
    """(batch, lane, lane's state after it) for each step; workers take turns, and each goes on with its own lane."""

    def __init__(
        self,
        plan: _Plan,
        steps: range,
        samples: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        states: Sequence[dict[str, Any] | None],
    ):
        self.plan, self.steps, self.samples, self.states = plan, steps, samples, list(states)
        self.global_batch_size, self.size = global_batch_size, global_batch_size // world_size
        self.offset = rank * self.size

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int, dict[str, Any] | None]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader always asks its first worker first: after a resume that one takes the lane whose turn it is.
        lane = self.steps[worker] % self.plan.lanes if worker < len(self.steps) else 0
        draw = self.plan.open(lane, self.states[lane])
        for index in range(worker, len(self.steps), workers):
            start = self.samples + index * self.global_batch_size + self.offset
            batch = self.plan.maker(range(start, start + self.size), draw)
            yield batch, lane, draw.state()


# ---- Where a batch's samples come from


class _Draw(Protocol):
    """Gives samples for positions, and says where it is."""

    def __call__(
        self, positions: Sequence[int], languages: Sequence[str], usable: Usable, skipped: Counter[str]
    ) -> list[tuple[int, Row, Image.Image]]: ...

    def state(self) -> dict[str, Any] | None: ...


Usable = Callable[[Row], Image.Image]
"""The decoded image of a row; raises `UnusableImage`."""


class _Plan(Protocol):
    """A source with its order: what `BatchStream` needs to know of it. Lanes are independent positions in it."""

    maker: _BatchMaker
    lanes: int
    advice: str

    def open(self, lane: int, state: dict[str, Any] | None) -> _Draw: ...

    def identity(self) -> dict[str, Any]: ...


@dataclasses.dataclass
class _IndexedPlan:
    dataset: CaptionDataset
    maker: _BatchMaker
    seed: int
    global_batch_size: int
    neighbours: int
    lanes = 1  # one position, whoever computes the batch
    advice = "Go on with the seed and the files of the run, or start a new one without it."

    def open(self, lane: int, state: dict[str, Any] | None) -> _IndexedDraw:
        return _IndexedDraw(self)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "indexable",
            "data": self.dataset.fingerprint,
            "seed": self.seed,
            "neighbours": self.neighbours,
        }


class _IndexedDraw:
    def __init__(self, plan: _IndexedPlan):
        self.dataset, self.stride = plan.dataset, plan.global_batch_size
        self.order = EpochOrder(len(plan.dataset), plan.seed, plan.neighbours)
        self.told: set[str] = set()

    def state(self) -> None:
        return None

    def __call__(
        self, positions: Sequence[int], languages: Sequence[str], usable: Usable, skipped: Counter[str]
    ) -> list[tuple[int, Row, Image.Image]]:
        rows = self.dataset.rows([self.order[position] for position in positions])
        return [self._usable(p, row, usable, skipped) for p, row in zip(positions, rows, strict=True)]

    def _usable(self, position: int, row: Row, usable: Usable, skipped: Counter[str]) -> tuple[int, Row, Image.Image]:
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
class _StreamedPlan:
    source: StreamedSource
    maker: _BatchMaker
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

    def open(self, lane: int, state: dict[str, Any] | None) -> _StreamedDraw:
        consumer, consumers = self.rank * self.lanes + lane, self.world_size * self.lanes
        stream = SampleStream(self.source, self.maker.languages, self.seed, consumer, consumers, self.window)
        if state is not None:
            stream.load_state_dict(state)
        return _StreamedDraw(stream)

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


class _StreamedDraw:
    def __init__(self, stream: SampleStream):
        self.stream = stream
        self.told: set[str] = set()

    def state(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def __call__(
        self, positions: Sequence[int], languages: Sequence[str], usable: Usable, skipped: Counter[str]
    ) -> list[tuple[int, Row, Image.Image]]:
        picked = [self._usable(language, usable, skipped) for language in languages]
        skipped.update(self.stream.skipped)
        self.stream.skipped.clear()
        return picked

    def _usable(self, language: str, usable: Usable, skipped: Counter[str]) -> tuple[int, Row, Image.Image]:
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


class _BatchMaker:
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
                raise ValueError(
                    f"An image side of {side} is not a multiple of at least two patches of {patch} pixels."
                )
            masker = dataclasses.replace(masker, num_patches=(side // patch) ** 2)
        elif side < 1:
            raise ValueError(f"An image side must be positive, got {side}.")
        self.transform = PixelTransform(self.image_processor, old.augment, old.flip, size=(side, side))
        self.masker = masker
        return True

    def __call__(self, positions: range, draw: _Draw) -> dict[str, Any]:
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

    def _usable(self, row: Row) -> Image.Image:
        if not any(row.captions[language] for language in self.languages):
            raise UnusableImage("no_caption")
        return decode_image(row.image, (self.transform.width, self.transform.height) if self.draft else None)
