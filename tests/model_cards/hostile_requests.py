"""Two hundred requests that mean harm or make no sense, and what has to come of each.

`HOSTILE` has (name, content type, body, the statuses that may answer it). 200 is among them only where the request can
be taken at its word: a text with control characters is a text.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

JSON = "application/json"


class Hostile(NamedTuple):
    name: str
    kind: str
    body: bytes
    statuses: tuple[int, ...] = (422,)


def _file(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _png(width: int, height: int, data: bytes = b"\0" * 64, extra: bytes = b"", depth: bytes = b"\x08\x02") -> bytes:
    header = struct.pack(">II", width, height) + depth + b"\0\0\0"
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _gif(width: int, height: int) -> bytes:
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0" + size + b"\0\x02\x02\x44\x01\0;"


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def _tiff(width: int, height: int, strip: int = 8, length: int = 8) -> bytes:
    """One strip of RGB; `strip` and `length` may point anywhere."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 2), (273, 4, strip), (277, 3, 3)]
    entries += [(278, 4, height), (279, 4, length)]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + directory + b"\0\0\0\0"


def _webp(width: int, height: int) -> bytes:
    """The header of an animation; its pictures are missing."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + b"ANIM" + struct.pack("<I", 6) + b"\0" * 6
    return b"RIFF" + struct.pack("<I", len(body)) + body


_NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
PNG, JPEG, GIF, WEBP, TIFF = (_file(_NOISE, format) for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
ENTITIES = b'<!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><svg xmlns="http://www.w3.org/2000/svg">&b;</svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\nshowpage\n"
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>"
ZIP = b"PK\x03\x04" + b"\0" * 60
PICKLE = b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04exit\x94\x85\x94R\x94."
HUGE = {
    "png": _png(60_000, 60_000),
    "png, the largest header": _png(2**31 - 1, 2**31 - 1),
    "png, one row": _png(2**30, 1),
    "png just above the limit": _png(8193, 8192),
    "gif": _gif(65_535, 65_535),
    "bmp": _bmp(50_000, 50_000),
    "tiff": _tiff(100_000, 100_000),
    "jpeg": JPEG.replace(struct.pack(">HH", 60, 80), struct.pack(">HH", 65_500, 65_500), 1),
    "webp animation": _webp(2**24, 2**20),
}
BOMBS = {
    "png that inflates to more than its pixels": _png(8, 8, b"\0" * 50_000_000),
    "png with a text of 50 MB": _png(8, 8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 50_000_000))),
    "png with a profile of 50 MB": _png(8, 8, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(b"a" * 50_000_000))),
}
BROKEN = {
    **{f"jpeg cut to {part} %": JPEG[: len(JPEG) * part // 100] for part in (1, 5, 20, 50, 80, 95)},
    **{f"png cut to {part} %": PNG[: len(PNG) * part // 100] for part in (1, 5, 20, 50, 80, 95)},
    **{f"webp cut to {part} %": WEBP[: len(WEBP) * part // 100] for part in (1, 20, 80)},
    **{f"gif cut to {part} %": GIF[: len(GIF) * part // 100] for part in (1, 20, 60)},
    **{f"tiff cut to {part} %": TIFF[: len(TIFF) * part // 100] for part in (1, 20, 80)},
    "png with no pixels": _png(0, 0),
    "png of no height": _png(9, 0),
    "png with no data": _png(64, 64, b""),
    "png of a depth that is none": _png(8, 8, depth=b"\x07\x02"),
    "png of a colour type that is none": _png(8, 8, depth=b"\x08\x05"),
    "png with a wrong checksum": PNG[:40] + bytes([PNG[40] ^ 1]) + PNG[41:],
    "png with a chunk of 2 GB": PNG[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT" + b"\0" * 99,
    "png signature alone": PNG[:8],
    "bmp without pixels": _bmp(64, 64),
    "bmp of negative width": _bmp(-64, 64),
    "tiff whose strip is outside": _tiff(64, 64, strip=2**31, length=2**31),
    "tiff whose directory is itself": b"II*\0" + struct.pack("<I", 0) + b"\0" * 20,
    "tiff without a size": b"II*\0" + struct.pack("<IHI", 8, 0, 0),
    "webp without pictures": _webp(64, 64),
    "jpeg markers alone": b"\xff\xd8\xff\xd9",
    "jpeg of 0 x 0": JPEG.replace(struct.pack(">HH", 60, 80), struct.pack(">HH", 0, 0), 1),
    "avif box alone": b"\0\0\0\x20ftypavif" + b"\0" * 40,
}
NO_PICTURE = {
    "svg": SVG,
    "svg with entities": ENTITIES,
    "eps": EPS,
    "pdf": PDF,
    "zip": ZIP,
    "pickle": PICKLE,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 40,
    "html": b"<html><script>alert(1)</script></html>",
    "text": b"hello " * 9,
    "zeros": b"\0" * 1000,
    "one byte": b"\xff",
    "ppm": b"P6 9 9 255\n" + b"\0" * 243,
    "ico": b"\0\0\x01\0\x01\0\x10\x10\0\0\x01\0\x20\0\x68\x04\0\0\x16\0\0\0" + b"\0" * 40,
    "psd": b"8BPS\0\x01" + b"\0" * 40,
    "wav": b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 40,
    "mp4": b"\0\0\0\x18ftypmp42" + b"\0" * 40,
    "json": b'{"a": 1}',
}
WRONG = {
    "null": None,
    "true": True,
    "number": 7,
    "float": 1.5,
    "an empty object": {},
    "an object of another kind": {"audio": "aGk="},
    "an object with two kinds": {"image": "aGk=", "text": "hi"},
    "an object as an image": {"image": {"image": "aGk="}},
    "an object with null": {"image": None},
    "a number as a text": {"text": 7},
    "a list as a text": {"text": ["hi"]},
    "an empty list": [],
    "nested lists": [["a red circle"]],
    "an empty text": "",
    "a blank text": " \n\t\u3000",
    "an empty text in a list": ["a", ""],
    "null in a list": ["a", None],
    "a lone surrogate": "red \ud800 circle",
    "lone surrogates in the wrong order": "\udc00\ud800",
    "a path": "/etc/passwd",
    "a path to a picture": "../../photos/cat.jpg",
    "a name of a picture": "cat.png",
    "a home": "~/.ssh/id_rsa",
    "a path behind a line break": "\n/etc/passwd\n",
    "a URL behind blanks": "  http://127.0.0.1/",
    "a path of Windows": "C:\\Users\\me\\cat.png",
    "a share of Windows": "\\\\server\\share\\cat.png",
    "a path as an image": {"image": "/etc/passwd"},
    "a path that is base64 too": {"image": "/var/lib/nonexistent"},
    "a file URL": "file:///etc/passwd",
    "a file URL as an image": {"image": "file:///etc/passwd"},
    "a web URL": "https://example.org/cat.png",
    "a URL of the cloud's own": {"image": "http://169.254.169.254/latest/meta-data/"},
    "a local URL": {"image": "http://127.0.0.1:22/"},
    "ftp": {"image": "ftp://example.org/cat.png"},
    "a data URL without data": "data:image/png",
    "a data URL that is not base64": "data:image/svg+xml,<svg/>",
    "a data URL with wrong base64": "data:image/png;base64,%%%%",
    "base64 with a letter too few": {"image": base64.b64encode(PNG).decode()[:-1]},
    "base64 with a sign that is none": {"image": "iVBOR*" + base64.b64encode(PNG).decode()[6:]},
    "base64 of the web": {"image": "-_-_"},
    "base64 with letters after its end": {"image": "aGk=aGk="},
    "an empty image": {"image": ""},
    "blanks as an image": {"image": "   "},
    "Chinese as an image": {"image": "红色的圆形"},
    "the beginning of a picture": "iVBORw0KGgo",
}
LABELS = {
    "none": None,
    "empty": [],
    "an empty text": "",
    "commas": ",,,",
    "a number": 5,
    "an object": {"a": 1},
    "numbers": [1, 2],
    "null in the list": ["a", None],
    "nested": [["a"], ["b"]],
    "blank": ["a", " "],
    "a surrogate": ["a", "\ud800"],
}
PARAMETERS = {
    "not an object": [1],
    "a text": "normalize",
    "unknown": {"top_k": 3},
    "a long unknown": {"x" * 100_000: 3},
    "normalize as a text": {"normalize": "yes"},
    "normalize as a number": {"normalize": 1},
    "dimensions 0": {"dimensions": 0},
    "dimensions -1": {"dimensions": -1},
    "dimensions too many": {"dimensions": 25},
    "dimensions huge": {"dimensions": 10**40},
    "dimensions NaN": {"dimensions": float("nan")},
    "dimensions infinite": {"dimensions": float("inf")},
    "dimensions 1.0": {"dimensions": 1.0},
    "dimensions true": {"dimensions": True},
    "dimensions as a text": {"dimensions": "8"},
    "a template alone": {"hypothesis_template": "a {}"},
}
TEMPLATES = {
    "without a place": "a photo",
    "two places": "{} {}",
    "a wide place": "{:>999999999}",
    "an attribute": "{0.__class__.__mro__}",
    "a name": "{label}",
    "a number": 7,
    "a list": ["{}"],
    "blank": " ",
}
BODIES = {
    "nothing": b"",
    "no JSON": b"hello",
    "half of it": b'{"inputs": "a',
    "a list": b'["inputs"]',
    "a text": b'"inputs"',
    "null": b"null",
    "a number": b"7",
    "no inputs": b'{"text": "hi"}',
    "100,000 brackets": b"[" * 100_000,
    "100,000 closed brackets": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects": b'{"inputs":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 1,000,000 digits": b'{"inputs": ' + b"9" * 1_000_000 + b"}",
    "bytes that are no UTF-8": b'{"inputs": "\xff\xfe"}',
    "UTF-16 with a mark": b"\xff\xfe{\0",
    "two documents": b'{"inputs": "a"}{"inputs": "b"}',
    "a trailing comma": b'{"inputs": "a",}',
    "NaN": b'{"inputs": NaN}',
    "a pickle": PICKLE,
}
TEXTS = {
    "control characters": "\x00\x01\x1b[31mred\x07 circle\x7f",
    "direction marks": "\u202ered\u202c \u200b\ufeffcircle",
    "a thousand accents": "e" + "\u0301" * 1000,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f534",
    "special tokens": "[CLS] [MASK] <|endoftext|> [gMASK]",
    "SQL": "'; DROP TABLE images; --",
    "a template": "{0.__class__} %s ${jndi:ldap://x}",
    "the longest text": "红" * 4096,
    "unknown characters": "\U0002f800\U000e0001\ufffd",
}
TURNED = Image.Exif()
TURNED[0x0112] = 6
STRANGE_ORIENTATION = Image.Exif()
STRANGE_ORIENTATION[0x0112] = 99
PICTURES = {
    "one pixel": _file(Image.new("RGB", (1, 1)), "PNG"),
    "one row of 60,000": _file(Image.new("L", (60_000, 1)), "PNG"),
    "16 bits": _file(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
    "CMYK": _file(_NOISE.convert("CMYK"), "JPEG"),
    "an animation": _file(_NOISE, "GIF", save_all=True, append_images=[_NOISE.transpose(0)] * 3),
    "palette with transparency": _file(_NOISE.convert("P"), "PNG", transparency=0),
    "two levels": _file(_NOISE.convert("1"), "PNG"),
    "turned by its camera": _file(_NOISE, "JPEG", exif=TURNED),
    "an orientation that is none": _file(_NOISE, "JPEG", exif=STRANGE_ORIENTATION),
    "exif that is none": _file(_NOISE, "JPEG", exif=b"Exif\0\0" + b"\xff" * 60),
    "a zip behind it": PNG + ZIP,
    "a TIFF of floats": _file(Image.fromarray(np.full((9, 9), 7.0, np.float32)), "TIFF"),
}
WILD = {
    "a TIFF of NaN": _file(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"),
    "a TIFF of large floats": _file(Image.fromarray(np.full((9, 9), 1e30, np.float32)), "TIFF"),
}


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


def _image(content: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(content).decode()}


def _requests() -> list[Hostile]:
    found = [Hostile(f"huge {name}", "image/png", body, (413, 415, 422)) for name, body in HUGE.items()]
    found += [
        Hostile(f"huge {name} in base64", JSON, _json({"inputs": _image(b)}), (413, 415, 422))
        for name, b in HUGE.items()
    ]
    found += [Hostile(f"bomb: {name}", "image/png", body, (200, 413, 422)) for name, body in BOMBS.items()]
    found += [Hostile(f"broken: {name}", "image/jpeg", body, (413, 415, 422)) for name, body in BROKEN.items()]
    found += [Hostile(f"no picture: {name}", "image/png", body, (415,)) for name, body in NO_PICTURE.items()]
    found += [Hostile(f"wild: {name}", "image/tiff", body) for name, body in WILD.items()]
    found += [Hostile(f"picture: {name}", "image/png", body, (200,)) for name, body in PICTURES.items()]
    found += [Hostile(f"inputs: {name}", JSON, _json({"inputs": inputs}), (415, 422)) for name, inputs in WRONG.items()]
    found += [Hostile(f"body: {name}", JSON, body, (400, 422)) for name, body in BODIES.items()]
    found += [Hostile(f"text: {name}", JSON, _json({"inputs": text}), (200,)) for name, text in TEXTS.items()]
    for name, parameters in PARAMETERS.items():
        found.append(Hostile(f"parameters: {name}", JSON, _json({"inputs": "a", "parameters": parameters})))
    picture = _image(PNG)
    for name, labels in LABELS.items():
        document = {"inputs": picture, "parameters": {"candidate_labels": labels, "hypothesis_template": "{}"}}
        found.append(Hostile(f"labels: {name}", JSON, _json(document)))
    for name, template in TEMPLATES.items():
        document = {"inputs": picture, "parameters": {"candidate_labels": ["a"], "hypothesis_template": template}}
        found.append(Hostile(f"template: {name}", JSON, _json(document)))
    labels = {"parameters": {"candidate_labels": ["a", "b"]}}
    many = {"parameters": {"candidate_labels": ["x"] * 1_000_000}}
    found += [
        Hostile("1,000,000 labels", JSON, _json({"inputs": picture, **many}), (413,)),
        Hostile(
            "1,000,000 labels in one text",
            JSON,
            _json({"inputs": picture, "candidate_labels": "x," * 1_000_000}),
            (413,),
        ),
        Hostile("1,000,000 texts", JSON, _json({"inputs": ["x"] * 1_000_000}), (413,)),
        Hostile("1,001 texts", JSON, _json({"inputs": ["x"] * 1001}), (413,)),
        Hostile("33 images", JSON, _json({"inputs": [picture] * 33}), (413,)),
        Hostile("a text of 10 MB", JSON, _json({"inputs": "x" * 10_000_000}), (413,)),
        Hostile(
            "a label of 10 MB",
            JSON,
            _json({"inputs": picture, "parameters": {"candidate_labels": ["x" * 10_000_000]}}),
            (413,),
        ),
        Hostile("an image of 21 MB", "image/png", PNG + b"\0" * 21 * 2**20, (413,)),
        Hostile("base64 of 40 MB", JSON, _json({"inputs": {"image": "A" * 40_000_000}}), (413,)),
        Hostile("a body of 65 MB", JSON, b" " * (65 * 2**20), (413,)),
        Hostile("labels for a text", JSON, _json({"inputs": "a", **labels})),
        Hostile("labels for a path", JSON, _json({"inputs": "/etc/passwd", **labels})),
        Hostile("labels for texts", JSON, _json({"inputs": ["a", "b"], **labels})),
        Hostile("normalize with labels", JSON, _json({"inputs": picture, "normalize": False, **labels})),
        Hostile("a form", "application/x-www-form-urlencoded", b"inputs=a", (415,)),
        Hostile("a form with files", "multipart/form-data; boundary=x", b"--x\r\n\r\nhi\r\n--x--", (415,)),
        Hostile("octets", "application/octet-stream", PNG, (415,)),
        Hostile("a pickle by its type", "application/x-pickle", PICKLE, (415,)),
        Hostile("an empty image as the body", "image/png", b"", (422,)),
        Hostile("svg by its type", "image/svg+xml", SVG, (415,)),
    ]
    return found


HOSTILE = _requests()
