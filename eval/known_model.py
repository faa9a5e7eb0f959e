"""A model that is loaded when something must be embedded, and not before: what it says of itself is known.

adapter = known_model(cache, key, lambda: load("runs/quickstart/nano/model"))
adapter.describe()   # from the cache, if a model of this key was loaded once
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .cache import Cache
    from .models import Adapter


def known_model(cache: Cache, key: str | None, load: Callable[[], Adapter]) -> Adapter:
    """The adapter that `load` gives, or one that calls `load` when it is first needed.

    Args:
        key: what the model's embeddings depend on (`eval.stamps.model_stamp`); None if that is not known.

    Raises:
        ValueError: as `load`, if it is called here.
    """
    description = None if key is None else cache.description(key)
    if description is not None:
        return KnownModel(description, load)
    adapter = load()
    if key is not None:
        cache.describe(key, adapter.describe())
    return adapter


class KnownModel:
    """An `eval.models.Adapter` in front of one that is not loaded yet."""

    def __init__(self, description: dict[str, Any], load: Callable[[], Adapter]):
        self._description, self._load = description, load

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """As `Adapter.encode_images`; the first call loads the model and raises ValueError if that fails."""
        return self._adapter.encode_images(images)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """As `Adapter.encode_texts`; the first call loads the model and raises ValueError if that fails."""
        return self._adapter.encode_texts(texts)

    def describe(self) -> dict[str, Any]:
        """What the model said of itself when it was last loaded."""
        return dict(self._description)

    @cached_property
    def _adapter(self) -> Adapter:
        adapter = self._load()
        if adapter.describe()["fingerprint"] != self._description["fingerprint"]:
            raise ValueError(
                f"{self._description['name']} is not the model that the cache knows under this name, size and time: "
                "its weights were replaced without a trace. Use another --cache folder."
            )
        return adapter
