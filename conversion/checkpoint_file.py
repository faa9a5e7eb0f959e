"""Opening a published checkpoint: a pickle from the internet, so nothing in it is executed and nothing of it is
believed.

`open_checkpoint` gives the tensors as views of the mapped file: they cost memory when they are read, and it is
given back when the last of them is dropped. Used by `python -m conversion.convert`.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where the tensors of a checkpoint may lie, in the order in which the official code looks.
CONTAINERS = {"state_dict": "Lightning", "module": "DeepSpeed", "model": '"model"'}
PREFIX = "_forward_module."  # DeepSpeed's and Lightning's wrapper
# The pickled part names the tensors; that of the 10B checkpoint is about 0.2 MB.
MAX_PICKLE_BYTES = 64 * 2**20


def open_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint in any of the four published layouts, by their official keys, and the layout's name.

    The tensors are views of a private memory map of the file.

    Raises:
        ValueError: when the file is missing, cut off, not written by `torch.save`, larger inside than outside, holds
            anything but tensors and plain values (which is not executed), or has no state dict.
    """
    path = Path(path)
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_why_not_unpickled(path, error)) from error
    # A damaged pickle can fail in any way; none of them is a fault of ours.
    except Exception as error:
        raise ValueError(f"{path} cannot be read: it is damaged ({type(error).__name__}: {error}).") from error
    return _find_state_dict(path, loaded)


def _check_archive(path: Path) -> None:
    """Refuses everything that is not a plain torch archive, before anything is unpacked.

    Raises:
        ValueError: saying what the file is instead.
    """
    if not path.is_file():
        seen = "it is a folder, pass the .ckpt file in it" if path.is_dir() else "there is no such file"
        raise ValueError(f"No checkpoint at {path}: {seen}.")
    with path.open("rb") as file:
        head = file.read(64)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is not a checkpoint: {_what_it_is(head)}.")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = {entry.filename.partition("/")[2]: entry for entry in entries}
    if "constants.pkl" in names:
        raise ValueError(
            f"{path} is a TorchScript program, not a checkpoint of M2-Encoder (OpenAI's CLIP is published in this "
            "form)."
        )
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive, but not one of torch.save: it has no data.pkl.")
    inside, outside = sum(entry.file_size for entry in entries), path.stat().st_size
    if inside > outside or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"{path} unpacks to {inside:,} bytes from {outside:,}. torch.save never compresses: this is a zip bomb, or "
            "was "
            "packed again by another program. Save it with torch.save."
        )
    if names["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise ValueError(
            f"The pickle in {path} has {names['data.pkl'].file_size:,} bytes, far more than the names of the tensors "
            f"can need (limit {MAX_PICKLE_BYTES:,}). It was not opened."
        )


def _what_it_is(head: bytes) -> str:
    if head.startswith(b"PK\x03\x04"):
        return "it is the beginning of one. Its end is missing: download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer. Run `git lfs pull`, or download the file itself"
    if head[8:9] == b"{":
        return "it looks like a safetensors file, and the published checkpoints are .ckpt files"
    if head.startswith(b"\x80"):
        return (
            "it is a bare pickle, which was not opened. Files of torch before 1.6 have this form: load such a file "
            "with "
            "weights_only=True and save it again"
        )
    return f"it begins with {head[:16]!r}"


def _why_not_unpickled(path: Path, error: pickle.UnpicklingError) -> str:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # reads the names without importing them
    except Exception:
        found = []
    if not found:
        return f"{path} cannot be read: its pickle is damaged or is not one of tensors ({error})."
    return (
        f"{path} holds more than tensors and plain values: {', '.join(sorted(found))}. Loading these would run "
        "code, so "
        "it was not loaded and nothing of it has run. Do not open it with weights_only=False unless you trust its "
        "origin."
    )


def _find_state_dict(path: Path, loaded: Any) -> tuple[dict[str, Tensor], str]:
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    container = next((name for name in CONTAINERS if isinstance(loaded.get(name), Mapping)), None)
    state_dict = loaded if container is None else loaded[container]
    other = [f"{key} ({type(value).__name__})" for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if other or not state_dict:
        seen = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        raise ValueError(
            f"{path} has no state dict under {', '.join(CONTAINERS)}, and is none itself: it holds {seen or 'nothing'}."
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        key = str(key).removeprefix(PREFIX)
        if key in tensors:
            raise ValueError(f"{path} has {key} twice, with and without the prefix {PREFIX}.")
        # A stride of 0 lets a few bytes claim to be any number of values.
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {key} claims a shape {list(tensor.shape)} that its bytes in the file do not fill."
            )
        tensors[key] = tensor
    return tensors, "bare" if container is None else CONTAINERS[container]
