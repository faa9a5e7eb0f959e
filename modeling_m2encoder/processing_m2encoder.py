"""The processor: image processor and tokenizer as one object."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from .image_processing_m2encoder import M2EncoderImageProcessor, M2EncoderImageProcessorPil


class M2EncoderProcessorKwargs(ProcessingKwargs, total=False):
    # Padding to the longest text of the call gives the same embeddings as padding to 52 and costs less. No max_length:
    # the tokenizer's own model_max_length (52) is the limit of `truncation`.
    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}


class M2EncoderProcessor(ProcessorMixin):
    r"""
    `processor(text=..., images=..., return_tensors="pt")` gives `input_ids` and `attention_mask` [B, L] of at most
    52 tokens (longer text loses its beginning; [CLS] and the end token stay) and `pixel_values` [B, 3, size, size].

    Args:
        image_processor: one of the two of the checkpoint.
        tokenizer: the fast tokenizer of the checkpoint.
    """

    valid_processor_kwargs = M2EncoderProcessorKwargs

    def __init__(
        self,
        image_processor: M2EncoderImageProcessor | M2EncoderImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> list[str]:
        """As in every processor, with a tokenizer that does not remember the padding and the `max_length` of its last
        call: saved in `tokenizer.json`, they would become the defaults of the loaded processor."""
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        return super().save_pretrained(save_directory, *args, **kwargs)


__all__ = ["M2EncoderProcessor"]
