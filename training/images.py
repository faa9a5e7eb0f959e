"""Encoded images to pixels: decoding that nothing in a file can break, augmentation, and the model's own resize.

Tested by `pytest tests/training/test_images.py`. Shapes: B images, S image side in pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from modeling_m2encoder.image_processing_m2encoder import to_rgb

Augmentation = Literal["none", "crop", "official"]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

# Images that would take more than 200 MB as RGB are refused from the header: a few hundred bytes can claim any size.
MAX_PIXELS = 2**26
MIN_CROP_AREA = 0.8  # of the official training transform's random resized crop
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size only where that is at least this many times the target's sides.
DRAFT_MARGIN = 2

# The official RandAugment (`square_transform_randaug`): two of ten operations, each done half the time,
# at level 7 of 10.
_OPERATIONS, _PROBABILITY, _LEVEL = 2, 0.5, 0.7
_ENHANCE = _LEVEL * 1.8 + 0.1
_SHEAR = _LEVEL * 0.3
_DEGREES = _LEVEL * 30
_SHIFT = _LEVEL * 10 / 224  # of the side: the official 7 pixels at 224
_GREY = (128, 128, 128)


class UnusableImage(Exception):
    """Why an image cannot be used: `args[0]` is one of the reasons counted in a batch's `skipped`."""


class Decoded(NamedTuple):
    """An RGB image, and how much of it is the picture, in its pixels: its size, but for a fraction of the last ones."""

    image: Image.Image
    extent: tuple[float, float]
    """(width, height)."""


def decode_image(image: bytes | str | None) -> Image.Image:
    """An encoded image, or the path of one, as RGB: the same pixels as the model's image processor sees.

    Raises:
        UnusableImage: "no_image" (missing or no such file), "not_an_image" (no format PIL knows), "too_many_pixels"
            (more than MAX_PIXELS in the header) or "broken_image" (truncated, damaged, no conversion to RGB).
    """
    return decode(image).image


def decode(image: bytes | str | None, target: tuple[int, int] | None = None) -> Decoded:
    """As `decode_image`; with a `target`, in JPEG's draft mode where the image is much larger than that.

    Draft mode: a JPEG that is 2 * `DRAFT_MARGIN` times as large as the target (width, height) or more, on both sides,
    is decoded at 1/2, 1/4 or 1/8 of its size, but not below `DRAFT_MARGIN` times the target. libjpeg then averages
    blocks of pixels which the processor's bicubic filter would have weighted: `benchmarks/data_streams.json` has the
    difference in grey levels, and the speed. The last column and row may stand for a part of a pixel; without `extent`
    the picture would be stretched by that, which changes pixels ten times as much.
    """
    if not image:
        raise UnusableImage("no_image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter limit
            opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        with opened:
            if math.prod(opened.size) > MAX_PIXELS:
                raise UnusableImage("too_many_pixels")
            extent: tuple[float, float] = opened.size
            if target is not None and opened.format == "JPEG":
                drafted = opened.draft(None, (DRAFT_MARGIN * target[0], DRAFT_MARGIN * target[1]))
                extent = drafted[1][2:] if drafted else extent
            return Decoded(to_rgb(opened), extent)
    except (UnusableImage, MemoryError):
        raise
    except FileNotFoundError as error:
        raise UnusableImage("no_image") from error
    except Image.DecompressionBombError as error:
        raise UnusableImage("too_many_pixels") from error
    except UnidentifiedImageError as error:
        raise UnusableImage("not_an_image") from error
    # PIL's plug-ins raise anything on damaged data: struct.error, zlib.error, IndexError, ...
    except Exception as error:
        raise UnusableImage("broken_image") from error


class PixelTransform:
    """RGB images to `pixel_values`, bit for bit as the model's image processor makes them, in half the time or less.

    Args:
        image_processor: resizes to a fixed height and width, rescales and normalises.
        augment: "none"; "crop": a random part of 0.8 to 1.0 of the area, its sides shortened by different factors;
            "official": what the published training code does (`square_transform_randaug`): `random_resized_crop`,
            then a mirror image half of the time, then `rand_augment`.
        flip: mirror every other image at random ("official" always does). Wrong for captions that say left and right.
        size: (height, width) instead of the image processor's.

    Raises:
        ValueError: for an unknown `augment`, or an image processor that does anything else than the above.
    """

    def __init__(
        self,
        image_processor: Any,
        augment: Augmentation = "none",
        flip: bool = False,
        size: tuple[int, int] | None = None,
    ):
        if augment not in get_args(Augmentation):
            raise ValueError(f"augment must be one of {', '.join(get_args(Augmentation))}, got {augment!r}.")
        given = dict(image_processor.size)
        if not given.get("height") or not given.get("width"):
            raise ValueError(f"The image processor must resize to a fixed height and width, but its size is {given}.")
        self.height, self.width = size or (given["height"], given["width"])
        self.resample = image_processor.resample
        self.augment, self.flip = augment, flip or augment == "official"
        # Rescaling and normalising map each of a channel's 256 values to one float: the processor itself says which.
        ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
        pixels = image_processor(images=Image.fromarray(ramp), do_resize=False, return_tensors="np")["pixel_values"]
        self.levels = np.asarray(pixels, dtype=np.float32).reshape(3, 256)
        self._check_against(image_processor)

    def _check_against(self, image_processor: Any) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (2 * self.height + 3, self.width + 5, 3), dtype=np.uint8)
        probe = Image.fromarray(noise)
        size = {"height": self.height, "width": self.width}
        expected = np.asarray(image_processor(images=probe, size=size, return_tensors="np")["pixel_values"])
        got = np.empty((1, 3, self.height, self.width), dtype=np.float32)
        self._write(got[0], self._resize(probe, None))
        if not np.array_equal(got, expected):
            raise ValueError(
                f"{type(image_processor).__name__} does not give the pixels of a PIL resize, rescale and normalise; "
                "training would see other pixels than inference. Use M2EncoderImageProcessorPil."
            )

    def __call__(self, images: Sequence[Decoded], generators: Sequence[np.random.Generator]) -> torch.Tensor:
        """B images and a random generator for each -> [B, 3, height, width] float32."""
        values = np.empty((len(images), 3, self.height, self.width), dtype=np.float32)
        for place, decoded, generator in zip(values, images, generators, strict=True):
            image = self._resize(*self._part(decoded, generator))
            if self.flip and generator.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if self.augment == "official":
                image = rand_augment(image, generator)
            self._write(place, image)
        return torch.from_numpy(values)

    def _part(self, decoded: Decoded, generator: np.random.Generator) -> tuple[Image.Image, Box | None]:
        image, (width, height) = decoded
        if self.augment == "official":  # cuts first: no pixel outside has a weight
            whole = (max(int(width), 1), max(int(height), 1))
            return image.crop(random_resized_crop(whole, generator)), None
        return image, crop_box((width, height), generator) if self.augment == "crop" else (0, 0, width, height)

    def _resize(self, image: Image.Image, box: Box | None) -> Image.Image:
        return image.resize((self.width, self.height), self.resample, box)

    def _write(self, place: np.ndarray, image: Image.Image) -> None:
        """Into [3, height, width]. "clip" only spares numpy the bounds check: no value of a byte is out of bounds."""
        pixels = np.asarray(image)
        for channel in range(3):
            np.take(self.levels[channel], pixels[..., channel], out=place[channel], mode="clip")


