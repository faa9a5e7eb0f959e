"""What a web crawl makes of pictures: copies in other bytes, unusual formats, and files that are no good picture."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageCms

from tests.training.corpus.messy_pictures import encode, opened

# ---- Copies and unusual forms of one picture, all good


def copied(data: bytes, choose: random.Random) -> tuple[bytes, str]:
    """The same picture in other bytes, and how: what sites do to photos that they show again."""
    image = opened(data).convert("RGB")
    how = choose.choice(["quality", "quality", "resized", "png", "webp", "png of a small jpeg"])
    if how == "quality":
        quality = choose.randint(30, 95)
        return encode(image, "JPEG", quality=quality), f"copy: JPEG of quality {quality}"
    if how == "resized":
        scale = choose.choice([0.8, 0.9, 1.15, 1.5])
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        return encode(image, "JPEG", quality=85), f"copy: {scale} times the side"
    if how == "webp":
        return encode(image, "WEBP", quality=75), "copy: WebP"
    if how == "png":
        return encode(image, "PNG"), "copy: PNG"
    return encode(opened(encode(image, "JPEG", quality=60)), "PNG"), "copy: JPEG as PNG"


def copied_drawing(data: bytes, choose: random.Random) -> tuple[bytes, str]:
    """The same for drawings, whose edges JPEG and resizing change more than the look-alikes differ: gently."""
    image = opened(data).convert("RGB")
    how = choose.choice(["PNG", "WEBP", "JPEG", "BMP"])
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": choose.randint(80, 95), "subsampling": 0}}
    return encode(image, how, **options.get(how, {})), f"copy: drawing as {how}"


def _with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _rotated_by_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "JPEG", exif=exif)


def _just_three_to_one(image: Image.Image) -> bytes:
    return encode(image.resize((120, 40)), "PNG")


def _animated(image: Image.Image) -> bytes:
    frames = [image.convert("P"), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("P")]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def _profiled(image: Image.Image) -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the time of its making
    return encode(image, "JPEG", icc_profile=bytes(profile))


UNUSUAL: dict[str, Callable[[Image.Image], bytes]] = {
    "CMYK JPEG": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "16-bit grey PNG": lambda image: encode(_sixteen_bits(image), "PNG"),
    "grey JPEG": lambda image: encode(image.convert("L"), "JPEG"),
    "grey PNG with alpha": lambda image: encode(image.convert("LA"), "PNG"),
    "RGBA PNG": lambda image: encode(_with_alpha(image), "PNG"),
    "palette PNG": lambda image: encode(image.quantize(64), "PNG"),
    "palette PNG with a transparent colour": lambda image: encode(image.quantize(64), "PNG", transparency=0),
    "progressive JPEG": lambda image: encode(image, "JPEG", progressive=True),
    "JPEG turned by EXIF": _rotated_by_exif,
    "JPEG with a profile": _profiled,
    "WebP": lambda image: encode(image, "WEBP"),
    "BMP": lambda image: encode(image, "BMP"),
    "TIFF": lambda image: encode(image, "TIFF"),
    "animated GIF": _animated,
    "3 to 1": _just_three_to_one,
}


# ---- Files that are no good picture. Each maker is given a good one that nothing else in the corpus shows.


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


def _strip(width: int, height: int, format: str = "JPEG") -> Callable[[bytes], bytes]:
    return lambda data: encode(opened(data).convert("RGB").resize((width, height)), format)


def _turned_strip(data: bytes) -> bytes:
    return _rotated_by_exif(opened(data).convert("RGB").resize((200, 50)))


@cache
def png_bomb(side: int) -> bytes:
    """A black one-bit PNG of `side` x `side` pixels: 30,000 gives 900 megapixels in 110 kB, without its pixels in
    memory here."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    line = bytes(1 + (side + 7) // 8)
    body = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _gif_bomb(data: bytes) -> bytes:
    """A GIF that says its canvas has 60,000 x 60,000 pixels."""
    whole = encode(opened(data).convert("P"), "GIF")
    return whole[:6] + struct.pack("<HH", 60_000, 60_000) + whole[10:]


def _bmp_bomb(data: bytes) -> bytes:
    """A BMP whose header says 30,000 x 30,000 pixels over the bytes of a small one."""
    whole = encode(opened(data).convert("RGB"), "BMP")
    return whole[:18] + struct.pack("<ii", 30_000, 30_000) + whole[26:]


_HTML = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>hotlinking denied</body></html>"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="100" height="100"><circle cx="50" cy="50" r="40"/></svg>'

# The pipeline's names of reasons (training/corpus/clean.py); where a file has two faults, either is right.
BROKEN, NOT_AN_IMAGE, NO_IMAGE = frozenset({"broken_image"}), frozenset({"not_an_image"}), frozenset({"no_image"})
RATIO, PIXELS = frozenset({"aspect_ratio"}), frozenset({"too_many_pixels"})
Fault = tuple[str, Callable[[bytes], bytes | None], frozenset[str]]
FAULTS: list[Fault] = [
    ("JPEG cut at 60 %", lambda data: _cut(0.6)(encode(opened(data).convert("RGB"), "JPEG")), BROKEN),
    ("JPEG cut at 90 %", lambda data: _cut(0.9)(encode(opened(data).convert("RGB"), "JPEG")), BROKEN),
    ("PNG cut at 60 %", lambda data: _cut(0.6)(encode(opened(data).convert("RGB"), "PNG")), BROKEN),
    ("WebP cut at 60 %", lambda data: _cut(0.6)(encode(opened(data).convert("RGB"), "WEBP")), NOT_AN_IMAGE | BROKEN),
    ("the header of a JPEG", lambda data: data[:20], NOT_AN_IMAGE | BROKEN),
    ("empty", lambda data: b"", NO_IMAGE),
    ("no image", lambda data: None, NO_IMAGE),
    ("random bytes", lambda data: random.Random(zlib.crc32(data)).randbytes(2000), NOT_AN_IMAGE),
    ("HTML", lambda data: _HTML, NOT_AN_IMAGE),
    ("SVG", lambda data: _SVG, NOT_AN_IMAGE),
    ("text", lambda data: "图片不存在 image not found".encode(), NOT_AN_IMAGE),
    ("zip", lambda data: b"PK\x03\x04" + bytes(200), NOT_AN_IMAGE),
    ("wide strip", _strip(128, 40), RATIO),
    ("tall strip", _strip(30, 120), RATIO),
    ("one pixel over 3 to 1", _strip(121, 40, "PNG"), RATIO),
    ("line of one pixel", _strip(500, 1, "PNG"), RATIO),
    ("strip turned by EXIF", _turned_strip, RATIO),
    ("GIF bomb", _gif_bomb, PIXELS),
    ("BMP bomb", _bmp_bomb, frozenset({"too_many_pixels", "broken_image"})),
]
BOMBS: list[Fault] = [
    ("900-megapixel PNG", lambda data: png_bomb(30_000), PIXELS),
    ("121-megapixel PNG", lambda data: png_bomb(11_000), PIXELS),
]
"""The dear ones to make (0.4 s): each is made once."""
