"""The image processor in torch: PIL's own pixels, and clear words where torchvision is absent or broken."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from modeling_m2encoder import M2EncoderImageProcessor, M2EncoderImageProcessorPil
from modeling_m2encoder.hub_folder import save_hub_folder
from modeling_m2encoder.image_processing_m2encoder import resize_like_pil

ROOT = Path(__file__).parents[2]
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision, which is optional")

SHAPES = [(1, 1), (1, 300), (300, 1), (4, 7), (64, 1000), (1000, 64), (301, 200), (224, 300), (300, 224), (480, 640)]
SHAPES += [(333, 500), (500, 333), (225, 223), (449, 674), (450, 677), (450, 676), (7, 900), (224, 224)]


def picture(width: int, height: int, kind: str) -> np.ndarray:
    """Noise, or black and white noise, in which the filter overshoots everywhere."""
    rng = np.random.default_rng(width * 10_000 + height)
    values = (
        rng.integers(0, 256, (height, width, 3)) if kind == "noise" else rng.integers(0, 2, (height, width, 3)) * 255
    )
    return values.astype(np.uint8)


@pytest.mark.parametrize("kind", ["noise", "black and white"])
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("target", [(224, 224), (64, 64), (50, 130)])
def test_resizing_is_pil_bit_for_bit(size, target, kind):
    values = picture(*size, kind)
    expected = np.asarray(Image.fromarray(values).resize(target[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    seen = resize_like_pil(torch.from_numpy(values).permute(2, 0, 1), *target)
    assert seen.dtype == torch.uint8 and np.array_equal(seen.numpy(), expected)


@needs_torchvision
def test_the_torchvision_processor_has_pils_grey_levels():
    images = [Image.fromarray(picture(*size, kind)) for size in SHAPES for kind in ("noise", "black and white")]
    images += [images[-3].resize((40, 30)).convert(mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "F")]
    seen = M2EncoderImageProcessor()(images, return_tensors="pt")["pixel_values"].numpy()
    expected = M2EncoderImageProcessorPil()(images, return_tensors="np")["pixel_values"]
    assert np.abs(seen - expected).max() * 127.5 < 1e-4  # in grey levels


@needs_torchvision
def test_it_is_chosen_automatically_and_pil_can_be_pinned(model, processor, tmp_path):
    hub = save_hub_folder(model, processor, tmp_path / "hub")
    assert type(AutoImageProcessor.from_pretrained(hub)) is M2EncoderImageProcessor
    assert type(AutoImageProcessor.from_pretrained(hub, backend="pil")) is M2EncoderImageProcessorPil


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
def test_without_torchvision_pil_is_used_and_the_other_says_why(model, processor, tmp_path):
    hub = save_hub_folder(model, processor, tmp_path / "hub")
    assert type(AutoImageProcessor.from_pretrained(hub)) is M2EncoderImageProcessorPil
    with pytest.raises(ImportError, match="needs torchvision, which is not installed. Use M2EncoderImageProcessorPil"):
        M2EncoderImageProcessor()


def test_a_broken_torchvision_is_explained(tmp_path):
    """A torchvision built for CUDA beside torch for the CPU; transformers would fail with "Could not import module"."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")'
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "import modeling_m2encoder"],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: torchvision is installed, but cannot be imported with torch")
    assert "operator torchvision::nms does not exist" in last and "pip uninstall torchvision" in last
