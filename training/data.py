"""Image-caption pairs from local parquet files to training batches. Tested by `pytest tests/training/test_data.py`.

The batch of a step is a pure function of (seed, step, global batch size): it does not depend on the number of processes
or workers, and a run that stopped goes on at any step with `start_step`.

Shapes: B samples of this rank, L text tokens of the longest of them, S image side in pixels.
"""

from __future__ import annotations

import glob
import io
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from eval.data import caption_list
from modeling_m2encoder.image_processing_m2encoder import to_rgb

from .masking import Masker

logger = logging.getLogger(__name__)

Augmentation = Literal["none", "crop"]
# Images that would take more than 200 MB as RGB are refused from the header: a few hundred bytes can claim any size.
MAX_PIXELS = 2**26
# Rows tried for one place in a batch before the data is called unusable.
MAX_REPLACEMENTS = 100
MIN_CROP_AREA = 0.8  # of the official training transform's random resized crop
# Separate random streams that never meet, whatever the seed.
_ORDER, _SAMPLE = 0, 1


# ---- Files


def resolve_files(files: Iterable[str | Path]) -> list[Path]:
    """The parquet files that paths, globs and folders stand for, each once, in the given order (globs: sorted).

    A folder stands for its `train-*.parquet` if it has any, so that a data set's folder never trains on its own test
    split; otherwise for all its `*.parquet`. Sub-folders are not searched.

    Raises:
        ValueError: for a pattern that matches nothing, or for none at all.
    """
    found: dict[Path, None] = {}
    for pattern in files:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(path.glob("train-*.parquet")) or sorted(path.glob("*.parquet"))
        else:
            matches = [path] if path.is_file() else sorted(map(Path, glob.glob(str(pattern), recursive=True)))
        if not matches:
            raise ValueError(f"No parquet file matches {str(pattern)!r} (seen from {Path.cwd()}).")
        found.update(dict.fromkeys(matches))
    if not found:
        raise ValueError("No data: give at least one parquet file, glob or folder.")
    return list(found)


def read_captions(files: Iterable[str | Path], columns: Iterable[str]) -> Iterator[str]:
    """Every caption of the columns (strings or lists of strings), file by file; blank ones are left out.

    Raises:
        ValueError: at once, for missing files or columns.
    """
    paths, columns = resolve_files(files), list(columns)
    _check_columns(paths, columns, image_column=None)

    def captions() -> Iterator[str]:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=4096, columns=columns):
                for row in batch.to_pylist():
                    for column in columns:
                        yield from caption_list(row[column])

    return captions()


