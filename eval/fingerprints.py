"""Hashes of what decides an embedding: weights, preprocessing, code, versions. Equal hashes, equal embeddings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
from pathlib import Path
from typing import Any

import torch


def fingerprint(value: Any) -> str:
    """The sha256 of anything that JSON can hold (other objects by their `str`), in hex."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def weights_fingerprint(model: torch.nn.Module) -> str:
    """The sha256 of all parameters and buffers, with their names, types and shapes, in hex. About 1 GB per second."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """The sha256 of an image processor's settings and of a tokenizer's vocabulary and rules, in hex."""
    image_processor = getattr(processor, "image_processor", None)
    tokenizer = getattr(processor, "tokenizer", None)
    settings = image_processor.to_dict() if hasattr(image_processor, "to_dict") else None
    return fingerprint([_class_name(processor), settings, None if tokenizer is None else _tokenizer_parts(tokenizer)])


def code_fingerprint(model: Any, processor: Any) -> str:
    """The sha256 of the source files that define the classes of a model and of the parts of its processor, in hex: of
    code that comes with a model, or is being worked on, the version number says nothing."""
    parts = (model, processor, *(getattr(processor, name, None) for name in ("image_processor", "tokenizer")))
    files = {inspect.getsourcefile(type(part)) for part in parts if part is not None}
    return fingerprint(sorted(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file))


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package."""
    return {name: importlib.metadata.version(name) for name in packages}


def _tokenizer_parts(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else tokenizer.get_vocab()
    # Where a tokenizer was loaded from decides nothing.
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if not str(name).endswith("_file")}
    settings = {name: str(value) for name, value in settings.items() if name not in ("name_or_path", "backend")}
    return [_class_name(tokenizer), rules, settings]


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
