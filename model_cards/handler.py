"""What a Hugging Face Inference Endpoint runs from the model's folder: texts and images to embeddings, images and
labels to scores.

The folder is enough: the model's code is in it (`trust_remote_code`), everything else is transformers, torch, Pillow.
A request is a dictionary; `POST` it as JSON, or post an image as it is with its content type and the parameters in the
query string.

    {"inputs": "a red circle"}                          -> [E floats]
    {"inputs": ["a red circle", "红色的圆形"]}          -> [[E floats], [E floats]]
    {"inputs": IMAGE}                                   -> [E floats]
    {"inputs": [IMAGE, "a red circle", IMAGE]}          -> [[E floats], ...], in the order of the inputs
    {"inputs": IMAGE, "parameters": {"candidate_labels": ["圆形", "方块"], "hypothesis_template": "一张{}的照片"}}
                                                        -> [{"label": "圆形", "score": 0.97}, ...], best first
    {"inputs": [IMAGE, IMAGE], "parameters": {"candidate_labels": ...}} -> one such list for each image

IMAGE is base64, a data URL, bytes, or a `PIL.Image.Image`. A bare string is an image when it begins as the base64 of a
picture or as a data URL, and a text otherwise; `{"image": ...}` and `{"text": ...}` say it outright. Strings are never
opened as files, and never fetched unless `M2_ENCODER_ALLOW_URLS=1` is set (see `fetch`).

Parameters: `normalize` (true) and `dimensions` (all) for embeddings; `candidate_labels` and `hypothesis_template`
("This is a photo of {}.", as in the transformers pipeline) for scores. They may also stand beside `inputs`, where
`InferenceClient.feature_extraction` puts them.

What cannot be answered is a `RequestError`. The Endpoints toolkit answers every exception with status 400 and
`{"error": message}`; a server of one's own can answer with the error's `status`: 413 too large, 415 no picture of a
known format, 422 anything else.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoModel, AutoProcessor

DEFAULT_TEMPLATE = "This is a photo of {}."
PARAMETERS = ("normalize", "dimensions", "candidate_labels", "hypothesis_template")
# Formats whose decoders do nothing but decode: EPS, for one, would start another program.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# How the base64 of PNG, JPEG, GIF, WebP, TIFF, BMP and AVIF (and HEIC, which is then refused as such) begins.
PICTURE = re.compile(
    r"iVBORw0KGg|/9j/|R0lGODdh|R0lGODlh|UklGR|SUkqA|TU0AK|Qk[0-3][A-Za-z0-9+/]{5}AAAA|AAAA[A-Za-z0-9+/]{2}Z0eXB"
)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
# One word that names a file: somebody expects it to be opened.
PATH = re.compile(
    r"(?:/|~|\.{1,2}[/\\]|\\\\|[A-Za-z]:[/\\])\S*|\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|svg|heic)", re.IGNORECASE
)
CHUNK = 32  # rows in one pass through the model
KEPT_CHARACTERS = 100_000  # of a set of labels whose embeddings are kept

Item = str | bytes | Image.Image
"""A text, or an image."""


class RequestError(ValueError):
    """Why a request is refused, in words for the one who sent it; `status` is the HTTP status that fits."""

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. `M2_ENCODER_MAX_PIXELS=1000000` in the environment sets `max_pixels`, and so on."""

    max_image_bytes: int = 20 * 2**20
    max_pixels: int = 2**26
    """Of one image, read from its header before anything is decoded."""
    max_images: int = 32
    max_texts: int = 1000
    """Texts, or labels."""
    max_characters: int = 4096
    """Of one text, label or template. The model reads the last 52 tokens."""
    concurrency: int = 2
    """Requests that decode and compute at the same time; the others wait, so that memory stays bounded."""
    allow_urls: int = 0
    """1: images may be given as http(s) URLs of public addresses, which are fetched."""
    url_seconds: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < (0 if field.name == "allow_urls" else 1):
                raise ValueError(f"{field.name} must be a whole number of 1 or more, not {value!r}.")

    @classmethod
    def from_environment(cls) -> Limits:
        """Raises ValueError for a setting that is not a number."""
        seen = {field.name: os.environ.get(f"M2_ENCODER_{field.name.upper()}") for field in fields(cls)}
        for name, value in seen.items():
            if value is not None and not value.isdecimal():
                raise ValueError(f"M2_ENCODER_{name.upper()} must be a whole number, not {value!r}.")
        return cls(**{name: int(value) for name, value in seen.items() if value is not None})


