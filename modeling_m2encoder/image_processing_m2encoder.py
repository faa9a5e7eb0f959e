"""The image processor: RGB, squash resize with PIL's bicubic filter, values in [-1, 1]. Needs no torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling


class M2EncoderImageProcessorPil(PilBackend):
    r"""
    Images to `pixel_values` [B, 3, size, size] as the official code makes them (its `Resize` on PIL images, `ToTensor`,
    `Normalize(0.5, 0.5)`): the aspect ratio is not kept, and nothing is cropped.

    A stock class cannot do this for every image: it guesses where the channels of a picture of one or three pixels are, and
    PIL clips 16-bit greyscale to white. Here any PIL image is accepted as follows: greyscale, palette, CMYK and the other
    modes are converted as `Image.convert("RGB")` does (an alpha channel is dropped), 16-bit greyscale is scaled to 8 bits,
    and an image that PIL cannot decode or convert is a `ValueError` that names its size and mode.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> np.ndarray:
        """One image of any kind that transformers accepts -> [3, height, width]."""
        if isinstance(image, Image.Image) and do_convert_rgb:
            return np.moveaxis(np.asarray(to_rgb(image)), -1, 0)
        if isinstance(image, np.ndarray) and image.dtype.kind in "iu" and image.dtype != np.uint8:
            raise ValueError(
                f"Arrays of {image.dtype} have no defined range: pass uint8 in 0..255, or a PIL image (16-bit "
                "greyscale is scaled there)."
            )
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB.

    Raises:
        ValueError: when the file behind it is truncated or damaged, or PIL has no conversion for its mode, or its values
            have no defined range (32-bit integers and floats outside 0..255).
    """
    seen = f"image of {image.size[0]}x{image.size[1]} pixels, mode {image.mode!r}"
    try:
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            low, high = image.getextrema()
            if not (0 <= low and high <= 255):  # also refuses NaN
                raise ValueError(f"values from {low} to {high} have no defined range; scale them to 0..255")
        return image.convert("RGB")
    # PIL raises OSError for truncated data, SyntaxError for broken chunks, ValueError for unknown conversions.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"Cannot read the {seen}: {error}.") from error


__all__ = ["M2EncoderImageProcessorPil"]