def crop_box(size: tuple[float, float], generator: np.random.Generator) -> Box:
    """A random (left, top, right, bottom) inside an image of (width, height) pixels: 0.8 to 1.0 of its area."""
    area, split, x, y = generator.random(4)
    area = MIN_CROP_AREA + (1 - MIN_CROP_AREA) * area
    # area = width * height; `split` gives the whole reduction to one side (0 or 1) or shares it.
    width, height = size[0] * area**split, size[1] * area ** (1 - split)
    left, top = x * (size[0] - width), y * (size[1] - height)
    return left, top, left + width, top + height


def random_resized_crop(size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """torchvision's `RandomResizedCrop(scale=(0.8, 1.0))`: whole pixels, an aspect ratio from 3/4 to 4/3.

    Ten tries to find a part of the drawn area and ratio that fits into (width, height); after them, the largest part
    in the middle whose ratio lies in that range: a wide banner loses most of its width.
    """
    width, height = size
    for _ in range(10):
        area = width * height * generator.uniform(MIN_CROP_AREA, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(round(height * 4 / 3), 1)), min(height, max(round(width * 4 / 3), 1))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def rand_augment(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """The official code's RandAugment: two operations of `OPERATIONS`, drawn with replacement, each done half the time.

    What it does to captions: equalize stretches each channel by itself, so that colours can change their name in
    pictures of few colours; brightness, autocontrast and equalize make dark things bright. Shapes, counts and the order
    of things stay; what leaves the picture is filled with grey. Scenes, whose captions name colours and shades, are
    better off with "crop".
    """
    for name in generator.choice(len(OPERATIONS), _OPERATIONS):
        if generator.random() < _PROBABILITY:
            sign = 1 if generator.random() < 0.5 else -1
            image = list(OPERATIONS.values())[name](image, sign)
    return image


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """The pixel at (x, y) comes from (ax + by + c, dx + ey + f), pixels counted from 0 at their centres."""
    # PIL puts the centre of the first pixel at 0.5.
    c, f = c + (1 - a - b) / 2, f + (1 - d - e) / 2
    data = (a, b, c, d, e, f)
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=_GREY)


def _rotate(image: Image.Image, sign: int) -> Image.Image:
    # About (width / 2, height / 2) in pixels counted at their centres, as OpenCV does: half a pixel off the middle.
    centre = (image.width / 2 + 0.5, image.height / 2 + 0.5)
    return image.rotate(sign * _DEGREES, Image.Resampling.BILINEAR, center=centre, fillcolor=_GREY)


OPERATIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "Identity": lambda image, sign: image,
    "AutoContrast": lambda image, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, sign: ImageOps.equalize(image),
    "Brightness": lambda image, sign: ImageEnhance.Brightness(image).enhance(_ENHANCE),
    "Sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(_ENHANCE),
    "ShearX": lambda image, sign: _affine(image, 1, -sign * _SHEAR, 0, 0, 1, 0),
    "ShearY": lambda image, sign: _affine(image, 1, 0, 0, -sign * _SHEAR, 1, 0),
    "TranslateX": lambda image, sign: _affine(image, 1, 0, sign * _SHIFT * image.width, 0, 1, 0),
    "TranslateY": lambda image, sign: _affine(image, 1, 0, 0, 0, 1, sign * _SHIFT * image.height),
    "Rotate": _rotate,
}
"""The official ten, at their one level: enhancement by 1.36, shear by 0.21, shift by 7/224 of the side, 21 degrees."""
