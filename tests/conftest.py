"""Fixtures shared by all tests: a tiny random model with its processor, in memory and as a checkpoint folder. No
network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before anything imports the libraries: no test may reach out, and two cores are shared with other processes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from modeling_m2encoder import M2EncoderConfig, M2EncoderImageProcessorPil, M2EncoderModel, M2EncoderProcessor
from training.tokenizer import train_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
GOLDENS = Path(__file__).parent / "goldens"

CAPTIONS = [
    "a red circle to the left of a blue square",
    "two green triangles above a yellow star",
    "three small stars on a grey background",
    "红色的圆在蓝色方块的左边",
    "两个绿色三角形在一颗黄色星星的上方",
    "灰色背景上有三颗小星星",
]


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`, which CI and developers have and users do not."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED} (real photos and reference tensors), which is not part of the project")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(CAPTIONS, vocab_size=200)


@pytest.fixture(scope="session")
def config(tokenizer: PreTrainedTokenizerBase) -> M2EncoderConfig:
    return M2EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_upper_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        projection_dim=24,
        image_size=32,
        patch_size=8,
        max_position_embeddings=54,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )


@pytest.fixture
def model(config: M2EncoderConfig) -> M2EncoderModel:
    torch.manual_seed(0)
    return M2EncoderModel(config).eval()


@pytest.fixture(scope="session")
def tiny_model(config: M2EncoderConfig) -> M2EncoderModel:
    """Shared by all tests: not to be changed."""
    torch.manual_seed(0)
    model = M2EncoderModel(config).eval()
    with torch.no_grad():  # so that different inputs get different embeddings
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture(scope="session")
def processor(tokenizer: PreTrainedTokenizerBase) -> M2EncoderProcessor:
    return M2EncoderProcessor(M2EncoderImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + 7 * i, 64, 3), dtype=np.uint8)) for i in range(6)]


@pytest.fixture(scope="session")
def captions() -> list[str]:
    return CAPTIONS


@pytest.fixture
def checkpoint(model: M2EncoderModel, processor: M2EncoderProcessor, tmp_path: Path) -> Path:
    """A folder as `save_pretrained` writes it."""
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """The official JSON config of the golden checkpoint."""
    return {
        "loss_names": {"itc": 1},
        "encoder_layers": 2,
        "beit3_vl_layers": 1,
        "encoder_embed_dim": 48,
        "encoder_attention_heads": 4,
        "out_embed_dim": 32,
        "beit_version": "base",
        "image_size": 64,
        "patch_size": 16,
        "vocab_size": 1000,
        "test_only": True,
        "flash_attn": False,
    }


@pytest.fixture(scope="session")
def _golden_weights() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "tiny_official_weights.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def tiny_state(_golden_weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A fresh copy of the golden state dict, with the official keys."""
    return {key: torch.from_numpy(value.copy()) for key, value in _golden_weights.items()}
