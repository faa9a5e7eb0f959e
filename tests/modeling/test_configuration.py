"""The configuration: named sizes, parameter counts of the paper, impossible values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling_m2encoder import SIZES, M2EncoderConfig, M2EncoderModel


def count(size: str, **overrides) -> int:
    with torch.device("meta"):
        model = M2EncoderModel(M2EncoderConfig.from_size(size, **overrides))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "without", "with_backbone_projections"),
    [("0.4B", 240_228_865, 241_408_513), ("1B", 689_444_865, 691_542_017), ("10B", 9_552_551_937, 9_560_940_545)],
)
def test_parameters_of_the_published_sizes(size: str, without: int, with_backbone_projections: int):
    assert count(size) == without
    assert count(size, use_backbone_projection=True) == with_backbone_projections


@pytest.mark.parametrize(("size", "published"), [("0.4B", 263_300_000), ("1B", 730_000_000), ("10B", 10_200_000_000)])
def test_published_files_are_ours_plus_what_inference_never_uses(size: str, published: int):
    """Upper-layer text experts, `norm`, `pooler`, mask token and second scale (reference: official_checkpoints.md)."""
    sizes = SIZES[size]
    d, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    layer = 4 * (d * d + d) + 3 * 2 * d + (d * ffn + ffn) + 2 * ffn + (ffn * d + d)
    unused = sizes["num_upper_layers"] * layer + 2 * d + 2 * d + (d * d + d) + d + 1
    assert count(size, use_backbone_projection=True) + unused == pytest.approx(published, rel=0.003)


def test_nano_trains_on_a_laptop():
    assert count("nano") < 3_000_000


def test_only_nano_starts_from_sincos_positions():
    kinds = {size: M2EncoderConfig.from_size(size).position_init for size in SIZES}
    assert kinds == {"nano": "sincos", "0.4B": "normal", "1B": "normal", "10B": "normal"}


def test_round_trip(config: M2EncoderConfig, tmp_path: Path):
    config.save_pretrained(tmp_path)
    assert M2EncoderConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_size": 100}, "num_attention_heads"),
        ({"image_size": 225}, r"image_size \(225\) must be a multiple of patch_size \(16\); the nearest is 224"),
        ({"image_size": 5}, "the nearest is 16"),
        ({"position_init": "random"}, "position_init must be 'normal' or 'sincos', got 'random'"),
        ({"position_init": "sincos", "hidden_size": 18, "num_attention_heads": 2}, "multiples of 4.*got 18"),
        ({"max_text_length": 1023}, "max_position_embeddings"),
        ({"max_text_length": 1}, "max_text_length"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_upper_layers": -1}, "num_upper_layers"),
        ({"num_decoder_layers": 0}, "num_decoder_layers"),
        ({"decoder_context": "all"}, "decoder_context must be 'tokens' or 'cls', got 'all'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
    ],
)
def test_impossible_values_are_refused(values: dict, named: str):
    with pytest.raises(ValueError, match=named):
        M2EncoderConfig(**values)


def test_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match=r"2B.*nano, 0\.4B, 1B, 10B"):
        M2EncoderConfig.from_size("2B")
