"""The configuration of M2-Encoder, and the published sizes as data."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Architecture table of the official checkpoints (paper Table 9 and the official inference configs). `nano` is
# ours: small enough to be trained on a laptop CPU in minutes, with the same code path as the large ones.
# `num_decoder_layers` is not published: these depths bring the pretraining models to within 2 % of Table 9's 402 M,
# 924 M and 11.2 B (with a vocabulary head of its own; tied to the word embeddings no depth does so for 0.4B).
SIZES: dict[str, dict[str, int | float | str]] = {
    "nano": {
        "vocab_size": 2000,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_upper_layers": 1,
        "num_decoder_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "projection_dim": 128,
        "image_size": 64,
        "patch_size": 16,
        "max_position_embeddings": 54,
        # 0.02 is meant for widths of 768 and more; at 128 it starts with branches that hardly add anything
        # (docs/log.md).
        "initializer_range": 0.06,
        # Beside its patch embeddings, whose standard deviation is 1.2, drawn positions hardly show (docs/log.md).
        "position_init": "sincos",
    },
    "0.4B": {
        "hidden_size": 768,
        "num_hidden_layers": 9,
        "num_upper_layers": 3,
        "num_decoder_layers": 4,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "projection_dim": 768,
    },
    "1B": {
        "hidden_size": 1024,
        "num_hidden_layers": 21,
        "num_upper_layers": 3,
        "num_decoder_layers": 3,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "projection_dim": 1024,
    },
    "10B": {
        "hidden_size": 4096,
        "num_hidden_layers": 21,
        "num_upper_layers": 3,
        "num_decoder_layers": 2,
        "num_attention_heads": 32,
        "intermediate_size": 16384,
        "projection_dim": 1024,
    },
}

# fairseq's learned positions begin at row 2 (rows 0 and 1 belong to its padding); the official tables have these
# rows, so ours keep them and every checkpoint can be converted in both directions without loss.
POSITION_OFFSET = 2


def nearest_multiple(side: int, patch_size: int) -> int:
    """The image side that is closest to `side` and a multiple of the patch size, at least one patch."""
    return max(round(side / patch_size), 1) * patch_size


@strict
class M2EncoderConfig(PreTrainedConfig):
    r"""
    One flat configuration for the whole encoder. The defaults are the published 0.4B model.

    Args:
        vocab_size (`int`): rows of the word embedding; 115,244 in the published tokenizer.
        hidden_size (`int`): width D of both modalities.
        num_hidden_layers (`int`): multiway layers, which hold one expert per modality.
        num_upper_layers (`int`): shared layers above them, run by both modalities; may be 0.
        num_attention_heads (`int`): must divide `hidden_size`.
        intermediate_size (`int`): width of the feed-forward networks.
        hidden_act (`str`): activation of the feed-forward networks; exact GELU in the published models.
        projection_dim (`int`): size E of the embeddings.
        image_size (`int`): side of the square input image in pixels; a multiple of `patch_size`.
        patch_size (`int`): side of a patch in pixels.
        num_channels (`int`): image channels.
        max_position_embeddings (`int`): rows of the text position table. Two of them are fairseq's unused first rows.
        max_text_length (`int`): tokens that are used, [CLS] and end token included. Longer input loses its beginning.
        layer_norm_eps (`float`): epsilon of every LayerNorm.
        attention_dropout (`float`): dropout on attention weights in training, in [0, 1).
        drop_path_rate (`float`): stochastic depth of the last layer in [0, 1); it grows linearly from 0 at the first.
        initializer_range (`float`): standard deviation of the initial weights; the value, output and feed-forward
            projections are scaled by sqrt(log(2 L)) on top (MAGNETO, arXiv 2210.06423).
        position_init (`str`): initial positions of patches and tokens, learned from there: "normal", drawn like other
            weights, or "sincos", waves of sine and cosine over rows and columns, or over the text (needs `hidden_size`
            in multiples of 4). Read only where weights are initialised.
        logit_scale_init_value (`float`): initial log of 1/temperature; ln(1/0.07) as in CLIP.
        num_decoder_layers (`int`): layers of each of the two decoders that only pretraining has (CMLM and CMIM, paper
            section 2 and Table 9); unused by the other models.
        decoder_context (`str`): what these decoders see of the other modality: all its "tokens", or only its [CLS]
            ("cls"). The paper names both.
        normalize_pixels (`bool`): CMIM predicts each patch normalised to its own mean and variance (MAE, arXiv
            2111.06377, section 4.1) instead of the pixels as they enter.
        use_backbone_projection (`bool`): also hold the projections on top of the multiway layers (`itc_image_proj` and
            `itc_text_proj` in the official files) and return those embeddings beside the usual ones.
        bos_token_id, eos_token_id, pad_token_id, mask_token_id (`int`): [CLS], end of text, padding (the end token) and
            [MASK] of the tokenizer.

    Raises:
        ValueError: for values that cannot make a model.
    """

    model_type = "m2_encoder"

    vocab_size: int = 115244
    hidden_size: int = 768
    num_hidden_layers: int = 9
    num_upper_layers: int = 3
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    projection_dim: int = 768
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    max_position_embeddings: int = 1024
    max_text_length: int = 52
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    position_init: str = "normal"
    logit_scale_init_value: float | int = 2.6592
    num_decoder_layers: int = 4
    decoder_context: str = "tokens"
    normalize_pixels: bool = True
    use_backbone_projection: bool = False
    bos_token_id: int | None = 50002
    eos_token_id: int | list[int] | None = 50000
    pad_token_id: int | None = 50000
    mask_token_id: int | None = 50003

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> M2EncoderConfig:
        """The configuration of a named size: "nano", "0.4B", "1B" or "10B", with any field overridden.

        Raises:
            ValueError: for a name that is none of these.
        """
        if size not in SIZES:
            raise ValueError(f"Unknown size {size!r}: choose one of {', '.join(SIZES)}.")
        return cls(**{**SIZES[size], **overrides})

    @property
    def num_patches(self) -> int:
        """Patches P of an image of the configured size."""
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self, **kwargs: Any) -> None:
        # Not a `validate_*` method: those turn every ValueError into an exception class of huggingface_hub's own.
        self._refuse_impossible_values()
        super().__post_init__(**kwargs)

    def _refuse_impossible_values(self) -> None:
        positive = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_decoder_layers",
            "intermediate_size",
            "projection_dim",
            "image_size",
            "patch_size",
            "num_channels",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_upper_layers < 0:
            raise ValueError(f"num_upper_layers must be 0 or more, got {self.num_upper_layers}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}); the nearest is "
                f"{nearest_multiple(self.image_size, self.patch_size)}."
            )
        if not 2 <= self.max_text_length <= self.max_position_embeddings - POSITION_OFFSET:
            raise ValueError(
                f"max_text_length must lie between 2 ([CLS] and the end token) and max_position_embeddings - "
                f"{POSITION_OFFSET} = {self.max_position_embeddings - POSITION_OFFSET} (the first two rows of the "
                f"position table are unused), got {self.max_text_length}."
            )
        for name in ("attention_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.decoder_context not in ("tokens", "cls"):
            raise ValueError(f"decoder_context must be 'tokens' or 'cls', got {self.decoder_context!r}.")
        if self.position_init not in ("normal", "sincos"):
            raise ValueError(f"position_init must be 'normal' or 'sincos', got {self.position_init!r}.")
        if self.position_init == "sincos" and self.hidden_size % 4:
            raise ValueError(
                "position_init 'sincos' needs a hidden_size in multiples of 4 (sine and cosine of two "
                f"coordinates), got {self.hidden_size}."
            )
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be positive, got {self.layer_norm_eps}.")


__all__ = ["M2EncoderConfig"]
