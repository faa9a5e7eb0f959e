"""Embeddings on disk, found again by what they are embeddings of.

    cache = Cache("~/.cache/m2encoder-eval")
    encoder = Encoder(load("OFA-Sys/chinese-clip-vit-base-patch16"), cache=cache)

    FOLDER/NAME-FINGERPRINT/model.json            what the model says of itself (`Adapter.describe`)
    FOLDER/NAME-FINGERPRINT/image-*.safetensors   shards: `keys` uint8 [n, 16] and `embeds` fp32 [n, E]
    FOLDER/NAME-FINGERPRINT/text-*.safetensors
    FOLDER/models/KEY.json                        the same of a model that is known by its files
    FOLDER/scores/STAMP.json, .npz                finished scores (`eval.stamps.KeptScores`)

The fingerprint covers weights, dtype, preprocessing and library versions, and an item's key is a hash of the bytes of
its image file or of its text. So nothing has to be declared: a changed revision, file or setting is another key, and
tasks that share images or captions share their embeddings. A shard is written beside its place, then renamed: a run
that is killed leaves whole shards and goes on after them. Processes may write at the same time. To free the space,
delete the folder.

Letters: n items, E embedding size.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import read_json, write_json

Kind = Literal["image", "text"]

# 128 bits: two of a billion items collide with probability 1e-21.
KEY_BYTES = 16


def item_key(content: bytes | str) -> bytes:
    """The key of an image file's bytes, or of a text: 16 bytes."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


class Cache:
    """A folder of embeddings of any number of models. See the module for its layout."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()

    def store(self, description: dict[str, Any]) -> Store:
        """The embeddings of one model.

        Args:
            description: as `Adapter.describe` gives it; `fingerprint` decides, `name` is for people.

        Raises:
            ValueError: if the folder cannot be made or written.
        """
        name = re.sub(r"[^\w.-]+", "--", str(description["name"])).strip("-.")[-60:] or "model"
        folder = self.folder / f"{name}-{description['fingerprint'][:16]}"
        try:
            write_json(folder / "model.json", description)
        except ValueError as error:
            raise ValueError(f"The cache folder {self.folder} cannot be written: {error}") from error
        return Store(folder)

    def description(self, key: str) -> dict[str, Any] | None:
        """What a model of this key said of itself, if it was loaded once; None if not, or if the file is damaged."""
        path = self.folder / "models" / f"{key}.json"
        try:
            found = read_json(path) if path.is_file() else None
        except ValueError:
            return None
        return found if isinstance(found, dict) and {"name", "fingerprint"} <= found.keys() else None

    def describe(self, key: str, description: dict[str, Any]) -> None:
        """Keep what a model says of itself for `description`.

        Raises:
            ValueError: if it cannot be written.
        """
        write_json(self.folder / "models" / f"{key}.json", description)


class Store:
    """The embeddings of one model: items are added in shards and looked up by key."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._places: dict[Kind, dict[bytes, tuple[Path, int]]] = {"image": {}, "text": {}}
        self._read: set[Path] = set()

    def find(self, kind: Kind, keys: Sequence[bytes]) -> tuple[list[int], torch.Tensor | None]:
        """The positions in `keys` of the items that are there, ascending, and their embeddings [found, E] fp32.

        The tensor is None where nothing is found. A shard that cannot be read (a disk fault: half-written ones never
        get their name) is warned of and counts as absent.
        """
        self._refresh(kind)
        places = self._places[kind]
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            if key in places:
                path, row = places[key]
                wanted.setdefault(path, []).append((position, row))
        found: dict[int, torch.Tensor] = {}
        for path, pairs in wanted.items():
            embeds = _read_shard(path, "embeds")
            if embeds is not None:
                found |= {position: embeds[row] for position, row in pairs}
        positions = sorted(found)
        return positions, torch.stack([found[position] for position in positions]) if positions else None

    def add(self, kind: Kind, keys: Sequence[bytes], embeds: torch.Tensor) -> Path:
        """Write one shard: n keys and their embeddings [n, E] fp32 on the CPU. Returns the file.

        Raises:
            ValueError: if it cannot be written, for example because the disk is full.
        """
        # Named by its items, so that writing the same shard twice leaves one file.
        name = f"{kind}-{hashlib.blake2b(b''.join(keys), digest_size=10).hexdigest()}.safetensors"
        path, beside = self.folder / name, self.folder / f".{os.getpid()}.{name}"
        table = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES).copy())
        try:
            save_file({"keys": table, "embeds": embeds.contiguous()}, beside)
            os.replace(beside, path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise ValueError(f"A shard of embeddings cannot be written to {self.folder}: {error}.") from error
        self._read.discard(path)
        return path

    def _refresh(self, kind: Kind) -> None:
        """Learn of shards that were written since, by this process or by others."""
        for path in sorted(self.folder.glob(f"{kind}-*.safetensors")):
            if path in self._read:
                continue
            keys = _read_shard(path, "keys")
            self._read.add(path)
            if keys is not None:
                self._places[kind] |= {row.tobytes(): (path, i) for i, row in enumerate(keys.numpy())}


def _read_shard(path: Path, name: Literal["keys", "embeds"]) -> torch.Tensor | None:
    """One tensor of a shard; None, with a warning, for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} is damaged ({error}): its items are embedded again. Delete it.", stacklevel=4)
        return None
