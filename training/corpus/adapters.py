"""What the public sources publish: which column of theirs is which of ours, in which language, under which licence.

Every one of them publishes addresses of images and texts, not images; `training/corpus/downloads.py` has the way from
one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Adapter = Literal[
    "laion-2b-en", "coyo-700m", "datacomp-1b", "laion-cn", "wukong", "taisu", "zero", "parquet", "tar", "urls"
]


@dataclass(frozen=True)
class Published:
    """The columns of a source, and what is true of all its rows. None: it has no such column, or nothing is known."""

    text: str | None = None
    """A text, or a list of texts of one image."""
    url: str | None = None
    image: str | None = None
    """Encoded bytes, or the `Image` feature of `datasets`; in a tar, the extension of the image."""
    image_id: str | None = None
    """Names the image: rows of the source with the same one are captions of one image."""
    language: str | None = None
    language_column: str | None = None
    licence: str | None = None
    """Of the list of addresses and texts. The images are under the copyright of their owners."""
    licence_column: str | None = None
    """Of the single image, where the source knows it."""
    home: str | None = None
    """Where it is published: a data set on the Hub, or an address."""


_LAION = Published(text="TEXT", url="URL", licence="CC-BY-4.0", licence_column="LICENSE")

PUBLISHED: dict[str, Published] = {
    "parquet": Published(text="text", image="image"),
    "tar": Published(text="txt", image="jpg"),
    "urls": Published(text="text", url="url"),
}
