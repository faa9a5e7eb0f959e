"""Models that see a picture and a raw caption and write a new one: behind a server, or loaded by transformers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from eval.models import LOADING_ERRORS

from ..images import UnusableImage, decode_image
from .chat import ChatClient, Question, Reply, ServerSettings
from .journal import Journal
from .pinned import BLIP_2, model_identity, revision_of
from .rows import Row
from .scorer import DType, worker_device

BLIP_2_PROMPTS = {"en": "Caption: {raw} Question: what does the picture show? Answer:"}
"""BLIP-2 is asked in the form "Question: ... Answer:" (transformers, `Blip2ForConditionalGeneration.forward`). It knows
English only."""


@dataclass(frozen=True)
class CaptionModel:
    """A model of transformers that continues a picture and a prompt: BLIP-2 and BLIP, or another of
    `AutoModelForImageTextToText` whose processor takes a plain prompt."""

    model: str = BLIP_2
    revision: str | None = None
    """The commit on the Hub; of the default, the one in pinned.py."""
    dtype: DType = "float32"
    batch_size: int = 16
    beams: int = 5
    """As BLIP-2 writes captions (LAVIS, caption_coco_opt2.7b_eval.yaml)."""
    max_new_tokens: int = 60
    device: str = "auto"

    def __post_init__(self) -> None:
        if min(self.batch_size, self.beams, self.max_new_tokens) < 1:
            raise ValueError("batch_size, beams and max_new_tokens are at least 1.")

    def identity(self) -> dict[str, Any]:
        """What decides the captions; the batch size does, by rounding, where two beams are close."""
        own = {name: getattr(self, name) for name in ("dtype", "batch_size", "beams", "max_new_tokens")}
        return {**model_identity(self), **own}


class ServerRewriter:
    """Asks an OpenAI-compatible server. A context manager: it holds the journal of one task."""

    def __init__(self, settings: ServerSettings, seed: int, image_side: int, answers: Path):
        self._client, self._side, self._journal = ChatClient(settings, seed), image_side, Journal(answers)

    def __enter__(self) -> ServerRewriter:
        self._journal.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._journal.__exit__(*failure)

    def __call__(self, rows: Sequence[Row], prompts: Sequence[str]) -> list[Reply]:
        """The answer to each row's prompt, or the reason why there is none.

        Raises:
            ServerError: when the server is away.
        """
        replies: list[Reply | None] = [None] * len(rows)
        questions: dict[int, Question] = {}
        for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            try:
                picture = picture_for_server((row["image"] or {}).get("bytes"), self._side)
            except UnusableImage as error:
                replies[place] = Reply(None, str(error))
            else:
                questions[place] = Question(row["id"], prompt, picture)
        answers = self._client.ask(list(questions.values()), self._journal, self._probe)
        for place, answer in zip(questions, answers, strict=True):
            replies[place] = answer
        return replies  # type: ignore[return-value]  # each place was filled

    @cached_property
    def _probe(self) -> Question:
        image = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(image).ellipse((20, 20, 76, 76), fill="red")
        return Question("probe", "What does the picture show?", _jpeg(image))


class TransformersRewriter:
    """Runs a caption model in this process."""

    def __init__(self, settings: CaptionModel):
        self.settings = settings

    def __enter__(self) -> TransformersRewriter:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to close: the model stays for the next task."""

    def __call__(self, rows: Sequence[Row], prompts: Sequence[str]) -> list[Reply]:
        """The model's continuation of each row's picture and prompt, or the reason why there is none.

        Raises:
            ValueError: for a model that cannot be loaded.
        """
        loaded = _kept(self.settings, worker_device(self.settings.device))
        replies: list[Reply | None] = [None] * len(rows)
        order = []
        for place, prompt in enumerate(prompts):
            length = loaded.tokens(prompt)
            if loaded.longest and length + self.settings.max_new_tokens > loaded.longest:
                replies[place] = Reply(None, "prompt_too_long")
            else:
                order.append((length, place))
        # Prompts of about the same length together, so that little padding is computed.
        for batch in self._batches(sorted(order), loaded.pads):
            images: dict[int, Image.Image] = {}
            for place in batch:
                try:
                    images[place] = decode_image((rows[place]["image"] or {}).get("bytes"))
                except UnusableImage as error:
                    replies[place] = Reply(None, str(error))
            if images:
                answers = self._generate(loaded, list(images.values()), [prompts[place] for place in images])
                for place, answer in zip(images, answers, strict=True):
                    replies[place] = answer
        return replies  # type: ignore[return-value]  # each place was filled

    def _batches(self, order: Sequence[tuple[int, int]], pads: bool) -> Iterator[list[int]]:
        """Places in batches, without `pads` only of prompts of the same length; `order`: (length, place), sorted."""
        for _, group in groupby(order, key=lambda item: None if pads else item[0]):
            places = [place for _, place in group]
            for start in range(0, len(places), self.settings.batch_size):
                yield places[start : start + self.settings.batch_size]

    @torch.inference_mode()
    def _generate(self, loaded: Captioner, images: list[Image.Image], prompts: list[str]) -> list[Reply]:
        """What the model writes after each picture and prompt, without the prompt; "cut_short" where it did not end."""
        model, processor = loaded.model, loaded.processor
        # Decoder-only models go on from the last token: no padding may come after the prompt.
        inputs = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device, dtype=model.dtype)
        options = {"num_beams": self.settings.beams, "max_new_tokens": self.settings.max_new_tokens}
        ids = model.generate(**inputs, do_sample=False, **options)
        # What ended before the longest one is padded.
        ended = torch.isin(ids[:, -1], torch.tensor(loaded.ends, device=ids.device)).tolist()
        written = processor.batch_decode(ids, skip_special_tokens=True)
        # After generating: BLIP puts its own first token into the prompt.
        shown = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        return [
            # Some models give the prompt back in front, others do not.
            Reply(text.strip().removeprefix(prompt.strip()).strip(), None if end else "cut_short")
            for text, prompt, end in zip(written, shown, ended, strict=True)
        ]


