"""The processor: image processor and tokenizer as one object."""

from __future__ import annotations

from typing import Any

from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


class M2EncoderProcessorKwargs(ProcessingKwargs, total=False):
    # Padding to the longest text of the call gives the same embeddings as padding to 52 and costs less. No max_length:
    # the tokenizer's own model_max_length (52) is the limit of `truncation`.
    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}


class M2EncoderProcessor(ProcessorMixin):
    r"""
    `processor(text=..., images=..., return_tensors="pt")` gives `input_ids` and `attention_mask` [B, L] of at most
    52 tokens (longer text loses its beginning; [CLS] and the end token stay) and `pixel_values` [B, 3, size, size].

    Args:
        image_processor: an `M2EncoderImageProcessorPil`.
        tokenizer: the fast tokenizer of the checkpoint.
    """

    valid_processor_kwargs = M2EncoderProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)


__all__ = ["M2EncoderProcessor"]
