"""Models of open_clip (OpenCLIP, CoCa, EVA): an optional dependency, `pip install open_clip_torch`.

    adapter = load("open_clip:coca_ViT-L-14/laion2b_s13b_b90k")

open_clip imports torchvision, so torchvision has to fit the installed torch. Letters: n images or texts, E embedding
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from .fingerprints import fingerprint, versions, weights_fingerprint

# Names of open_clip for "weights and computation in this type".
PRECISIONS = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}


class OpenClipAdapter:
    """A model of open_clip with the image transform and the tokenizer that belong to it."""

    def __init__(
        self, model: Any, transform: Any, tokenizer: Any, *, name: str, dtype: str, autocast: torch.dtype | None = None
    ):
        self.model, self.transform, self.tokenizer = model, transform, tokenizer
        self.name, self.dtype, self.autocast = name, dtype, autocast

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """n images -> [n, E]."""
        pixels = torch.stack([self.transform(image.convert("RGB")) for image in images])
        return self._run(self.model.encode_image, pixels.to(getattr(torch, self.dtype)))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """n texts -> [n, E]; the tokenizer cuts what is longer than the context."""
        return self._run(self.model.encode_text, self.tokenizer(list(texts)))

    def describe(self) -> dict[str, Any]:
        """As `TransformersAdapter.describe`."""
        parameter = next(self.model.parameters())
        about = {
            "name": self.name,
            "revision": None,
            "class": type(self.model).__name__,
            "model_type": "open_clip",
            "dtype": self.dtype,
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "max_text_length": getattr(self.tokenizer, "context_length", None),
            "weights": self._weights,
            # The transform prints its steps with all their settings; the tokenizer follows from the architecture.
            "preprocessing": fingerprint([repr(self.transform), type(self.tokenizer).__qualname__, self.name]),
            "library": versions("torch", "torchvision", "open_clip_torch", "pillow"),
        }
        key = {name: value for name, value in about.items() if name != "name"}
        return {**about, "device": parameter.device.type, "fingerprint": fingerprint(key)}

    @cached_property
    def _weights(self) -> str:
        return weights_fingerprint(self.model)

    def _run(self, encode: Any, inputs: torch.Tensor) -> torch.Tensor:
        device = next(self.model.parameters()).device
        mixed = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
        with torch.no_grad(), mixed:
            return encode(inputs.to(device))


def load_open_clip(
    name: str, *, dtype: str, device: torch.device, autocast: torch.dtype | None = None
) -> OpenClipAdapter:
    """The adapter of `ARCHITECTURE/WEIGHTS` as `open_clip.list_pretrained()` lists them, `hf-hub:ORG/NAME` or
    `local-dir:FOLDER`.

    Raises:
        ValueError: if open_clip is not installed or cannot be imported, or for a model that it does not have.
    """
    try:
        import open_clip
    # A torchvision that does not fit its torch raises RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"open_clip:{name} needs open_clip, which cannot be imported ({error}): pip install open_clip_torch, and "
            f"the torchvision that belongs to torch {torch.__version__}."
        ) from error
    hub = name.startswith(("hf-hub:", "local-dir:"))
    architecture, slash, weights = (name, "/", None) if hub else name.partition("/")
    if not slash or (not hub and not weights):
        raise ValueError(f"open_clip:{name} needs ARCHITECTURE/WEIGHTS, e.g. open_clip:ViT-g-14/laion2b_s34b_b88k.")
    try:
        model, transform = open_clip.create_model_from_pretrained(
            architecture, pretrained=weights, precision=PRECISIONS[dtype], device=device
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        # For an unknown architecture the message lists all of them.
        seen = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"open_clip:{name} cannot be loaded: {seen}") from error
    return OpenClipAdapter(model.eval(), transform, tokenizer, name=f"open_clip:{name}", dtype=dtype, autocast=autocast)
