"""The model behind the page: texts and images to unit vectors, and labels scored for an image.

Shapes: N texts or images, E embedding.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoModel, AutoProcessor

BATCH = 32
MAX_PIXELS = 2**26  # of an image, read from its header before anything is decoded
# Formats whose decoders do nothing but decode: EPS, for one, would start another program.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_LABELS = 200
TEMPLATES = {"en": "a picture of {}", "zh": "一张{}的图片"}


class Score(NamedTuple):
    label: str
    probability: float
    """Among the labels given, by the temperature the model was trained with: it says which label fits best, not whether
    any of them fits."""
    cosine: float


class Encoder:
    """A model from a folder or from the Hub, with the code that comes with it.

    Args:
        name: a folder, or `owner/name` on the Hub.
    """

    def __init__(self, name: str):
        self.name = name
        # PIL's resize is what published numbers are measured with, whether or not torchvision is installed.
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, backend="pil")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModel.from_pretrained(name, trust_remote_code=True).eval().to(self.device)
        # Fast tokenizers change their padding in place: "Already borrowed" when two visitors' threads do it.
        self._tokenizer = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Differs when the files of the model differ: by the Hub's commit, or by name, size and time of each file."""
        folder = Path(self.name)
        files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".safetensors", ".py"))
        seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        commit = getattr(self.model.config, "_commit_hash", None)
        return hashlib.sha256(repr((self.name, commit, seen)).encode()).hexdigest()[:16]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """[N, E] float32, of length 1. Long texts lose their beginning: the model reads 52 tokens."""
        found = []
        for start in range(0, len(texts), BATCH):
            with self._tokenizer:
                batch = self.processor(text=list(texts[start : start + BATCH]), return_tensors="pt")
            found.append(self.model.get_text_features(**batch.to(self.device)).pooler_output)
        return _unit(found)

    def pixels(self, source: str | Path | bytes) -> torch.Tensor:
        """A file, or its bytes, as the model sees it: [3, H, W]. Large pictures are not kept.

        Raises:
            ValueError: for what is no picture, or a damaged one.
        """
        return self.processor(images=[open_image(source)], return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def images(self, pixels: Sequence[torch.Tensor]) -> np.ndarray:
        """N times [3, H, W] -> [N, E] float32, of length 1."""
        found = []
        for start in range(0, len(pixels), BATCH):
            batch = torch.stack(list(pixels[start : start + BATCH])).to(self.device, self.model.dtype)
            found.append(self.model.get_image_features(batch).pooler_output)
        return _unit(found)

    def classify(
        self, image: str | Path | bytes, labels: Sequence[str], templates: dict[str, str] = TEMPLATES
    ) -> list[Score]:
        """How well each label fits the image (a file or its bytes), best first; each label in its language's template.

        Raises:
            ValueError: without labels, for more than MAX_LABELS, for a template without one place "{}", or for an image
                that cannot be read.
        """
        if not labels:
            raise ValueError("Type at least one label.")
        if len(labels) > MAX_LABELS:
            raise ValueError(f"There are {len(labels)} labels; at most {MAX_LABELS} are scored.")
        for template in templates.values():
            if template.count("{}") != 1:
                raise ValueError(f'A template needs one place for the label, "{{}}": {template!r} has none or several.')
        texts = self.texts([templates[language(label)].replace("{}", label) for label in labels])
        try:
            pixels = self.pixels(image)
        except ValueError as error:
            raise ValueError(f"The image cannot be read: {error}.") from error
        cosines = self.images([pixels])[0] @ texts.T
        logits = float(self.model.logit_scale.detach().float().exp()) * cosines
        weights = np.exp(logits - logits.max())
        scores = [
            Score(*each) for each in zip(labels, (weights / weights.sum()).tolist(), cosines.tolist(), strict=True)
        ]
        return sorted(scores, key=lambda score: -score.probability)


def _unit(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1).cpu().numpy()


def language(text: str) -> str:
    """ "zh" for a text with Chinese characters, "en" for any other."""
    return "zh" if re.search(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f]", text) else "en"


def split_labels(text: str) -> list[str]:
    """The labels of a line in which commas of either language, Chinese enumeration commas or line breaks part them."""
    labels = [label.strip() for label in re.split("[,;\n\uff0c\uff1b\u3001]", text)]
    return list(dict.fromkeys(label for label in labels if label))


def open_image(source: str | Path | bytes) -> Image.Image:
    """An untrusted file, or its bytes, as an upright picture in memory. Of an animation the first picture.

    Raises:
        ValueError: for anything but a whole picture of at most MAX_PIXELS; the message says why.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright if upright.mode in ("I", "F") or upright.mode.startswith("I;16") else upright.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError("not a picture in a known format") from error
    # PIL's plug-ins raise anything on damaged data: OSError, SyntaxError, struct.error, zlib.error, IndexError, ...
    except Exception as error:
        raise ValueError(str(error)[:200] or type(error).__name__) from error
