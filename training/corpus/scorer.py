"""Image-text similarity of rows, with any model that `eval.models.load` takes: the settings, and the models at work.

The score stage, and the stages that make new texts and score them again, use the same models and thresholds.
Letters: n rows of a batch, U distinct images or texts among them, E embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import multiprocess
import torch
from PIL import Image
from torch.nn import functional as F

from eval.models import Adapter, load

from ..images import UnusableImage, decode_image
from .pinned import CHINESE_CLIP, CLIP, model_identity, revision_of
from .rows import Row

DType = Literal["float32", "bfloat16", "float16"]

_PIXELS_AT_ONCE = 2**27
"""A batch ends early at so many, 400 MB decoded: half a megapixel for each of 256 images."""


@dataclass(frozen=True)
class ScoringModel:
    """A model of eval/models.py: a folder, a Hub id, `open_clip:...`."""

    model: str
    revision: str | None = None
    """The commit on the Hub; of models in pinned.py, the one that stands there, if left out."""
    dtype: DType = "float32"
    """Of the weights. The cosine is taken in fp32 in any case."""


DEFAULT_MODELS = {"en": ScoringModel(CLIP), "zh": ScoringModel(CHINESE_CLIP)}
"""One model for each language: CLIP has read no Chinese, Chinese-CLIP nearly no English."""


@dataclass(frozen=True)
class ScoreSettings:
    """The section `score`. Without `model` and `models`, DEFAULT_MODELS score."""

    model: str | None = None
    """One model for all languages, or:"""
    models: dict[str, ScoringModel] = field(default_factory=dict)
    """language -> its model."""
    revision: str | None = None
    """Of `model`."""
    dtype: DType = "float32"
    """Of `model`."""
    threshold: float | dict[str, float] = 0.25
    """The cosine from which a pair is kept (paper, section 2.2), for all or by language. It belongs to a model: the
    same number is strict for one and lax for another, which the histogram shows."""
    batch_size: int = 256
    """Pairs at a time. With `device`, it changes no score by more than rounding, and so may be changed in between."""
    device: str = "auto"
    """"auto": the accelerator, with several of them one for each worker, else the CPU."""

    def __post_init__(self) -> None:
        if self.model and self.models:
            raise ValueError("give `model`, for all languages, or `models`, by language, not both.")
        if self.revision and not self.model:
            raise ValueError(f"revision {self.revision!r} is of no `model`; in `models` each has its own.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; at least 1.")
        limits = self.threshold if isinstance(self.threshold, dict) else {"all": self.threshold}
        if wrong := {name: limit for name, limit in limits.items() if not -1 <= limit <= 1}:
            raise ValueError(f"threshold is {wrong}; a cosine is between -1 and 1.")
        if isinstance(self.threshold, dict) and (missing := sorted({*self.models} - {*self.threshold})):
            raise ValueError(f"threshold has nothing for {missing}; give each language of `models` one.")

    def model_of(self, language: str) -> ScoringModel | None:
        """The model that scores texts of this language, if there is one."""
        if self.model:
            return ScoringModel(self.model, self.revision, self.dtype)
        return (self.models or DEFAULT_MODELS).get(language)

    def threshold_of(self, language: str) -> float | None:
        """The lowest cosine that is kept, if this language has one."""
        return self.threshold.get(language) if isinstance(self.threshold, dict) else self.threshold

    def identity(self) -> dict[str, Any]:
        """What decides scores and decisions, for the fingerprint of a stage: not how fast they come."""
        models = {"all": self.model_of("")} if self.model else dict(self.models or DEFAULT_MODELS)
        described = {name: {**model_identity(model), "dtype": model.dtype} for name, model in models.items()}
        return {"models": described, "threshold": self.threshold}


class Scored(NamedTuple):
    """The cosine of a row, as it is stored (fp32), or the reason why it has none."""

    score: float | None
    reason: str | None = None


class Scorer:
    """Rows to cosines, batch by batch; models are loaded when the first row needs them.

    Reasons: those of `decode_image` ("no_image", "not_an_image", "too_many_pixels", "broken_image"), "refused_image"
    (by the model's processor), "no_text", "no_model" (for this language) and "not_finite" (NaN or infinity).
    """

    def __init__(self, settings: ScoreSettings):
        self.settings = settings

    def scored(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Scored]]:
        """Every row, in order, with its cosine or reason. The next batch is read and decoded meanwhile."""
        source = iter(rows)
        with ThreadPoolExecutor(1) as ahead:
            upcoming: Future[tuple[list[Row], list[Image.Image | str]]] = ahead.submit(self._read, source)
            while (batch := upcoming.result())[0]:
                upcoming = ahead.submit(self._read, source)
                yield from zip(batch[0], self._score(*batch), strict=True)

    def passes(self, language: str, score: float) -> bool:
        """Whether a pair with this score is kept."""
        limit = self.settings.threshold_of(language)
        return limit is not None and score >= limit

    def _read(self, source: Iterator[Row]) -> tuple[list[Row], list[Image.Image | str]]:
        rows: list[Row] = []
        images: list[Image.Image | str] = []
        decoded: dict[bytes | None, Image.Image | str] = {}
        pixels = 0
        while len(rows) < self.settings.batch_size and pixels < _PIXELS_AT_ONCE:
            if (row := next(source, None)) is None:
                break
            content = (row["image"] or {}).get("bytes")
            if content not in decoded:
                decoded[content] = image = _decoded(content)
                pixels += 0 if isinstance(image, str) else math.prod(image.size)
            rows.append(row)
            images.append(decoded[content])
        return rows, images

    @torch.inference_mode()
    def _score(self, rows: list[Row], images: list[Image.Image | str]) -> list[Scored]:
        results: list[Scored | None] = [None] * len(rows)
        places: dict[ScoringModel, list[int]] = {}
        for place, (row, image) in enumerate(zip(rows, images, strict=True)):
            model = self.settings.model_of(row["language"])
            if isinstance(image, str):
                results[place] = Scored(None, image)
            elif not row["text"]:
                results[place] = Scored(None, "no_text")
            elif model is None or self.settings.threshold_of(row["language"]) is None:
                results[place] = Scored(None, "no_model")
            else:
                places.setdefault(model, []).append(place)
        for model, own in places.items():
            adapter = _adapter(model, worker_device(self.settings.device))
            texts = _unit(adapter.encode_texts([rows[place]["text"] for place in own]))
            pictures, refused = _encode_images(adapter, [images[place] for place in own])
            cosines = (texts * pictures).sum(-1).cpu()
            for place, cosine, bad in zip(own, cosines.tolist(), refused, strict=True):
                usable = math.isfinite(cosine) and not bad
                results[place] = Scored(cosine) if usable else Scored(None, bad or "not_finite")
        return results  # type: ignore[return-value]  # each place was filled


def _decoded(content: bytes | None) -> Image.Image | str:
    try:
        return decode_image(content)
    except UnusableImage as error:
        return str(error)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=-1)


def _encode_images(adapter: Adapter, images: Sequence[Image.Image]) -> tuple[torch.Tensor, list[str | None]]:
    """[n, E] of length 1, each distinct image computed once; and "refused_image" for those the processor refuses."""
    distinct = list({id(image): image for image in images}.values())
    refused: dict[int, str] = {}
    try:
        features = adapter.encode_images(distinct)
    except ValueError:  # find out which one it was, and go on without it
        usable = list(distinct)
        for turn, image in enumerate(distinct):
            try:
                adapter.encode_images([image])
            except ValueError:
                refused[id(image)], usable[turn] = "refused_image", Image.new("RGB", (64, 64))
        features = adapter.encode_images(usable)
    place = {id(image): turn for turn, image in enumerate(distinct)}
    return _unit(features)[[place[id(image)] for image in images]], [refused.get(id(image)) for image in images]


@cache
def _adapter(model: ScoringModel, device: str) -> Adapter:
    """Loaded once per process; a worker of the executor runs many tasks."""
    return load(model.model, dtype=model.dtype, device=device, revision=revision_of(model))


def worker_device(device: str) -> str:
    """The device of this process: of several accelerators, workers of one host take turns."""
    if device != "auto":
        return device
    if not torch.accelerator.is_available():
        return "cpu"
    number = "".join(filter(str.isdigit, multiprocess.current_process().name.rpartition("-")[2])) or "0"
    kind = torch.accelerator.current_accelerator().type
    return f"{kind}:{int(number) % torch.accelerator.device_count()}"