def _check_columns(paths: Sequence[Path], caption_columns: Sequence[str], image_column: str | None) -> None:
    """Every file has the columns, of a type that can be read, and the same type as in the first file."""
    if not caption_columns:
        raise ValueError("No caption column was named.")
    first: dict[str, pa.DataType] = {}
    for path in paths:
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {error}") from error
        for column in (*caption_columns, *([image_column] if image_column is not None else [])):
            if column not in schema.names:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}.")
            kind = schema.field(column).type
            if not (_is_image(kind) if column == image_column else _is_text(kind)):
                wanted = (
                    "image bytes (or a struct with them)" if column == image_column else "a string or list of strings"
                )
                raise ValueError(f"Column {column!r} of {path} should be {wanted}, but is {kind}.")
            if _is_list(first.setdefault(column, kind)) != _is_list(kind):
                raise ValueError(f"Column {column!r} is {kind} in {path}, but {first[column]} in {paths[0]}.")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_list(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return False
        kind = kind.field("bytes").type
        if pa.types.is_null(kind):  # every image is a path
            return True
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@dataclass(frozen=True)
class Row:
    """One undecoded sample: image bytes (or a path, or None), and the captions of each language."""

    image: bytes | str | None
    captions: dict[str, list[str]]


class CaptionDataset:
    """Rows of parquet files, memory-mapped as Arrow in the `datasets` cache: nothing is held in memory.

    Args:
        files: paths, globs or folders, see `resolve_files`.
        image_column: encoded images, as bytes or as the `Image` feature of `datasets` (bytes, or a path to a file).
        captions: language -> column with one caption or a list of captions.
        cache_dir: where the Arrow copy goes; by default the cache of `datasets`.

    Raises:
        ValueError: for missing files or columns (with the columns there are), wrong column types, or no row.
    """

    def __init__(
        self,
        files: Iterable[str | Path],
        image_column: str = "image",
        captions: Mapping[str, str] | None = None,
        cache_dir: str | Path | None = None,
    ):
        self.files = resolve_files(files)
        self.image_column = image_column
        self.columns = dict(captions if captions is not None else {"en": "captions_en", "zh": "captions_zh"})
        _check_columns(self.files, list(self.columns.values()), image_column)
        filled = [path for path in self.files if pq.read_metadata(path).num_rows]  # datasets stumbles over empty ones
        if not filled:
            raise ValueError(f"No row in {', '.join(map(str, self.files))}.")
        with _quiet():
            # Not load_dataset: that counts the use of its "parquet" loader on the network.
            table = datasets.Dataset.from_parquet(
                [glob.escape(str(path)) for path in filled],
                cache_dir=str(cache_dir) if cache_dir is not None else None,
                columns=list(dict.fromkeys([image_column, *self.columns.values()])),
            )
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    @property
    def languages(self) -> list[str]:
        """The languages that rows have captions in."""
        return list(self.columns)

    def captions(self) -> Iterator[str]:
        """Every caption in every language that is not blank, for training a tokenizer."""
        return read_captions(self.files, self.columns.values())

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows at these places, undecoded."""
        return [self._row(values) for values in self._table[list(indices)].to_pylist()]

    def _row(self, values: dict[str, Any]) -> Row:
        image = values[self.image_column]
        if isinstance(image, dict):
            image = image["bytes"] if image["bytes"] is not None else image.get("path")
        return Row(image, {language: caption_list(values[column]) for language, column in self.columns.items()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, which would appear once per process."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# ---- Images


class UnusableImage(Exception):
    """Why an image cannot be used: `args[0]` is one of the reasons counted in a batch's `skipped`."""


def decode_image(image: bytes | str | None) -> Image.Image:
    """An encoded image, or the path of one, as RGB: the same pixels as the model's image processor sees.

    Raises:
        UnusableImage: "no_image" (missing or no such file), "not_an_image" (no format PIL knows), "too_many_pixels"
            (more than MAX_PIXELS in the header) or "broken_image" (truncated, damaged, no conversion to RGB).
    """
    if not image:
        raise UnusableImage("no_image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter limit
            opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        with opened:
            if math.prod(opened.size) > MAX_PIXELS:
                raise UnusableImage("too_many_pixels")
            return to_rgb(opened)
    except (UnusableImage, MemoryError):
        raise
    except FileNotFoundError as error:
        raise UnusableImage("no_image") from error
    except Image.DecompressionBombError as error:
        raise UnusableImage("too_many_pixels") from error
    except UnidentifiedImageError as error:
        raise UnusableImage("not_an_image") from error
    except (
        Exception
    ) as error:  # PIL's plug-ins raise anything on damaged data: struct.error, zlib.error, IndexError, ...
        raise UnusableImage("broken_image") from error


class PixelTransform:
    """RGB images to `pixel_values`, bit for bit as the model's image processor makes them, in half the time or less.

    Args:
        image_processor: resizes to a fixed height and width, rescales and normalises.
        augment: "none", or "crop": a random part of 0.8 to 1.0 of the area, its sides shortened by different factors.
        flip: mirror every other image at random. Wrong for captions that say left and right.

    Raises:
        ValueError: for an unknown `augment`, or an image processor that does anything else than the above.
    """

    def __init__(self, image_processor: Any, augment: Augmentation = "none", flip: bool = False):
        if augment not in get_args(Augmentation):
            raise ValueError(f"augment must be one of {', '.join(get_args(Augmentation))}, got {augment!r}.")
        size = dict(image_processor.size)
        if not size.get("height") or not size.get("width"):
            raise ValueError(f"The image processor must resize to a fixed height and width, but its size is {size}.")
        self.width, self.height = size["width"], size["height"]
        self.resample = image_processor.resample
        self.augment, self.flip = augment, flip
        # Rescaling and normalising map each of a channel's 256 values to one float: the processor itself says which.
        ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
        pixels = image_processor(images=Image.fromarray(ramp), do_resize=False, return_tensors="np")["pixel_values"]
        self.levels = np.asarray(pixels, dtype=np.float32).reshape(3, 256)
        self._check_against(image_processor)

    def _check_against(self, image_processor: Any) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (2 * self.height + 3, self.width + 5, 3), dtype=np.uint8)
        probe = Image.fromarray(noise)
        expected = np.asarray(image_processor(images=probe, return_tensors="np")["pixel_values"])
        got = np.empty((1, 3, self.height, self.width), dtype=np.float32)
        self._write(got[0], self._resize(probe, None))
        if not np.array_equal(got, expected):
            raise ValueError(
                f"{type(image_processor).__name__} does not give the pixels of a PIL resize, rescale and normalise; "
                "training would see other pixels than inference. Use M2EncoderImageProcessorPil."
            )

    def __call__(self, images: Sequence[Image.Image], generators: Sequence[np.random.Generator]) -> torch.Tensor:
        """B images and a random generator for each -> [B, 3, height, width] float32."""
        values = np.empty((len(images), 3, self.height, self.width), dtype=np.float32)
        for place, image, generator in zip(values, images, generators, strict=True):
            box = crop_box(image.size, generator) if self.augment == "crop" else None
            image = self._resize(image, box)
            if self.flip and generator.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            self._write(place, image)
        return torch.from_numpy(values)

    def _resize(self, image: Image.Image, box: tuple[float, float, float, float] | None) -> Image.Image:
        return image.resize((self.width, self.height), self.resample, box)

    def _write(self, place: np.ndarray, image: Image.Image) -> None:
        """Into [3, height, width]. "clip" only spares numpy the bounds check: no value of a byte is out of bounds."""
        pixels = np.asarray(image)
        for channel in range(3):
            np.take(self.levels[channel], pixels[..., channel], out=place[channel], mode="clip")


def crop_box(size: tuple[int, int], generator: np.random.Generator) -> tuple[float, float, float, float]:
    """A random (left, top, right, bottom) inside an image of (width, height) pixels: 0.8 to 1.0 of its area."""
    area, split, x, y = generator.random(4)
    area = MIN_CROP_AREA + (1 - MIN_CROP_AREA) * area
    # area = width * height; `split` gives the whole reduction to one side (0 or 1) or shares it.
    width, height = size[0] * area**split, size[1] * area ** (1 - split)
    left, top = x * (size[0] - width), y * (size[1] - height)
    return left, top, left + width, top + height


# ---- Which row, which language


class EpochOrder:
    """An endless sequence of rows in which every epoch is a new permutation; a pure function of the position.

    Rows n * `neighbours`, ..., (n + 1) * `neighbours` - 1 stay side by side: hard negatives that are meant to meet.
    """

    def __init__(self, num_rows: int, seed: int, neighbours: int = 1):
        self.num_rows, self.seed, self.neighbours = num_rows, seed, neighbours
        # A batch can straddle two epochs; no more than these two permutations are held.
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, _ORDER, epoch))
        if self.neighbours == 1:
            return generator.permutation(self.num_rows)
        families = generator.permutation(-(-self.num_rows // self.neighbours))
        rows = families[:, None] * self.neighbours + np.arange(self.neighbours)
        # Inside a family too: the language goes by the position, and must not always be the same one for a row.
        rows = generator.permuted(rows, axis=1).reshape(-1)
        return rows[rows < self.num_rows]

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        return int(self._permutation(epoch)[place])

    def __getstate__(self) -> tuple[int, int, int]:
        return self.num_rows, self.seed, self.neighbours  # the cache is neither picklable nor worth sending to workers

    def __setstate__(self, state: tuple[int, int, int]) -> None:
        self.__init__(*state)


def language_cycle(weights: Mapping[str, float]) -> list[str]:
    """The languages in a short repeating pattern with these shares, spread as evenly as possible.

    {"en": 1, "zh": 1} gives en, zh; so every batch whose size is a multiple of the pattern's length has the exact
    shares, and every other one is off by less than one sample. Shares are taken to the nearest hundredth or simple
    fraction.

    Raises:
        ValueError: for negative weights, or none above 0.
    """
    total = math.fsum(weights.values())
    if not all(0 <= weight < math.inf for weight in weights.values()) or total <= 0:
        raise ValueError(f"Language weights must be 0 or more, and one above 0, got {dict(weights)}.")
    shares = {name: Fraction(weight / total).limit_denominator(100) for name, weight in weights.items() if weight}
    period = math.lcm(*(share.denominator for share in shares.values()))
    counts = {name: int(share * period) for name, share in shares.items()}
    # Smooth weighted round robin: who is furthest behind its share comes next.
    cycle: list[str] = []
    credit = dict.fromkeys(counts, 0)
    for _ in range(sum(counts.values())):
        for name in credit:
            credit[name] += counts[name]
        chosen = max(credit, key=credit.__getitem__)
        credit[chosen] -= sum(counts.values())
        cycle.append(chosen)
    return cycle


# ---- Batches


class _Batches(Dataset):
    """Item `step` is this rank's slice of the global batch of that step."""

    def __init__(
        self,
        dataset: CaptionDataset,
        tokenizer: Any,
        transform: PixelTransform,
        cycle: list[str],
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        neighbours: int,
        masker: Masker | None,
    ):
        self.dataset, self.tokenizer, self.transform, self.cycle = dataset, tokenizer, transform, cycle
        self.masker = masker
        self.languages = list(dict.fromkeys(cycle))
        self.order = EpochOrder(len(dataset), seed, neighbours)
        self.seed, self.global_batch_size = seed, global_batch_size
        self.size = global_batch_size // world_size
        self.offset = rank * self.size
        self._told: set[str] = set()

    def __getitem__(self, step: int) -> dict[str, Any]:
        start = step * self.global_batch_size + self.offset
        positions = range(start, start + self.size)
        generators = [np.random.default_rng((self.seed, _SAMPLE, position)) for position in positions]
        skipped: Counter[str] = Counter()
        indices, images, texts, languages = [], [], [], []
        rows = self.dataset.rows([self.order[position] for position in positions])
        for position, row, generator in zip(positions, rows, generators, strict=True):
            index, row, image = self._usable(position, row, skipped)
            language = self._language(position, row, skipped)
            captions = row.captions[language]
            indices.append(index)
            images.append(image)
            texts.append(captions[generator.integers(len(captions))])
            languages.append(language)
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        pixel_values = self.transform(images, generators)
        masks = self.masker(**inputs, generators=generators) if self.masker else {}
        return {
            "pixel_values": pixel_values,
            **inputs,
            **masks,
            "languages": languages,
            "rows": torch.tensor(indices),
            "skipped": dict(skipped),
        }

    def _usable(self, position: int, row: Row, skipped: Counter[str]) -> tuple[int, Row, Image.Image]:
        """The row at this position, or else the row at the same place of the next global batch, the one after, ...

        Not the next row: that one is in this batch already, and would be a false negative to itself.
        """
        for _ in range(MAX_REPLACEMENTS):
            index = self.order[position]
            try:
                if not any(row.captions[language] for language in self.languages):
                    raise UnusableImage("no_caption")
                return index, row, decode_image(row.image)
            except UnusableImage as error:
                reason = error.args[0]
                skipped[reason] += 1
                if reason not in self._told:
                    self._told.add(reason)
                    logger.warning("Row %d is skipped: %s (%s). More are only counted.", index, reason, error.__cause__)
            position += self.global_batch_size
            (row,) = self.dataset.rows([self.order[position]])
        raise ValueError(f"{MAX_REPLACEMENTS} rows in a row cannot be used: {dict(skipped)}.")

    def _language(self, position: int, row: Row, skipped: Counter[str]) -> str:
        """The language of this place in the pattern; another one, counted, if the row has no caption in it."""
        wanted = self.cycle[position % len(self.cycle)]
        if row.captions[wanted]:
            return wanted
        skipped[f"no_{wanted}_caption"] += 1
        return next(language for language in self.languages if row.captions[language])


def batches(
    dataset: CaptionDataset,
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
    neighbours: int = 1,
    masker: Masker | None = None,
) -> Iterator[dict[str, Any]]:
    """This rank's share of the global batches `start_step`, ..., `start_step + num_steps - 1`.

    Position p of the endless sequence is sample p % n of epoch p // n, each epoch a new permutation of all n rows; step
    s takes positions s * global_batch_size and on, and each rank a contiguous slice of them. The batch in which an
    epoch ends goes on with the next one. The language follows a fixed pattern with the weights' shares
    (`language_cycle`); caption and augmentation are drawn with (seed, p).

    Rows that cannot be used are replaced and counted, never dropped in silence: see `decode_image` for the reasons, and
    "no_caption" for a row without one. A row that only lacks the language of its place gives another language's caption
    and counts as "no_<language>_caption".

    Args:
        dataset: the rows.
        processor: the model's processor; its `image_processor` defines the pixels, its `tokenizer` the tokens.
        seed: 0 or more.
        global_batch_size: samples over all ranks; a multiple of `world_size`, at most the number of rows.
        rank, world_size: this process among those that share each batch.
        start_step, num_steps: which steps; a resumed run starts at the number of steps already done.
        num_workers: processes that decode ahead; 0 decodes here. Changes nothing but speed.
        language_weights: share of each language of the dataset; equal by default.
        augment, flip: see `PixelTransform`.
        neighbours: rows of the files that stay together when shuffled, see `EpochOrder`.
        masker: draws what the masked losses hide.

    Yields:
        `pixel_values` [B, 3, S, S] float32; `input_ids`, `attention_mask` [B, L] int64, padded to the longest of this
        rank; `text_mask` [B, L] and `patch_mask` [B, P] bool, as the `masker` gives them; `languages` list of B names;
        `rows` [B] int64, the rows used; `skipped` reason -> count in this rank's share.

    Raises:
        ValueError: at once, for arguments that contradict each other; while iterating, if the data cannot fill a batch.
    """
    weights = dict(language_weights) if language_weights is not None else dict.fromkeys(dataset.languages, 1.0)
    if set(weights) != set(dataset.languages):
        raise ValueError(f"language_weights names {sorted(weights)}, but the captions are in {dataset.languages}.")
    if global_batch_size < 1 or world_size < 1 or global_batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            "global_batch_size must be a positive multiple of world_size, and 0 <= rank < world_size, got "
            f"{global_batch_size=}, {world_size=}, {rank=}."
        )
    if global_batch_size > len(dataset):
        raise ValueError(
            f"A global batch of {global_batch_size} would hold some of the {len(dataset)} rows twice: use at most that."
        )
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}.")
    if seed < 0 or start_step < 0 or num_steps < 0 or num_workers < 0:
        raise ValueError(f"Expected 0 or more, got {seed=}, {start_step=}, {num_steps=}, {num_workers=}.")
    transform = PixelTransform(processor.image_processor, augment, flip)
    cycle = language_cycle(weights)
    source = _Batches(
        dataset, processor.tokenizer, transform, cycle, seed, global_batch_size, rank, world_size, neighbours, masker
    )
    if num_workers:
        # Without a word on it, tokenizers warns once per forked worker, and does the same.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        source,
        batch_size=None,  # an item is a batch already
        sampler=range(start_step, start_step + num_steps),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
