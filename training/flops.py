"""How much arithmetic a training step is, and how much a GPU can do: for the model FLOPs utilisation (MFU) in the log.

Tested by `pytest tests/training/test_flops.py`. A multiply-add is 2 FLOPs. Only matrix products are counted, as torch's
FlopCounterMode does, and nothing that is computed a second time (graphs that are not kept, gradient checkpointing).

Shapes: L tokens, K tokens of the context, P patches, D width, E embedding, V vocabulary.
"""

from __future__ import annotations

import torch

from modeling_m2encoder import M2EncoderConfig

# Dense bf16 peaks in TFLOP/s, from the vendors' data sheets; the first name that occurs in the device's counts.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this device by the name that its driver gives; None for CPUs and unknown names."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in _PEAK_TFLOPS.items() if known in name), None)


def training_flops(
    config: M2EncoderConfig,
    pairs: int,
    text_tokens: int,
    *,
    masked_tokens: int | None = None,
    masked_images: bool = False,
    patches: int | None = None,
) -> float:
    """FLOPs of forward and backward (twice the forward) of `pairs` image-text pairs, the contrastive loss excepted.

    Args:
        text_tokens: L, the padded length.
        masked_tokens: tokens hidden in all pairs, with CMLM; None without it.
        masked_images: with CMIM.
        patches: P seen of each image; those of `config.image_size` unless given.
    """
    patches = config.num_patches if patches is None else patches
    image, text = patches + 1, text_tokens
    width, pixels = config.hidden_size, config.num_channels * config.patch_size**2
    see = _encoder(config, image) + 2 * patches * width * pixels
    forward = pairs * (see + _encoder(config, text) + 2 * 2 * width * config.projection_dim)
    if masked_tokens is not None:
        forward += pairs * (_encoder(config, text) + _decoder(config, text, image))
        forward += masked_tokens * 2 * width * config.vocab_size
    if masked_images:
        forward += pairs * (see + _decoder(config, image, text) + 2 * patches * width * pixels)
    return 3.0 * forward


def _encoder(config: M2EncoderConfig, length: int) -> int:
    """Forward FLOPs of all layers for one input of `length` tokens."""
    layers = config.num_hidden_layers + config.num_upper_layers
    return layers * (_attention(config, length, length) + _mlp(config, length))


def _decoder(config: M2EncoderConfig, length: int, context: int) -> int:
    """Forward FLOPs of one decoder for `length` tokens that look at `context` others."""
    context = 1 if config.decoder_context == "cls" else context
    attentions = _attention(config, length, length) + _attention(config, length, context)
    return config.num_decoder_layers * (attentions + _mlp(config, length))


def _attention(config: M2EncoderConfig, length: int, context: int) -> int:
    """Queries and outputs of L tokens, keys and values of K, scores and weighted sums between them."""
    width = config.hidden_size
    return 4 * (length + context) * width**2 + 4 * length * context * width


def _mlp(config: M2EncoderConfig, length: int) -> int:
    return 4 * length * config.hidden_size * config.intermediate_size
