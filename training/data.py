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

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .batching import BatchMaker, IndexedPlan, Plan, StreamedPlan
from .images import Augmentation, decode_image
from .masking import Masker
from .order import language_cycle
from .shard_files import is_local_parquet
from .streams import StreamedSource
from .tables import CaptionDataset, read_captions, resolve_files

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
    them. The language of a position follows a fixed pattern with the weights' shares (`language_cycle`), neighbours in
    one language; caption, augmentation and masks are drawn with (seed, position). What lies at a position:

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
    # Neighbours speak one language: what tells hard negatives apart is then the word that differs.
    cycle = [language for language in language_cycle(weights) for _ in range(neighbours)]
    maker = BatchMaker(processor, cycle, seed, augment, flip, draft, masker)
    if isinstance(source, StreamedSource):
        _check_streamed(source, world_size, max(1, num_workers), start_step, neighbours)
        plan: Plan = StreamedPlan(source, maker, seed, rank, world_size, max(1, num_workers), shuffle_window)
    else:
        if global_batch_size > len(source):
            raise ValueError(
                f"A global batch of {global_batch_size} would hold some of the {len(source)} rows twice: use at most "
                "that."
            )
        plan = IndexedPlan(source, maker, seed, global_batch_size, neighbours)
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
        plan: Plan,
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
        plan: Plan,
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
        if worker >= len(self.steps):
            return
        # The loader always asks its first worker first: after a resume that one takes the lane whose turn it is.
        lane = self.steps[worker] % self.plan.lanes
        draw = self.plan.open(lane, self.states[lane])
        for index in range(worker, len(self.steps), workers):
            start = self.samples + index * self.global_batch_size + self.offset
            batch = self.plan.maker(range(start, start + self.size), draw)
            yield batch, lane, draw.state()
