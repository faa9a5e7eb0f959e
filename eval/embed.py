"""Images and texts to normalised embeddings, in batches, in their original order.

    encoder = Encoder(model, processor)
    image_embeds, text_embeds = encoder.images(table), encoder.texts(captions)

Letters: B batch, L text tokens, S image side, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from .data import Table


@dataclass(frozen=True)
class Encoder:
    """A model and its processor as two functions. Works where the model is: its device and its dtype.

    `model` has `get_image_features` and `get_text_features`; `processor` makes their arguments.
    """

    model: torch.nn.Module
    processor: Any
    batch_size: int = 128
    progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}.")

    def images(self, table: Table, column: str = "image", rows: Sequence[int] | None = None) -> torch.Tensor:
        """The embeddings of all images of a table, or of some rows: [len(rows), E] fp32 on the CPU, of length 1.

        Raises:
            ValueError: for an image that cannot be decoded or processed; the message names its row and file.
        """
        rows = range(len(table)) if rows is None else rows
        parameter = next(self.model.parameters())
        parts = []
        with _inference(self.model):
            for start in self._batches(len(rows), "images"):
                pixels = self._pixels(table, column, rows[start : start + self.batch_size])
                pixels = pixels.to(parameter.device, parameter.dtype)
                parts.append(_unit(self.model.get_image_features(pixel_values=pixels).pooler_output))
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """The embeddings of texts: [len(texts), E] fp32 on the CPU, of length 1.

        Every distinct text is encoded once, among texts of about its own length, so that little padding is computed.

        Raises:
            ValueError: when there are no texts.
        """
        if not texts:
            raise ValueError("There are no texts to encode.")
        # Characters stand for tokens here: nearly proportional within a language, and no second tokenization.
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        device = next(self.model.parameters()).device
        parts = []
        with _inference(self.model):
            for start in self._batches(len(distinct), "texts"):
                chunk = distinct[start : start + self.batch_size]
                batch = self.processor(text=chunk, return_tensors="pt", padding=True, truncation=True)
                ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
                parts.append(_unit(self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output))
        place = {text: i for i, text in enumerate(distinct)}
        return torch.cat(parts)[[place[text] for text in texts]]

    def _pixels(self, table: Table, column: str, rows: Sequence[int]) -> torch.Tensor:
        images = table.images(rows, column)
        try:
            return self.processor(images=images, return_tensors="pt")["pixel_values"]
        except ValueError:  # say which one it was
            for row, image in zip(rows, images, strict=True):
                try:
                    self.processor(images=[image], return_tensors="pt")
                except ValueError as error:
                    raise ValueError(f"{table.locate(row)} holds an image that cannot be processed: {error}") from error
            raise

    def _batches(self, total: int, what: str) -> tqdm:
        return tqdm(range(0, total, self.batch_size), desc=what, unit="batch", disable=not self.progress, leave=False)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=-1).cpu()


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout; a training loop's model is in training mode again afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