class EndpointHandler:
    """Answers requests from any number of threads, with the same numbers whatever else is running.

    Args:
        path: the model's folder; "" is the folder of this file.
        limits: what a request may ask for; by default as the environment says.
    """

    def __init__(self, path: str = "", limits: Limits | None = None):
        path = str(path) or os.path.dirname(os.path.abspath(__file__))
        self.limits = limits or Limits.from_environment()
        # PIL's resize is what published numbers are measured with, whether or not torchvision is installed.
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True, backend="pil")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).eval().to(self.device)
        # Requests come in any number of threads, but are computed in these: memory that a thread once used for a large
        # picture stays with that thread (glibc keeps it for its next allocation), so there must not be many.
        self._workers = ThreadPoolExecutor(self.limits.concurrency, "handler")
        # Fast tokenizers change their padding in place: "Already borrowed" when two threads do it.
        self._tokenizer = threading.Lock()
        # The same labels come with every request of an application. A whole set is kept, so that its embeddings do not
        # depend on which requests came before.
        self._prompts = lru_cache(maxsize=16)(self._embed_texts)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answers one request, as described at the top of this file.

        Raises:
            RequestError: a ValueError that says what was wrong with the request and what to do.
        """
        inputs, parameters = _split(data)
        many = isinstance(inputs, (list, tuple))
        items = self._read_all(inputs if many else [inputs])
        answer = self._classify if "candidate_labels" in parameters else self._embed
        answers = self._workers.submit(answer, items, **parameters).result()
        return answers if many else answers[0]

    # ---- Answers ---------------------------------------------------------------------------------------------------

    def _embed(
        self, items: Sequence[Item], normalize: Any = True, dimensions: Any = None, **other: Any
    ) -> list[list[float]]:
        if other:
            raise RequestError("hypothesis_template belongs to candidate_labels, and there are none.")
        if not isinstance(normalize, bool):
            raise RequestError(f"normalize must be true or false, not {_seen(normalize)}.")
        width = self.model.config.projection_dim
        whole = isinstance(dimensions, int) and not isinstance(dimensions, bool)
        if dimensions is not None and not (whole and 1 <= dimensions <= width):
            raise RequestError(f"dimensions must be a whole number from 1 to {width}, not {_seen(dimensions)}.")
        texts = [i for i, item in enumerate(items) if isinstance(item, str)]
        images = [i for i, item in enumerate(items) if not isinstance(item, str)]
        found = torch.empty(len(items), width)
        if texts:
            found[texts] = self._embed_texts(tuple(items[i] for i in texts))
        if images:
            found[images] = self._embed_images([items[i] for i in images])
        found = found[:, :dimensions]
        return (F.normalize(found, dim=-1) if normalize else found).tolist()

    def _classify(
        self,
        items: Sequence[Item],
        candidate_labels: Any = None,
        hypothesis_template: Any = DEFAULT_TEMPLATE,
        **other: Any,
    ) -> list[list[dict[str, Any]]]:
        if other:
            raise RequestError(f"{', '.join(other)}: for embeddings only, not for candidate_labels.")
        if any(isinstance(item, str) for item in items):
            raise RequestError(
                "candidate_labels are scored for an image, and inputs is a text: send the image as base64, as a data "
                "URL, or as the body of the request with its content type."
            )
        labels = self._labels(candidate_labels)
        template = self._text(hypothesis_template, "hypothesis_template")
        if template.count("{}") != 1:
            raise RequestError('hypothesis_template must have one place for the label, "{}", as in "一张{}的照片".')
        # Not str.format: "{:>999999999}" is a template too.
        prompts = tuple(template.replace("{}", label) for label in labels)
        embed = self._prompts if sum(map(len, prompts)) <= KEPT_CHARACTERS else self._embed_texts
        texts = F.normalize(embed(prompts), dim=-1)
        images = F.normalize(self._embed_images(items), dim=-1)
        scale = self.model.logit_scale.detach().float().exp().cpu()
        probabilities, order = (scale * images @ texts.T).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        return [
            [{"label": labels[i], "score": score} for i, score in zip(row, scores, strict=True)]
            for row, scores in zip(order.tolist(), probabilities.tolist(), strict=True)
        ]

    @torch.no_grad()
    def _embed_texts(self, texts: tuple[str, ...]) -> torch.Tensor:
        """[B, E] float32 on the CPU, not normalised."""
        found = []
        for start in range(0, len(texts), CHUNK):
            with self._tokenizer:
                batch = self.processor(text=list(texts[start : start + CHUNK]), return_tensors="pt")
            found.append(self.model.get_text_features(**batch.to(self.device)).pooler_output.float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _embed_images(self, images: Sequence[Image.Image | bytes]) -> torch.Tensor:
        """[B, E] float32 on the CPU, not normalised. One image at a time is in memory at its full size."""
        pixels, found = [], []
        for number, image in enumerate(images, start=1):
            pixels.append(self._pixels(image))
            if len(pixels) == CHUNK or number == len(images):
                batch = torch.cat(pixels).to(self.device, self.model.dtype)
                found.append(self.model.get_image_features(batch).pooler_output.float().cpu())
                pixels = []
        return torch.cat(found)

    # ---- Reading requests ------------------------------------------------------------------------------------------

    def _read_all(self, inputs: Sequence[Any]) -> list[Item]:
        if not inputs:
            raise RequestError("inputs is empty: send a text, an image, or a list of them.")
        most = self.limits.max_texts
        if len(inputs) > most:
            raise RequestError(f"inputs has {len(inputs)} entries, at most {most} are answered in one request.", 413)
        items, images, most = [], 0, self.limits.max_images
        for each in inputs:
            items.append(self._read(each))
            images += not isinstance(items[-1], str)
            if images > most:
                raise RequestError(f"inputs has more than {most} images, which is the most of one request.", 413)
        return items

    def _read(self, item: Any) -> Item:
        """A text as it is, an image as its bytes: nothing is decoded yet."""
        if isinstance(item, dict):
            if len(item) != 1 or next(iter(item)) not in ("image", "text"):
                raise RequestError('An input that is an object must be {"image": ...} or {"text": ...}.')
            kind, item = next(iter(item.items()))
            return self._text(item, "text") if kind == "text" else self._image(item)
        if isinstance(item, str) and not _is_image(item.strip()):
            if PATH.fullmatch(item.strip()):
                raise RequestError(
                    f"{_seen(item)} looks like the path of a file, and no files are opened here: send the image "
                    'itself, or {"text": ...} to embed these words.'
                )
            return self._text(item, "inputs")
        return self._image(item)

    def _text(self, text: Any, name: str) -> str:
        if not isinstance(text, str):
            raise RequestError(f"{name} must be a text, not {_seen(text)}.")
        if len(text) > self.limits.max_characters:
            most = self.limits.max_characters
            raise RequestError(f"{name} has {len(text)} characters, at most {most} are read.", 413)
        if not text.strip():
            raise RequestError(f"{name} is blank: there is nothing to embed.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError(f"{name} is not valid Unicode: it has half of a surrogate pair.")
        return text

    def _labels(self, labels: Any) -> list[str]:
        if isinstance(labels, str):  # a query string has no lists
            labels = [label.strip() for label in re.split("[,\uff0c\u3001]", self._text(labels, "candidate_labels"))]
        if not isinstance(labels, (list, tuple)) or not labels:
            raise RequestError(f"candidate_labels must be a list of texts, not {_seen(labels)}.")
        if len(labels) > self.limits.max_texts:
            most = self.limits.max_texts
            raise RequestError(f"There are {len(labels)} candidate_labels, at most {most} are scored.", 413)
        return [self._text(label, "A candidate label") for label in labels]

    def _image(self, image: Any) -> Image.Image | bytes:
        """An image that is small enough to look at; text becomes bytes."""
        if isinstance(image, Image.Image):
            return image
        most = self.limits.max_image_bytes
        if isinstance(image, str):
            if URL.match(image.strip()):
                return self._from_url(image.strip())
            image = _from_base64(image.strip(), most)
        elif isinstance(image, (bytearray, memoryview)):
            image = bytes(image)
        if not isinstance(image, bytes):
            raise RequestError(f"An input must be a text or an image, not {_seen(image)}.")
        if len(image) > most:
            raise RequestError(f"The image has {len(image)} bytes, at most {most} are read.", 413)
        if not image:
            raise RequestError("The image is empty: it has no bytes.")
        return image

    def _from_url(self, url: str) -> bytes:
        if not self.limits.allow_urls:
            raise RequestError(f"{_seen(url)} is a URL, and nothing is fetched here: send the image itself, as base64.")
        return fetch(url, self.limits.max_image_bytes, self.limits.url_seconds)

    def _pixels(self, image: Image.Image | bytes) -> torch.Tensor:
        """`pixel_values` [1, 3, H, W] of the picture, turned upright as in the transformers pipeline: cameras leave
        that to the reader. Of an animation the first picture."""
        try:
            opened = Image.open(BytesIO(image), formats=_formats()) if isinstance(image, bytes) else image
            width, height = opened.size
            if width * height > self.limits.max_pixels:
                raise _too_many_pixels(f"{width} x {height}", self.limits.max_pixels)
            opened.load()
            if opened is image:
                opened = ImageOps.exif_transpose(opened)  # the caller's own stays as it is
            else:
                ImageOps.exif_transpose(opened, in_place=True)
            # The processor knows what 16 bits and floats mean. All others it would make RGB and resize as is done here,
            # with four copies of the picture at its full size on the way.
            if opened.mode not in ("I", "F") and not opened.mode.startswith("I;16"):
                settings = self.processor.image_processor
                size = (settings.size["width"], settings.size["height"])
                opened = opened if opened.mode == "RGB" else opened.convert("RGB")
                opened = opened.resize(size, settings.resample)
            return self.processor(images=[opened], return_tensors="pt")["pixel_values"]
        except (RequestError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise _too_many_pixels("too many", self.limits.max_pixels) from error
        except UnidentifiedImageError as error:
            raise RequestError(f"Not an image in a known format ({', '.join(FORMATS)}).", 415) from error
        # PIL's plug-ins raise anything on damaged data: OSError, SyntaxError, struct.error, zlib.error, IndexError, ...
        except Exception as error:
            raise RequestError(f"The image cannot be read: {str(error)[:200] or type(error).__name__}.") from error


def fetch(url: str, most: int, seconds: float) -> bytes:
    """An image of at most `most` bytes from a public web server, in at most `seconds`.

    A server inside a private network must not become the way into it: only http and https, only addresses that are
    public, and the connection goes to the very address that was checked. Redirects are not followed.

    Raises:
        RequestError: for any other URL, and for an answer that is late, too large or no success.
    """
    deadline = time.monotonic() + seconds
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        host = parts.hostname
        if not host:
            raise ValueError("a URL without a host")
        addresses = [place[0] for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not all(_is_public(address) for address in addresses):
            raise RequestError(f"{_seen(host)} is not a public address.")
        connection = http.client.HTTPConnection(host, port)  # for https too: the socket it is given speaks TLS
        with socket.create_connection((addresses[0], port), timeout=seconds) as link:
            if parts.scheme == "https":
                link = ssl.create_default_context().wrap_socket(link, server_hostname=host)
            with link:
                connection.sock = link
                query = f"?{parts.query}" if parts.query else ""
                connection.request("GET", (parts.path or "/") + query, headers={"Accept": "image/*"})
                response = connection.getresponse()
                if response.status != 200:
                    raise RequestError(f"The URL answered with status {response.status}; redirects are not followed.")
                return _read_body(response, link, most, deadline)
    except RequestError:
        raise
    except (KeyError, ValueError, OSError, http.client.HTTPException) as error:
        raise RequestError(f"The image at {_seen(url)} cannot be fetched.") from error


def _read_body(response: http.client.HTTPResponse, link: socket.socket, most: int, deadline: float) -> bytes:
    body = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RequestError("The image at the URL came too slowly.")
        link.settimeout(left)
        part = response.read1(65536)
        if not part:
            return bytes(body)
        body += part
        if len(body) > most:
            raise RequestError(f"The image at the URL has more than {most} bytes.", 413)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6 and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in ipaddress.ip_network("64:ff9b::/96")):
        return False  # an IPv4 address in disguise
    return ip.is_global and not ip.is_multicast


def _split(data: Any) -> tuple[Any, dict[str, Any]]:
    """`inputs` and the parameters, from both of their places; those that are null count as absent."""
    if not isinstance(data, dict) or "inputs" not in data:
        raise RequestError('A request is an object with "inputs".', 400)
    inside = data.get("parameters")
    if inside is not None and not isinstance(inside, dict):
        raise RequestError(f"parameters must be an object, not {_seen(inside)}.")
    given = {name: value for name, value in data.items() if name not in ("inputs", "parameters")} | (inside or {})
    unknown = [name for name in given if name not in PARAMETERS]
    if unknown:
        raise RequestError(f"Unknown parameter {_seen(unknown[0])}; there are {', '.join(PARAMETERS)}.")
    return data["inputs"], {name: value for name, value in given.items() if value is not None}


def _is_image(text: str) -> bool:
    return bool(text.startswith("data:") or PICTURE.match(text) or URL.fullmatch(text))


def _from_base64(text: str, most: int) -> bytes:
    """The bytes of base64 or of a data URL; line breaks are allowed."""
    # Four characters for three bytes, and some room for line breaks and a data URL's beginning.
    if len(text) > most * 3 // 2 + 1024:
        raise RequestError(f"The image has {len(text)} characters of base64, at most {most} bytes are read.", 413)
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError('A data URL must be base64: "data:image/png;base64,...".')
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"The image is not valid base64: {error}. Paths and URLs are not opened.") from error


def _too_many_pixels(seen: str, most: int) -> RequestError:
    return RequestError(f"The image has {seen} pixels, at most {most} are decoded: send it smaller.", 413)


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF came with Pillow 11.3


def _seen(value: Any) -> str:
    """What somebody sent, short enough for a message: never a whole payload, never a nested one."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 64 else "a huge number"
    if isinstance(value, str):
        return ascii(value) if len(value) <= 60 else ascii(value[:60]) + "..."
    return f"a {type(value).__name__}" + (" without entries" if isinstance(value, (list, dict)) and not value else "")
