"""Counted FLOPs against torch's own counter on the real models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_m2encoder import M2EncoderConfig, M2EncoderForPreTraining
from training.flops import peak_flops, training_flops

PAIRS, TOKENS = 3, 7


@pytest.mark.parametrize("context", ["tokens", "cls"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_forward_pass_is_what_torch_counts(config: M2EncoderConfig, context: str, masked: bool):
    config = M2EncoderConfig(**{**config.to_dict(), "decoder_context": context})
    torch.manual_seed(0)
    model = M2EncoderForPreTraining(config).eval()
    ids = torch.randint(0, config.vocab_size, (PAIRS, TOKENS))
    text_mask = torch.zeros(PAIRS, TOKENS, dtype=torch.bool)
    text_mask[0, 1:4] = text_mask[1, 2] = True
    patch_mask = torch.rand(PAIRS, config.num_patches) < 0.5
    masks = {"text_mask": text_mask, "patch_mask": patch_mask} if masked else {}
    pixels = torch.randn(PAIRS, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels, **masks)
    similarities = 2 * PAIRS**2 * config.projection_dim  # the logits of this output, which training does without
    assert output.logits_per_image.shape == (PAIRS, PAIRS)
    counted = training_flops(
        config, PAIRS, TOKENS, masked_tokens=int(text_mask.sum()) if masked else None, masked_images=masked
    )
    assert counted == 3 * (counter.get_total_flops() - similarities)


def test_the_published_size_by_hand():
    """0.4B, one pair of 20 tokens: 2 FLOPs for each weight of the experts and upper layers that a token meets, and the
    two products of attention."""
    config = M2EncoderConfig.from_size("0.4B")
    layer = 4 * 768 * 768 + 2 * 768 * 3072
    forward = 0
    for length in (197, 20):
        forward += 12 * (length * 2 * layer + 2 * 2 * length * length * 768)
    forward += 196 * 2 * 768 * 768 + 2 * 2 * 768 * 768
    assert training_flops(config, 1, 20) == 3 * forward


def test_smaller_images_are_less_work():
    config = M2EncoderConfig.from_size("0.4B")
    assert training_flops(config, 1, 20, patches=49) < 0.4 * training_flops(config, 1, 20)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H200", 989.4),
        ("GeForce GTX 1080", None),
    ],
)
def test_the_peak_goes_by_the_name(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else tflops * 1e12
    assert peak_flops(torch.device("cuda", 0)) == expected
    assert peak_flops(torch.device("cpu")) is None
