"""A tiny Hub folder and the endpoint's handler on it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.endpoint_server import load_handler
from modeling_m2encoder.hub_folder import save_hub_folder


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
