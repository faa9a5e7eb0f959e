"""Decoding, the model's own pixels, and augmentation against independent implementations."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from modeling_m2encoder import M2EncoderImageProcessorPil, M2EncoderProcessor
from tests.training.samples import BROKEN, REASONS, encoded, noise
from training.images import (
    OPERATIONS,
    Decoded,
    PixelTransform,
    UnusableImage,
    crop_box,
    decode,
    decode_image,
    rand_augment,
    random_resized_crop,
)

SIDE = 16


def whole(image: Image.Image) -> Decoded:
    return Decoded(image, image.size)


@pytest.fixture(scope="module")
def small(tokenizer: Any) -> M2EncoderProcessor:
    return M2EncoderProcessor(M2EncoderImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)


@pytest.mark.parametrize("name", list(REASONS))
def test_reasons(name: str) -> None:
    image = BROKEN[name]
    source = image and (image["bytes"] if image["bytes"] is not None else image["path"])
    with pytest.raises(UnusableImage) as caught:
        decode_image(source)
    assert caught.value.args[0] == REASONS[name]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16", "HSV"])
def test_every_mode_gives_the_pixels_of_the_processor(mode: str, small: Any) -> None:
    image = noise(5).convert("L").convert(mode) if mode in ("I;16", "LA", "1") else noise(5).convert(mode)
    kind = {"CMYK": "TIFF", "HSV": "TIFF"}.get(mode, "PNG")
    if mode == "HSV":
        image = image.convert("RGB")
    content = encoded(image, kind)
    transform = PixelTransform(small.image_processor)
    got = transform([decode(content)], [np.random.default_rng(0)])
    expected = small(images=Image.open(io.BytesIO(content)), return_tensors="pt").pixel_values
    assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [(1, 1), (SIDE, SIDE), (300, 7), (33, 64)])
def test_pixels_equal_the_processor(size: tuple[int, int], small: Any) -> None:
    image = noise(7, *size)
    got = PixelTransform(small.image_processor)([whole(image)], [np.random.default_rng(0)])
    assert torch.equal(got, small(images=image, return_tensors="pt").pixel_values)


def test_other_normalisation_and_resampling() -> None:
    processor = M2EncoderImageProcessorPil(
        size={"height": 12, "width": 10}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=2
    )
    got = PixelTransform(processor)([whole(noise(3))], [np.random.default_rng(0)])
    assert got.shape == (1, 3, 12, 10)
    assert torch.equal(got, processor(images=noise(3), return_tensors="pt").pixel_values)


def test_a_processor_that_does_more_is_refused() -> None:
    class Inverting(M2EncoderImageProcessorPil):
        def resize(self, image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
            return 255 - super().resize(image, *args, **kwargs)

    with pytest.raises(ValueError, match="Inverting does not give the pixels"):
        PixelTransform(Inverting(size={"height": 8, "width": 8}))
    with pytest.raises(ValueError, match="fixed height and width"):
        PixelTransform(M2EncoderImageProcessorPil(size={"shortest_edge": 8}))
    with pytest.raises(ValueError, match="augment must be one of none, crop"):
        PixelTransform(M2EncoderImageProcessorPil(), augment="cutout")


def test_crops_keep_four_fifths_of_the_image() -> None:
    areas, widths = [], []
    for seed in range(500):
        left, top, right, bottom = crop_box((200, 100), np.random.default_rng(seed))
        assert 0 <= left < right <= 200 + 1e-9 and 0 <= top < bottom <= 100 + 1e-9
        areas.append((right - left) * (bottom - top) / 20_000)
        widths.append((right - left) / 200)
    assert min(areas) >= 0.8 - 1e-9 and max(areas) <= 1 and abs(np.mean(areas) - 0.9) < 0.01
    assert min(widths) < 0.85 and max(widths) > 0.99


# ---- Draft decoding


def smooth(width: int, height: int) -> Image.Image:
    """A photo-like picture: few frequencies."""
    return noise(4, 6, 6).resize((width, height), Image.Resampling.BICUBIC)


def test_draft_decodes_at_a_fraction_and_never_below_twice_the_target() -> None:
    jpeg = encoded(smooth(640, 480), "JPEG")
    # 1/8 is the smallest there is: 80 x 60, twice 30. Twice 31 needs 1/4.
    for side, size in {16: (80, 60), 30: (80, 60), 31: (160, 120), 120: (320, 240), 121: (640, 480)}.items():
        image, extent = decode(jpeg, (side, side))
        assert image.size == extent == size
    assert decode(jpeg).image.size == decode_image(jpeg).size == (640, 480)
    assert decode(encoded(smooth(640, 480)), (16, 16)).image.size == (640, 480)  # PNG has no such mode
    grey = encoded(smooth(640, 480).convert("L"), "JPEG")
    assert decode(grey, (16, 16)).image.mode == "RGB"
    cmyk = encoded(smooth(640, 480).convert("CMYK"), "JPEG")
    assert decode(cmyk, (16, 16)).image.size == (80, 60)
    odd, extent = decode(encoded(smooth(637, 483), "JPEG"), (16, 16))
    assert odd.size == (80, 61) and extent == (637 / 8, 483 / 8)  # the last column is five eighths of one


@pytest.mark.parametrize("size", [(640, 480), (400, 300), (1023, 769)])
def test_what_draft_changes_is_small(size: tuple[int, int], small: Any) -> None:
    jpeg = encoded(smooth(*size), "JPEG")
    transform = PixelTransform(small.image_processor)
    exact, fast = (transform([decode(jpeg, target)], [np.random.default_rng(0)]) for target in (None, (SIDE, SIDE)))
    grey_levels = (exact - fast).abs() / (transform.levels[0, 1] - transform.levels[0, 0])
    assert 0 < grey_levels.mean() < 1  # stretched to whole pixels it would be 2 to 5


def test_broken_files_keep_their_reasons_in_draft_mode() -> None:
    whole = encoded(smooth(640, 480), "JPEG")
    for content, reason in (
        (whole[: len(whole) // 2], "broken_image"),
        (b"\xff\xd8\xff\xe0" + bytes(9), "not_an_image"),
    ):
        with pytest.raises(UnusableImage) as caught:
            decode(content, (16, 16))
        assert caught.value.args[0] == reason


# ---- The official augmentation


def test_random_resized_crop_keeps_area_and_ratio() -> None:
    for size in ((200, 150), (100, 100), (37, 50)):
        for seed in range(200):
            left, top, right, bottom = random_resized_crop(size, np.random.default_rng(seed))
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            area = (right - left) * (bottom - top) / (size[0] * size[1])
            assert 0.78 < area <= 1.02  # of whole pixels
            assert 0.73 < (right - left) / (bottom - top) < 1.36
    # No part of 0.8 of a banner has such a ratio: the middle, as torchvision falls back to it.
    assert random_resized_crop((400, 90), np.random.default_rng(0)) == (140, 0, 260, 90)
    assert random_resized_crop((90, 400), np.random.default_rng(0)) == (0, 140, 90, 260)
    assert random_resized_crop((1, 1), np.random.default_rng(0)) == (0, 0, 1, 1)
    assert random_resized_crop((1, 500), np.random.default_rng(0)) == (0, 249, 1, 250)


def affine_by_hand(image: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """`cv2.warpAffine(image, matrix, borderValue=128)` on grey pixels, in scipy: matrix maps old places to new ones."""
    full = np.array([*matrix, [0, 0, 1]], dtype=float)
    inverse = np.linalg.inv(full)
    swap = inverse[[1, 0]][:, [1, 0, 2]]  # scipy counts rows first
    return ndimage.affine_transform(
        image.astype(float), swap[:, :2], swap[:, 2], order=1, mode="grid-constant", cval=128
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometry_equals_the_official_matrices(name: str, sign: int) -> None:
    side = 32
    grey = np.asarray(smooth(side, side).convert("L"))
    cosine, sine = np.cos(np.radians(21)), np.sin(np.radians(sign * 21))
    shift = sign * 7 * side / 224
    matrix = {
        "ShearX": [[1, sign * 0.21, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [sign * 0.21, 1, 0]],
        "TranslateX": [[1, 0, -shift], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, -shift]],
        # cv2.getRotationMatrix2D((side / 2, side / 2), degrees, 1)
        "Rotate": [
            [cosine, sine, (1 - cosine) * side / 2 - sine * side / 2],
            [-sine, cosine, sine * side / 2 + (1 - cosine) * side / 2],
        ],
    }[name]
    got = np.asarray(OPERATIONS[name](Image.fromarray(np.stack([grey] * 3, axis=2)), sign))[..., 0]
    expected = affine_by_hand(grey, matrix)
    inside = ndimage.binary_erosion(affine_by_hand(np.full_like(grey, 255), matrix) > 254, iterations=2)
    assert inside.mean() > 0.3 and np.abs(got - expected)[inside].max() < 1.01  # rounded
    corners = got[[0, 0, -1, -1], [0, -1, 0, -1]] == 128
    assert corners.any()  # what left the picture is grey


def test_colour_operations_by_hand() -> None:
    image = Image.fromarray(np.array([[[10, 100, 200], [20, 100, 250], [30, 200, 100]]], dtype=np.uint8))
    bright = np.asarray(OPERATIONS["Brightness"](image, 1))[0].astype(int)
    assert np.abs(bright - np.minimum(np.asarray(image)[0] * 1.36, 255)).max() <= 1
    stretched = np.asarray(OPERATIONS["AutoContrast"](image, 1))[0].astype(int)  # each channel to 0..255
    assert np.abs(stretched[:, :2] - [[0, 0], [127, 0], [255, 255]]).max() <= 1
    sharp = np.asarray(OPERATIONS["Sharpness"](smooth(32, 32), 1)).astype(float)
    assert sharp.std() > np.asarray(smooth(32, 32)).astype(float).std()
    assert OPERATIONS["Identity"](image, 1) is image
    assert list(OPERATIONS) == [
        "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness",
        "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
    ]  # fmt: skip


def test_rand_augment_draws_two_and_does_each_half_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    marked = {name: (lambda image, sign, name=name: done.append(f"{name}{sign}") or image) for name in OPERATIONS}
    monkeypatch.setattr("training.images.OPERATIONS", marked)
    image, counts = noise(0), []
    for seed in range(4000):
        before = len(done)
        rand_augment(image, np.random.default_rng(seed))
        counts.append(len(done) - before)
    # Binomial(2, 1/2), and 4,000 operations over 10 x 2 signs: 200 each, five standard deviations are 70.
    assert np.allclose(np.bincount(counts) / 4000, [0.25, 0.5, 0.25], atol=0.03)
    assert len(set(done)) == 20 and all(130 < n < 270 for n in Counter(done).values())


def test_official_augmentation_is_a_function_of_the_generator(small: Any) -> None:
    transform = PixelTransform(small.image_processor, "official")
    image = smooth(60, 40)
    first, again, other = (transform([whole(image)], [np.random.default_rng(seed)]) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (1, 3, SIDE, SIDE)
    plain = PixelTransform(small.image_processor)([whole(image)], [np.random.default_rng(0)])
    assert first.min() >= plain.new_tensor(transform.levels.min()) and first.max() <= transform.levels.max()
    smaller = PixelTransform(small.image_processor, "official", size=(8, 8))
    assert smaller([whole(image)], [np.random.default_rng(3)]).shape == (1, 3, 8, 8)
