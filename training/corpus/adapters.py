"""What the public sources publish: which column of theirs is which of ours, in which language, under which licence.

Every one of them publishes addresses of images and texts, not images; `training/corpus/downloads.py` has the way from
one to the other. Columns marked "read" were read in the data set's card or schema on the Hub, or in code that reads
the files; the others are what the paper of the data set calls them. An entry of the corpus file can name others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

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

    def columns(self) -> dict[str, str]:
        """What to read: our name -> the source's column."""
        names = ("image", "text", "url", "image_id", "language_column", "licence_column")
        return {name.removesuffix("_column"): getattr(self, name) for name in names if getattr(self, name) is not None}

    def changed_by(self, entry: Any) -> Published:
        """With what an entry of the corpus file says otherwise."""
        said = {item.name: getattr(entry, item.name, None) for item in fields(self)}
        return replace(self, **{name: value for name, value in said.items() if value is not None})


PUBLISHED: dict[str, Published] = {
    # Read. Withdrawn in December 2023; published again, without what was reported as illegal, as
    # laion/relaion2B-en-research-safe.
    "laion-2b-en": Published(
        text="TEXT",
        url="URL",
        language="en",
        licence="CC-BY-4.0",
        licence_column="LICENSE",
        home="laion/relaion2B-en-research-safe",
    ),
    # Read.
    "coyo-700m": Published(
        text="text", url="url", image_id="id", language="en", licence="CC-BY-4.0", home="kakaobrain/coyo-700m"
    ),
    # Read. Filtered for English.
    "datacomp-1b": Published(
        text="text", url="url", image_id="uid", language="en", licence="CC-BY-4.0", home="mlfoundations/datacomp_1b"
    ),
    # Read: the 143 M Chinese rows of laion2B-multi.
    "laion-cn": Published(
        text="TEXT",
        url="URL",
        language="zh",
        licence="CC-BY-4.0",
        licence_column="LICENSE",
        home="IDEA-CCNL/laion2B-multi-chinese-subset",
    ),
    # Read: 256 CSV files.
    "wukong": Published(
        text="caption",
        url="url",
        language="zh",
        licence="CC-BY-NC-SA-4.0",
        home="https://wukong-dataset.github.io/wukong-dataset/",
    ),
    # `url` read, `caption` not. Most addresses are dead; the authors now give the images as tars, and all captions in
    # one JSON file by the name of the image: write these next to the images (NAME.txt) and read them with "tar".
    "taisu": Published(
        text="caption",
        url="url",
        language="zh",
        licence="CC-BY-NC-SA-4.0",
        home="https://github.com/ksOAn6g5/TaiSu",
    ),
    # Not read: given on request only. `title` is one of its up to five texts of an image.
    "zero": Published(text="title", url="url", language="zh", licence="research only", home="https://zero.so.com"),
    "parquet": Published(text="text", image="image"),
    "tar": Published(text="txt", image="jpg"),
    "urls": Published(text="text", url="url"),
}

DOWNLOADED = Published(
    text="caption",
    url="url",
    image="jpg",
    image_id="image_id",
    language_column="language",
    licence_column="licence",
)
"""What img2dataset 1.47 writes for our lists: its own columns, and those it was told to keep."""
