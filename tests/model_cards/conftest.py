"""A tiny Hub folder and the endpoint's handler on it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.endpoint_server import load_handler
from modeling_m2encoder import M2EncoderModel
from modeling_m2encoder.hub_folder import save_hub_folder


@pytest.fixture(scope="session")
def tiny_model(config) -> M2EncoderModel:
    torch.manual_seed(0)
    model = M2EncoderModel(config).eval()
    with torch.no_grad():  # so that different inputs get different embeddings
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture(scope="session")
def hub_folder(tiny_model, processor, tmp_path_factory) -> Path:
    return save_hub_folder(tiny_model, processor, tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="session")
def handler(hub_folder: Path) -> Any:
    return load_handler(hub_folder)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
