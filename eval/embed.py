"""Images and texts to normalised embeddings: each distinct one once, in batches, on one process or many, in order.

    encoder = Encoder(load("runs/quickstart/model"), cache=Cache("runs/embeddings"))
    image_embeds, text_embeds = encoder.images(table), encoder.texts(captions)

Letters: n images or texts, U distinct ones, E embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm

from .cache import Cache, Kind, Store, item_key
from .data import Table

if TYPE_CHECKING:
    from .models import Adapter

# Items per shard of the cache: what a killed process loses at most.
SHARD = 1024
# Image files are read and hashed so many at a time.
FILES_AT_ONCE = 256


class BadImages(ValueError):
    """Images that cannot be decoded or processed. All others were embedded, and cached if there is a cache."""

    def __init__(self, problems: dict[int, str]):
        self.rows = tuple(sorted(problems))
        """Their rows in the table."""
        shown = [problems[row] for row in self.rows[:10]]
        if len(self.rows) > 1:
            shown.insert(0, f"{len(self.rows)} images cannot be used; the others are done:")
        if len(self.rows) > 10:
            shown.append(f"... and {len(self.rows) - 10} more")
        super().__init__("\n".join(shown))


@dataclass(frozen=True)
class Encoder:
    """A model as two functions: rows of a table, and strings, to embeddings of length 1."""

    adapter: Adapter
    batch_size: int = 128
    progress: bool = False
    """Whether the first process shows a progress bar."""
    cache: Cache | None = None
    """Where embeddings are kept and found again; for several processes a folder that all of them see."""
    group: dist.ProcessGroup | None = None
    """The processes that share the work, e.g. `torch.distributed.group.WORLD`: each of them makes the same calls with
    the same arguments, embeds its part, and gets the whole result. None: this process works alone."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}.")

    def images(self, table: Table, column: str = "image", rows: Sequence[int] | None = None) -> torch.Tensor:
        """The embeddings of all images of a table, or of some rows: [len(rows), E] fp32 on the CPU, of length 1.

        Raises:
            BadImages: a ValueError for images that cannot be decoded or processed; it names their rows and files. It
                comes after all others are embedded and cached, so that a run with mended files has little left to do.
                None is left out silently: a benchmark with fewer images is another benchmark.
            ValueError: without rows, without that column, or if the model's output is not finite.
        """
        rows = list(range(len(table)) if rows is None else rows)
        if not rows:
            raise ValueError("There are no images to encode.")
        keys = self._image_keys(table, column, rows)
        first: dict[bytes, int] = {}
        for key, row in zip(keys, rows, strict=True):
            first.setdefault(key, row)
        bad: dict[int, str] = {}

        def prepare(chunk: Sequence[int]) -> list[Image.Image]:
            return _decode(table, column, chunk, bad)

        def encode(chunk: Sequence[int], images: list[Image.Image]) -> torch.Tensor:
            return self._encode_images(table, chunk, images, bad)

        embeds = self._run("image", list(first.values()), list(first), prepare, encode, bad)
        if bad:
            problems = {row: bad[first[key]] for key, row in zip(keys, rows, strict=True) if first[key] in bad}
            raise BadImages(problems)
        place = {key: i for i, key in enumerate(first)}
        return embeds[[place[key] for key in keys]]

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """The embeddings of texts: [len(texts), E] fp32 on the CPU, of length 1.

        Every distinct text is encoded once, among texts of about its own length, so that little padding is computed.

        Raises:
            ValueError: when there are no texts, or something that is no text, or if the model's output is not finite.
        """
        if not texts or isinstance(texts, str):
            raise ValueError("There are no texts to encode." if not texts else f"{texts!r} is not a list of texts.")
        wrong = [text for text in texts if not _is_text(text)]
        if wrong:
            raise ValueError(f"{wrong[0]!r:.80} is not a text that can be encoded.")
        # Characters stand for tokens here: nearly proportional within a language, and no second tokenization.
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        embeds = self._run(
            "text",
            distinct,
            [item_key(text) for text in distinct],
            lambda chunk: None,
            lambda chunk, _: self.adapter.encode_texts(chunk),
            {},
        )
        place = {text: i for i, text in enumerate(distinct)}
        return embeds[[place[text] for text in texts]]

    def _run(
        self,
        kind: Kind,
        items: Sequence[Any],
        keys: Sequence[bytes],
        prepare: Callable[[Sequence[Any]], Any],
        encode: Callable[[Sequence[Any], Any], torch.Tensor],
        bad: dict[Any, str],
    ) -> torch.Tensor:
        """The embeddings of U distinct items, [U, E]: those of the cache, and the others from `encode`.

        `prepare` reads a batch while the model is busy with the one before. Items that it or `encode` puts into `bad`
        are not cached, and their rows mean nothing. All processes leave with the same `bad`.
        """
        store = None if self.cache is None else self.cache.store(self.adapter.describe())
        found, known = store.find(kind, keys) if store and self._rank == 0 else ([], None)
        missing = self._missing(len(items), found)
        batches = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        # Every process makes the same number of forward passes: a sharded model waits for all of them in each. Those
        # that would be idle at the end repeat the last batch.
        turns = math.ceil(len(batches) / self._world)
        mine = [batches[min(turn * self._world + self._rank, len(batches) - 1)] for turn in range(turns)]
        fresh = batches[self._rank :: self._world]
        done: list[int] = []
        parts: list[torch.Tensor] = []
        failure: Exception | None = None
        try:
            with _Writer(store, kind) as writer:
                chunks = [[items[i] for i in batch] for batch in mine]
                for turn, prepared in enumerate(self._ahead(chunks, prepare, kind, len(missing))):
                    embeds = self._unit(encode(chunks[turn], prepared), chunks[turn])
                    if turn < len(fresh):
                        good = [i for i, item in enumerate(chunks[turn]) if item not in bad]
                        done += [mine[turn][i] for i in good]
                        parts.append(embeds[good])
                        writer.add([keys[mine[turn][i]] for i in good], embeds[good])
        except Exception as error:
            if self.group is None:
                raise
            failure = error  # the others have to hear of it, or they would wait for this process
        if known is not None:
            parts.append(known)
        return self._gather(len(items), [*done, *found], parts, bad, failure)

    def _encode_images(
        self, table: Table, chunk: Sequence[int], images: list[Image.Image], bad: dict[int, str]
    ) -> torch.Tensor:
        try:
            return self.adapter.encode_images(images)
        except ValueError:  # find out which one it was, and go on without it
            for i, (row, image) in enumerate(zip(chunk, images, strict=True)):
                try:
                    self.adapter.encode_images([image])
                except ValueError as error:
                    bad[row] = f"{table.locate(row)} holds an image that cannot be processed: {error}"
                    images[i] = _blank()
            return self.adapter.encode_images(images)

    def _unit(self, features: torch.Tensor, chunk: Sequence[Any]) -> torch.Tensor:
        features = features.float().cpu()
        wrong = [item for item, row in zip(chunk, features, strict=True) if not row.isfinite().all()]
        if wrong:
            raise ValueError(
                f"{self.adapter.describe()['name']} gives NaN or infinity for {len(wrong)} of {len(chunk)} items, e.g. "
                f"{wrong[0]!r}: damaged weights, or a dtype too narrow for this model (try float32)."
            )
        return F.normalize(features, dim=-1)

    def _ahead(
        self, chunks: Sequence[Sequence[Any]], prepare: Callable[[Sequence[Any]], Any], kind: Kind, total: int
    ) -> Iterator[Any]:
        """`prepare` of each chunk, one chunk ahead in a thread, with a progress bar of `total` items."""
        shown = self.progress and self._rank == 0
        with ThreadPoolExecutor(1) as pool, tqdm(total=total, desc=f"{kind}s", disable=not shown, leave=False) as bar:
            upcoming = pool.submit(prepare, chunks[0]) if chunks else None
            for turn in range(len(chunks)):
                prepared = upcoming.result()
                if turn + 1 < len(chunks):
                    upcoming = pool.submit(prepare, chunks[turn + 1])
                yield prepared
                bar.update(min(len(chunks[turn]) * self._world, total - bar.n))

    # What follows talks to the other processes; alone, it returns what this process has.

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def _world(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def _image_keys(self, table: Table, column: str, rows: Sequence[int]) -> list[bytes]:
        """The content key of every row's image file, each file read by one process."""
        table.require(column)
        own = rows[self._rank :: self._world]
        keys = [
            item_key(content)
            for start in range(0, len(own), FILES_AT_ONCE)
            for content in _contents(table, column, own[start : start + FILES_AT_ONCE])
        ]
        if self.group is None:
            return keys
        parts: list[Any] = [None] * self._world
        dist.all_gather_object(parts, keys, group=self.group)
        return [parts[i % self._world][i // self._world] for i in range(len(rows))]

    def _missing(self, total: int, found: Sequence[int]) -> list[int]:
        """The items that the first process did not find in the cache."""
        there = set(found)
        missing = [[i for i in range(total) if i not in there]]
        if self.group is not None:
            dist.broadcast_object_list(missing, group=self.group, group_src=0)
        return missing[0]

    def _gather(
        self, total: int, done: list[int], parts: list[torch.Tensor], bad: dict[Any, str], failure: Exception | None
    ) -> torch.Tensor:
        """[total, E] on every process. Each row is known to one process and zero on the others, so a sum is exact.

        Raises:
            The `failure` of this process, or a ValueError for that of another one.
        """
        rows = torch.cat(parts) if parts else torch.empty(0, 0)
        size = rows.shape[1]
        if self.group is None:
            embeds = torch.zeros(total, size)
            embeds[done] = rows
            return embeds
        told: list[Any] = [None] * self._world
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(told, (size, bad, message), group=self.group)
        if failure is not None:
            raise failure
        for rank, (_, others, message) in enumerate(told):
            if message is not None:
                raise ValueError(f"Process {rank} of {self._world} failed: {message}")
            bad |= others
        embeds = torch.zeros(total, max(size for size, *_ in told))
        embeds[done] = rows.view(len(done), embeds.shape[1])
        # NCCL moves tensors of the accelerator only.
        device = "cpu" if dist.get_backend(self.group) == "gloo" else torch.accelerator.current_accelerator()
        embeds = embeds.to(device)
        dist.all_reduce(embeds, group=self.group)
        return embeds.cpu()


class _Writer:
    """Collects embeddings and writes a shard whenever there are enough, and at the end, also of a loop that failed.
    Without a store it does nothing."""

    def __init__(self, store: Store | None, kind: Kind):
        self.store, self.kind = store, kind
        self.keys: list[bytes] = []
        self.parts: list[torch.Tensor] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def add(self, keys: list[bytes], embeds: torch.Tensor) -> None:
        if self.store is not None:
            self.keys += keys
            self.parts.append(embeds)
        if len(self.keys) >= SHARD:
            self._write()

    def _write(self) -> None:
        keys, parts, self.keys, self.parts = self.keys, self.parts, [], []
        if self.store is not None and keys:
            self.store.add(self.kind, keys, torch.cat(parts))


def _is_text(text: Any) -> bool:
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:  # half a surrogate pair, which tokenizers refuse
        return False


def _contents(table: Table, column: str, rows: Sequence[int]) -> list[bytes]:
    """The bytes of image files. What cannot be read has a content of its own: decoding it will say what is wrong."""
    cells = table.rows.select_columns([column])[list(rows)][column]
    contents = []
    for cell in cells:
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None and path:
            try:
                data = Path(path).read_bytes()
            except OSError:
                data = None
        contents.append(data if isinstance(data, bytes) else f"no image: {cell!r}".encode())
    return contents


def _decode(table: Table, column: str, rows: Sequence[int], bad: dict[int, str]) -> list[Image.Image]:
    """The images of some rows in RGB. One that cannot be read is put into `bad` and replaced by a blank one, so that
    batches keep their shape."""
    # Here, since it takes transformers with it, and a run whose embeddings are all in the cache decodes nothing.
    from modeling_m2encoder.image_processing_m2encoder import to_rgb

    images = []
    for row in rows:
        try:
            image = table.images([row], column)[0]
        except ValueError as error:
            bad[row], image = str(error), _blank()
        try:
            images.append(to_rgb(image))
        except ValueError as error:
            bad[row] = f"{table.locate(row)} holds an image that cannot be processed: {error}"
            images.append(_blank())
    return images


def _blank() -> Image.Image:
    return Image.new("RGB", (64, 64))
