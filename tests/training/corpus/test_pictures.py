"""One image: formats, limits before decoding, damage, and that nothing in a file raises."""

from __future__ import annotations

import io
import random
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile

from training.corpus import perceptual
from training.corpus.clean import CleanSettings
from training.corpus.pictures import FORMATS, _gif_frames, _webp_pixels, measure

LIMITS = CleanSettings()
RANDOM = np.random.default_rng(0)


def cloud(width: int = 90, height: int = 60) -> Image.Image:
    values = RANDOM.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_good_images(format: str) -> None:
    found = measure(encoded(cloud(), format), LIMITS)
    assert (found.reason, found.width, found.height) == (None, 90, 60) and found.small.shape == (16, 16, 3)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"<html>", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),  # Pillow would start Ghostscript
        (encoded(cloud(), "ICO"), "not_an_image"),
        (encoded(cloud(), "PPM"), "not_an_image"),
        (encoded(cloud(), "JPEG")[:10], "broken_image"),
        (encoded(cloud(), "PNG")[:20], "broken_image"),
        (encoded(cloud(91, 30), "PNG"), "aspect_ratio"),
        (encoded(cloud(30, 91), "PNG"), "aspect_ratio"),
        (encoded(cloud(90, 30), "PNG"), None),
    ],
)
def test_reasons(data: bytes, reason: str | None) -> None:
    assert measure(data, LIMITS).reason == reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(format: str, share: float) -> None:
    noise = Image.fromarray(RANDOM.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    data = encoded(noise, format)
    assert measure(data[: int(len(data) * share)], LIMITS).reason in ("broken_image", "not_an_image")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_truncated_where_it_is_decoded_at_an_eighth(options: dict) -> None:
    """Draft mode reads all of the file."""
    data = encoded(cloud(1600, 1200), "JPEG", quality=95, **options)
    assert measure(data, LIMITS).reason is None
    for share in (0.5, 0.9, 0.98):
        assert measure(data[: int(len(data) * share)], LIMITS).reason == "broken_image"


def test_truncated_images_are_not_let_pass_by_others_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as `import data_juicer` does
    data = encoded(cloud(), "JPEG")
    assert measure(data[: len(data) // 2], LIMITS).reason == "broken_image"


def webp(width: int, height: int, kind: bytes) -> bytes:
    """The header of a WebP that claims any size, with nothing behind."""
    if kind == b"VP8X":
        body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little")
    else:
        body = bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height)
    body += bytes(40)
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBP" + kind + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
def test_webp_headers(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _webp_pixels(webp(640, 480, kind)) == 640 * 480
    # Pillow would make room for two canvases of 16,383 x 16,383 when it opens one: it must not be asked.
    monkeypatch.setattr(Image, "open", None)
    assert measure(webp(16_383, 16_383, kind), LIMITS).reason == "too_many_pixels"


def test_webp_headers_of_real_files() -> None:
    for options in ({}, {"lossless": True}, {"exif": Image.Exif().tobytes() + b"x"}):
        assert _webp_pixels(encoded(cloud(91, 61), "WEBP", **options)) == 91 * 61
    assert _webp_pixels(encoded(cloud(), "PNG")) == 0 and _webp_pixels(b"RIFF") == 0


def huge(format: str) -> bytes:
    """A small file that says it has 30,000 x 30,000 pixels."""
    data = encoded(cloud().convert("P" if format == "GIF" else "RGB"), format)
    if format == "PNG":
        from zlib import crc32

        chunk = b"IHDR" + struct.pack(">II", 30_000, 30_000) + data[24:29]
        return data[:12] + chunk + struct.pack(">I", crc32(chunk)) + data[33:]
    if format == "GIF":
        return data[:6] + struct.pack("<HH", 30_000, 30_000) + data[10:]
    if format == "BMP":
        return data[:18] + struct.pack("<ii", 30_000, 30_000) + data[26:]
    place = data.index(b"\xff\xc0") + 5  # JPEG: the frame header
    return data[:place] + struct.pack(">HH", 30_000, 30_000) + data[place + 4 :]


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "JPEG"])
def test_bombs_are_refused_from_their_header(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert measure(huge(format), LIMITS).reason == "too_many_pixels"
    # ... also where Pillow's own setting is off.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert measure(huge(format), LIMITS).reason == "too_many_pixels"


def test_limits_are_settings() -> None:
    data = encoded(cloud(100, 50), "PNG")
    for change, reason in [
        ({"max_pixels": 4999}, "too_many_pixels"),
        ({"max_pixels": 5000}, None),
        ({"max_bytes": len(data) - 1}, "too_many_bytes"),
        ({"max_bytes": len(data)}, None),
        ({"max_aspect_ratio": 1.9}, "aspect_ratio"),
        ({"max_aspect_ratio": 2.0}, None),
    ]:
        assert measure(data, replace(LIMITS, **change)).reason == reason


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animations(format: str) -> None:
    frames = [cloud().convert("P" if format == "GIF" else "RGB") for _ in range(5)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, loop=0)
    assert measure(data, replace(LIMITS, max_frames=5)).reason is None
    assert measure(data, replace(LIMITS, max_frames=4)).reason == "too_many_frames"
    first = perceptual.thumbnails(measure(data, LIMITS).small[None])[0]
    still = perceptual.thumbnails(perceptual.small(frames[0].convert("RGB"))[None])
    assert perceptual.are_twins(first, still).all()


def test_gif_frames_are_counted_as_pillow_counts_them() -> None:
    for number in (1, 2, 7):
        frames = [cloud().convert("P", palette=Image.Palette.ADAPTIVE) for _ in range(number)]
        data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"c" * 300)
        with Image.open(io.BytesIO(data)) as image:
            assert _gif_frames(data, 1000) == image.n_frames == number


def test_a_decoded_eighth_is_the_same_picture() -> None:
    for size in ((1601, 1203), (2047, 1025), (800, 1200)):
        image = cloud(*size)
        found = measure(encoded(image, "JPEG", quality=90), LIMITS)
        whole = perceptual.small(image).astype(int)
        assert np.abs(found.small[..., 0].astype(int) - whole[..., 0]).max() <= 4


def test_no_bytes_raise() -> None:
    """Thousands of damaged files of all formats: always an answer."""
    choose = random.Random(0)
    answers = set()
    for format in FORMATS:
        good = encoded(cloud(40, 30).convert("P" if format == "GIF" else "RGB"), format)
        for _ in range(150):
            data = bytearray(good)
            for _ in range(choose.randint(1, 12)):
                data[choose.randrange(len(data))] = choose.randrange(256)
            answers.add(measure(bytes(data[: choose.randint(1, len(data))]), LIMITS).reason)
    assert answers >= {None, "broken_image", "not_an_image", "too_many_pixels"}
