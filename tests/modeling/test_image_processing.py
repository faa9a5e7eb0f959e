"""The image processor against PIL itself, for every mode and size; bad images are named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from modeling_m2encoder import M2EncoderImageProcessorPil

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
SIZES = [(1, 1), (1, 3), (3, 1), (3, 3), (1, 500), (500, 1), (4, 7), (224, 224), (301, 200), (64, 1000)]


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    width, height = size
    rgb = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(rgb)
    if mode in ("PA", "RGBa", "La"):  # PIL has only detours to these
        return image.convert({"PA": "P", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode in ("LAB", "HSV"):
        return Image.frombytes(mode, size, rgb.tobytes())
    return image.convert(mode)


def by_pil(image: Image.Image, side: int) -> np.ndarray:
    """The official transform, spelled out: squash-resize in PIL, scale to 0..1, normalise with 0.5 and 0.5."""
    resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    scaled = np.asarray(resized).astype(np.float64) / 255
    return ((scaled - 0.5) / 0.5).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_pil(mode: str, size: tuple[int, int]):
    image = noise(mode, size)
    values = M2EncoderImageProcessorPil()(image, return_tensors="np")["pixel_values"]
    assert values.shape == (1, 3, 224, 224)
    expected = by_pil(image, 224)
    # Bit-identical in grey levels; the last bit of fp32 is the order of two operations.
    assert np.array_equal(np.rint((values[0] + 1) * 127.5), np.rint((expected + 1) * 127.5))
    np.testing.assert_allclose(values[0], expected, atol=1.2e-7, rtol=0)


def test_arrays_and_lists():
    image = noise("RGB", (30, 20))
    processor = M2EncoderImageProcessorPil(size={"height": 64, "width": 64})
    from_pil = processor([image, image], return_tensors="np")["pixel_values"]
    from_array = processor(np.asarray(image), return_tensors="np")["pixel_values"]
    assert from_pil.shape == (2, 3, 64, 64)
    assert np.array_equal(from_pil[0], from_array[0])


def test_sixteen_bit_is_scaled_not_clipped():
    """PIL's own convert("RGB") clips everything above 255 to white."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    processor = M2EncoderImageProcessorPil(size={"height": 64, "width": 64})
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    image = Image.open(buffer)
    assert image.mode.startswith("I;16")
    eight_bit = Image.fromarray((ramp >> 8).astype(np.uint8))
    assert np.array_equal(
        processor(image, return_tensors="np")["pixel_values"], processor(eight_bit, return_tensors="np")["pixel_values"]
    )


def truncated(kind: str) -> Image.Image:
    buffer = io.BytesIO()
    noise("RGB", (200, 200)).save(buffer, kind)
    return Image.open(io.BytesIO(buffer.getvalue()[: buffer.tell() // 2]))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (truncated("JPEG"), "200x200 pixels, mode 'RGB'.*truncated"),
        (truncated("PNG"), "200x200 pixels"),
        (Image.new("La", (4, 4)), "mode 'La'"),
        (Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)), "70000.*0..255"),
        (Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "nan"),
        (np.zeros((8, 8, 3), dtype=np.uint16), "uint16"),
    ],
)
def test_bad_images_are_named(image, named: str):
    with pytest.raises(ValueError, match=named):
        M2EncoderImageProcessorPil()(image, return_tensors="np")
