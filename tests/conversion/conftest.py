"""Official-layout checkpoints: the golden one and made-up ones of any size, as state dicts and as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="session")
def tiny_outputs() -> dict[str, Tensor]:
    """The golden inputs, and what the official code returned for them."""
    with np.load(GOLDENS / "tiny_official_outputs.npz") as arrays:
        return {key: torch.from_numpy(value) for key, value in arrays.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "Lightning": lambda state: {"state_dict": state, "epoch": 3, "global_step": 9, "hyper_parameters": {"seed": 1}},
    "DeepSpeed": lambda state: {"module": {f"_forward_module.{key}": value for key, value in state.items()}},
    "model": lambda state: {"model": state},
    "bare": lambda state: state,
    "bare with prefix": lambda state: {f"_forward_module.{key}": value for key, value in state.items()},
}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """`save(state, layout)` -> the file."""

    def save(state: dict[str, Tensor], layout: str = "bare", name: str = "checkpoint.ckpt") -> Path:
        torch.save(LAYOUTS[layout](state), tmp_path / name)
        return tmp_path / name

    return save


def made_up_state(
    *,
    width: int,
    layers: int,
    upper_layers: int,
    ffn: int,
    embedding: int,
    words: int,
    image_size: int = 224,
    patch_size: int = 16,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random weights under every key of the official files, written out from their description, not from our table."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def matrix(key: str, *shape: int, std: float | None = None) -> None:
        # uniform_ takes a third of the time of normal_, and the full size has 263 million numbers
        bound = 3**0.5 * (shape[-1] ** -0.5 if std is None else std)
        state[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def linear(key: str, out: int, size: int) -> None:
        matrix(f"{key}.weight", out, size)
        matrix(f"{key}.bias", out, std=0.1)

    def norm(key: str, size: int) -> None:
        matrix(f"{key}.bias", size, std=0.1)
        state[f"{key}.weight"] = 1 + torch.empty(size).uniform_(-0.3, 0.3, generator=generator)

    matrix("backbone.text_embed.weight", words, width, std=0.5)
    matrix("backbone.vision_embed.mask_token", 1, 1, width)
    matrix("backbone.vision_embed.cls_token", 1, 1, width)
    matrix("backbone.vision_embed.proj.weight", width, 3, patch_size, patch_size, std=0.03)
    matrix("backbone.vision_embed.proj.bias", width, std=0.1)
    matrix("backbone.encoder.embed_positions.A.weight", 3 + (image_size // patch_size) ** 2, width, std=0.5)
    matrix("backbone.encoder.embed_positions.B.weight", 1024, width, std=0.5)
    for encoder, depth in (("backbone.encoder", layers), ("backbone_vl", upper_layers)):
        for expert in "AB":
            for i in range(depth):
                layer = f"{encoder}.layers.{i}"
                for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    linear(f"{layer}.self_attn.{name}.{expert}", width, width)
                norm(f"{layer}.self_attn.inner_attn_ln.{expert}", width)
                norm(f"{layer}.self_attn_layer_norm.{expert}", width)
                norm(f"{layer}.final_layer_norm.{expert}", width)
                norm(f"{layer}.ffn.{expert}.ffn_layernorm", ffn)
                linear(f"{layer}.ffn.{expert}.fc1", ffn, width)
                linear(f"{layer}.ffn.{expert}.fc2", width, ffn)
            norm(f"{encoder}.layer_norm.{expert}", width)
    norm("norm", width)
    linear("pooler.dense", width, width)
    for name in ("itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj"):
        matrix(f"{name}.fc.weight", embedding, width)
    state["logit_scale"] = torch.tensor(3.2)
    state["logit_vl_scale"] = torch.tensor(2.9)
    return state


@pytest.fixture(scope="session")
def make_state() -> Callable[..., dict[str, Tensor]]:
    return made_up_state
