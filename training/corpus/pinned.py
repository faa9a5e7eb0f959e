"""The models of the Hub that the stages use when none is named, each at one commit, and what tells models apart.

The commits were not downloaded here (no network); each is one that several public projects pin, CLIP's also the one of
MTEB 2.26. MTEB's commit of BLIP-2 is from March 2024, before transformers had the image placeholders
(`image_token_index`) that its version 5 needs; this one is in use with them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

CLIP = "openai/clip-vit-base-patch32"
CHINESE_CLIP = "OFA-Sys/chinese-clip-vit-base-patch16"
BLIP_2 = "Salesforce/blip2-opt-2.7b"
OPUS_EN_ZH = "Helsinki-NLP/opus-mt-en-zh"

PINNED = {
    CLIP: "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    CHINESE_CLIP: "36e679e65c2a2fead755ae21162091293ad37834",
    BLIP_2: "59a1ef6c1e5117b3f65523d1c6066825bcf315e3",
    OPUS_EN_ZH: "408d9bc410a388e1d9aef112a2daba955b945255",
}


class _Model(Protocol):
    @property
    def model(self) -> str: ...

    @property
    def revision(self) -> str | None: ...


def revision_of(settings: _Model) -> str | None:
    """The commit to load: what the settings say, else what is pinned for this model; None for a local folder."""
    if Path(settings.model).expanduser().is_dir():
        return None
    return settings.revision or PINNED.get(settings.model)


def model_identity(settings: _Model) -> dict[str, Any]:
    """What tells a model from others, for the fingerprint of a stage: the commit, or the content of a local folder."""
    return {"model": settings.model, "revision": revision_of(settings), "content": _content(settings.model)}


def _content(model: str) -> str | None:
    """A hash of the names and sizes of a folder's files, and of the start and the end of each, so that 40 GB of
    weights cost no minute."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(item for item in folder.iterdir() if item.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]
