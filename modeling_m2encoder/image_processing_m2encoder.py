"""The image processors: RGB, squash resize with a bicubic filter, values in [-1, 1]; by PIL, or by torchvision
where it is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, load_image
from transformers.utils import is_torchvision_available


class OfficialTransform:
    """The official transform as settings, and which images it takes; shared by both backends."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> Any:
        """One image of any kind that transformers accepts -> [3, height, width], as the backend holds it."""
        if isinstance(image, Image.Image) and do_convert_rgb:
            image = np.asarray(to_rgb(image)).transpose(2, 0, 1)
            return self.from_rgb(image, **kwargs)
        if isinstance(image, np.ndarray) and image.dtype.kind in "iu" and image.dtype != np.uint8:
            raise ValueError(
                f"Arrays of {image.dtype} have no defined range: pass uint8 in 0..255, or a PIL image (16-bit "
                "greyscale is scaled there)."
            )
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)


class M2EncoderImageProcessorPil(OfficialTransform, PilBackend):
    r"""
    Images to `pixel_values` [B, 3, size, size] as the official code makes them (its `Resize` on PIL images, `ToTensor`,
    `Normalize(0.5, 0.5)`): the aspect ratio is not kept, and nothing is cropped. Needs no torchvision; published
    numbers are measured with it (`AutoImageProcessor.from_pretrained(folder, backend="pil")`).

    A stock class cannot do this for every image: it guesses where the channels of a picture of one or three pixels
    are, and PIL clips 16-bit greyscale to white. Here any PIL image is accepted as follows: greyscale, palette,
    CMYK and the other modes are converted as `Image.convert("RGB")` does (an alpha channel is dropped), 16-bit
    greyscale is scaled to 8 bits, and an image that PIL cannot decode or convert is a `ValueError` that names its
    size and mode.
    """

    def from_rgb(self, image: np.ndarray, **kwargs: Any) -> np.ndarray:
        return image


class M2EncoderImageProcessor(OfficialTransform, TorchvisionBackend):
    r"""
    The same in torch, on an accelerator too (`device="cuda"`): the grey levels are PIL's, the last bit of the
    floating-point numbers is not. `AutoImageProcessor` chooses it where torchvision is installed. It takes and
    refuses the same images.
    """

    def __init__(self, **kwargs: Any):
        if not is_torchvision_available():
            raise ImportError(
                "M2EncoderImageProcessor needs torchvision, which is not installed. Use M2EncoderImageProcessorPil or "
                "AutoImageProcessor, which need PIL only, or install the torchvision that belongs to your torch."
            )
        super().__init__(**kwargs)

    def from_rgb(self, image: np.ndarray, device: torch.device | None = None, **kwargs: Any) -> torch.Tensor:
        return torch.from_numpy(image.copy()).to(device)

    def resize(self, image: torch.Tensor, size: Any, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        """[B, 3, height, width] -> [B, 3, size.height, size.width]."""
        if image.dtype == torch.uint8 and resample == PILImageResampling.BICUBIC and size.height and size.width:
            return torch.stack([resize_like_pil(each, size.height, size.width) for each in image])
        return super().resize(image, size, resample=resample, **kwargs)

    def fetch_images(self, images: Any) -> Any:
        # torchvision's own decoder reads fewer formats and leaves palettes and alpha channels to chance.
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return load_image(images) if isinstance(images, str) else super().fetch_images(images)


def resize_like_pil(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[3, H, W] uint8 -> [3, height, width] uint8, bicubic with antialiasing, bit for bit as PIL does it.

    torchvision's own filter is up to 27 grey levels away where it overshoots (2 in photos): PIL rounds and clips to
    8 bits between its two passes, has weights of 22 fractional bits, and since Pillow 13 begins with the rows where
    those shrink more (observed on 13.0.0; python-pillow/Pillow#9549), before it only in pictures more than 100 times
    as high as wide (observed on 12.3.0).
    """
    _, rows, columns = image.shape
    if int(pillow_version.split(".")[0]) >= 13:
        rows_first = rows - height > max(0, 2 * (columns - width))
    else:
        rows_first = height < rows and rows > 100 * columns
    if rows_first:
        image = _resample_rows(image, height)
    image = _resample_rows(image.transpose(1, 2), width).transpose(1, 2)
    return image if rows_first else _resample_rows(image, height)


def _resample_rows(image: torch.Tensor, size: int) -> torch.Tensor:
    """One pass over dimension 1: [3, N, other] -> [3, size, other] uint8, as a sparse matrix of weights times the
    rows."""
    channels, rows, other = image.shape
    if rows == size:
        return image
    weights = _bicubic_weights(rows, size).to(image.device)
    # float64 holds every sum of 8-bit values times 22-bit weights exactly.
    summed = torch.sparse.mm(weights, image.transpose(0, 1).reshape(rows, channels * other).double())
    rounded = ((summed + 2**21) / 2**22).floor().clamp(0, 255).to(torch.uint8)
    return rounded.reshape(size, channels, other).transpose(0, 1)


@lru_cache(maxsize=32)
def _bicubic_weights(old: int, new: int) -> torch.Tensor:
    """PIL's weights for resampling `old` places to `new`: sparse [new, old], whole multiples of 2**-22."""
    stretch = max(old / new, 1.0)  # the filter widens when the image shrinks
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * (old / new)
    first = (centre - 2 * stretch + 0.5).long().clamp(min=0)
    last = (centre + 2 * stretch + 0.5).long().clamp(max=old)
    place = first[:, None] + torch.arange(int((last - first).max()))
    x = ((place - centre[:, None] + 0.5) / stretch).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2  # Keys' cubic with a = -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * (place < last[:, None])
    weights = weights / weights.sum(dim=1, keepdim=True) * 2**22
    weights = (weights + 0.5 * weights.sign()).trunc()
    used = weights != 0
    row = torch.arange(new)[:, None].expand_as(place)
    indices = torch.stack([row[used], place[used]])
    return torch.sparse_coo_tensor(indices, weights[used], (new, old), is_coalesced=True, check_invariants=True)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB.

    Raises:
        ValueError: when the file behind it is truncated or damaged, or PIL has no conversion for its mode, or its
        values
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


__all__ = ["M2EncoderImageProcessor", "M2EncoderImageProcessorPil"]
