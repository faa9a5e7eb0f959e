"""One encoded image of unknown origin, measured in one pass: header, limits, decoding, thumbnail.

Nothing is decoded before its header has been seen to be within the limits, here and not by Pillow's settings of a
module, which the workers of Ray do not share.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from . import perceptual

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may open. Not PostScript, which starts another program, nor the rare formats, whose decoders nobody
looks after."""
_DRAFT = (8 * perceptual.SIDE, 8 * perceptual.SIDE)
"""A JPEG is decoded at 1/2, 1/4 or 1/8 if it is larger than this then: 8 pixels a side for each field of the
thumbnail. All of the file is read for it, so that a truncated one still fails."""


class Limits(Protocol):
    """The part of `clean.CleanSettings` that is about one image."""

    max_aspect_ratio: float
    max_pixels: int
    max_bytes: int
    max_frames: int


@dataclass(frozen=True)
class Measured:
    """What an image is. `reason` says why it cannot be used, or is None; what is not known then is None."""

    reason: str | None = None
    width: int | None = None
    height: int | None = None
    """In pixels, as the file says, before a rotation that it asks for."""
    small: np.ndarray | None = None
    """[16, 16, 3]; see `perceptual.small`."""


def measure(data: bytes, limits: Limits) -> Measured:
    """Decodes an image once, at reduced size where the format can.

    Returns:
        Measured, with one of the reasons "too_many_bytes", "not_an_image", "too_many_pixels", "too_many_frames",
        "aspect_ratio", "broken_image", or None. Never raises but for want of memory.
    """
    if len(data) > limits.max_bytes:
        return Measured("too_many_bytes")
    if _webp_pixels(data) > limits.max_pixels:
        return Measured("too_many_pixels")  # Pillow makes room for the whole canvas when it opens one
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever another library of the process has set
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _measured(image, data, limits)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return Measured("too_many_pixels")
        except UnidentifiedImageError:
            return Measured("not_an_image")
        except MemoryError:
            raise
        except Exception:  # Pillow's plug-ins raise anything on damaged data: struct.error, zlib.error, IndexError, ...
            return Measured("broken_image")


def _measured(image: Image.Image, data: bytes, limits: Limits) -> Measured:
    width, height = image.size
    if min(width, height) < 1:
        return Measured("broken_image")
    if width * height > limits.max_pixels:
        return Measured("too_many_pixels", width, height)
    if _frames(image, data, limits.max_frames) > limits.max_frames:
        return Measured("too_many_frames", width, height)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        return Measured("aspect_ratio", width, height)
    drafted = image.draft("YCbCr", _DRAFT) if image.format in ("JPEG", "MPO") else None
    image.load()
    return Measured(None, width, height, perceptual.small(image, drafted[1] if drafted else None))


def _webp_pixels(data: bytes) -> int:
    """Width times height of a WebP by its header; 0 for other data. RFC 9649, sections 2.5 to 2.7."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0
    if data[12:16] == b"VP8X":
        return (1 + int.from_bytes(data[24:27], "little")) * (1 + int.from_bytes(data[27:30], "little"))
    if data[12:16] == b"VP8L":
        sides = int.from_bytes(data[21:25], "little")
        return (1 + (sides & 0x3FFF)) * (1 + (sides >> 14 & 0x3FFF))
    return (int.from_bytes(data[26:28], "little") & 0x3FFF) * (int.from_bytes(data[28:30], "little") & 0x3FFF)


def _frames(image: Image.Image, data: bytes, limit: int) -> int:
    """The number of frames, or one more than the limit if there are more."""
    if image.format == "GIF":
        return _gif_frames(data, limit)
    if image.format == "TIFF":
        return 1  # its pages are a document, of which the first counts; Pillow would read them all
    return getattr(image, "n_frames", 1)


def _gif_frames(data: bytes, limit: int) -> int:
    """Counts the image blocks without decoding one: Pillow would prepare each."""
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    frames = 0
    while place < len(data) and frames <= limit:
        kind = data[place]
        if kind == 0x2C and place + 9 < len(data):  # an image: 10 bytes, its colours, then the size of its codes
            frames += 1
            flags = data[place + 9]
            place += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif kind == 0x21:  # an extension
            place += 2
        else:  # the end, or nothing that Pillow would read on after
            break
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1
    return frames