@dataclass(frozen=True)
class Captioner:
    """A caption model with its processor."""

    model: Any
    processor: Any

    def tokens(self, prompt: str) -> int:
        """Positions that a picture and this prompt take in the language model."""
        return len(self.processor.tokenizer(prompt)["input_ids"]) + (
            getattr(self.processor, "num_query_tokens", 0) or 0
        )

    @property
    def longest(self) -> int | None:
        """Positions that the language model has; None where they are relative."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def end(self) -> int:
        """The token after a caption: BLIP ends as BERT does, BLIP-2's OPT was taught to end at a line break."""
        text = self.model.config.get_text_config()
        end = text.sep_token_id if self.model.config.model_type == "blip" else text.eos_token_id
        return end[0] if isinstance(end, list) else end

    @property
    def ends(self) -> list[int]:
        """Tokens that nothing but other such tokens follows."""
        tokenizer = self.processor.tokenizer
        known = (self.end, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return sorted({token for token in known if token is not None})

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths may be one batch: BLIP counts its positions from the padding on."""
        return self.model.config.model_type != "blip"


@cache
def _kept(settings: CaptionModel, device: str) -> Captioner:
    """Loaded once per process; a worker of the executor runs many tasks."""
    return load_captioner(settings, device)


def load_captioner(settings: CaptionModel, device: str) -> Captioner:
    """A fresh copy. Raises ValueError for a model that cannot be loaded, or whose weights are not all there."""
    name, options = settings.model, {"revision": revision_of(settings)}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        model, report = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=getattr(torch, settings.dtype), output_loading_info=True, **options
        )
        processor = AutoProcessor.from_pretrained(name, backend="pil", **options)
    except LOADING_ERRORS as error:
        raise ValueError(f"{name} is no caption model that can be loaded: {type(error).__name__}: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks weights, e.g. {sorted(report['missing_keys'])[0]}: it would write at random.")
    if getattr(processor, "num_query_tokens", 1) is None:
        processor.num_query_tokens = config.num_query_tokens
    return Captioner(model.to(device).eval(), processor)


def picture_for_server(content: bytes | None, side: int) -> bytes:
    """The picture as it was found, if it is a small JPEG or PNG, else as a JPEG with at most this longer side.

    Raises:
        UnusableImage: see `decode_image`.
    """
    image = decode_image(content)
    if max(image.size) <= side and content.startswith((b"\xff\xd8\xff", b"\x89PNG")):
        return content
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return _jpeg(image)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
