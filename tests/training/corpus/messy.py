"""A messy corpus with the truth about every row.

    python -m tests.training.corpus.messy OUTPUT [--rows 12000] [--seed 0] [--drawn]

Seven sources in English and Chinese, made of `../shared/data` (or, with `--drawn`, of coloured noise), with the faults
of web crawls: OUTPUT/sources holds their files, OUTPUT/guard.parquet the evaluation images, OUTPUT/corpus.yaml a
configuration of the stages "sources", "clean" and "shards", OUTPUT/truth.json what must become of each row. The same
settings give the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.training.corpus import messy_files, messy_texts
from tests.training.corpus.messy_faults import BOMBS, FAULTS, UNUSUAL, copied, copied_drawing
from tests.training.corpus.messy_pictures import Picture, Pictures, drawn, opened, real
from tests.training.corpus.messy_texts import GOOD, Text

KEPT = "kept"
MIN_CHARACTERS = {"en": 5, "zh": 2}  # with the default of 5, three of four Chinese names of things would go


@dataclass(frozen=True)
class Item:
    """A record of a source: an image with one text or a list of texts."""

    image: bytes | None
    texts: tuple[Text, ...] | None
    """None: the record has no text at all."""
    what: str
    """What was done to it, for messages."""
    faults: frozenset[str] = GOOD
    """The reasons for which the image may be dropped; none of a good one."""
    shows: str = ""
    """The picture that it shows: items of one language that show the same one are twins."""
    licence: str | None = None


@dataclass(frozen=True)
class Source:
    name: str
    language: str
    priority: int
    items: list[Item]
    write: Callable[[Path, Source], dict]
    """Writes the files of the source into a folder; returns its entry in the configuration."""
    files: int = 1
    listed: bool = False
    """Whether its texts are lists: ids then end in the place in the list."""

    def split(self) -> list[list[Item]]:
        """The items of each file."""
        each = -(-len(self.items) // self.files)
        return [self.items[start : start + each] for start in range(0, len(self.items), each)]


@dataclass(frozen=True)
class Expected:
    """What must become of one row."""

    id: str
    source: str
    language: str
    image: str
    """source/file/record: rows of one image are captions of it."""
    what: str
    image_hash: str | None
    """SHA-256 of the encoded bytes."""
    text: str | None
    """None also where it is no UTF-8."""
    outcomes: tuple[str, ...]
    """KEPT or reasons; one of these is right. Of twins in the source of highest priority any one may be kept."""
    twins: str = ""
    """Names the rows of which one image must be kept; empty: it has no twin in its language."""


@dataclass(frozen=True)
class Messy:
    config: Path
    truth: list[Expected]


def build(folder: Path, pictures: Pictures, rows: int, seed: int = 0) -> Messy:
    """Writes the corpus to `folder`.

    Args:
        pictures: enough of them; see `needed`.
        rows: about how many rows the sources have, captions of one image counted each.
    """
    sources = _Sources(pictures, rows, seed).make()
    entries = []
    for source in sources:
        place = folder / "sources" / source.name
        place.mkdir(parents=True)
        entry = {"name": source.name, "language": source.language, "priority": source.priority}
        entries.append(entry | source.write(place, source))
    messy_files.write_guard(folder / "guard.parquet", [picture.data for picture in pictures.benchmark])
    config = {
        "output": str(folder / "corpus"),
        "seed": seed,
        "executor": {"kind": "local", "workers": 2},
        "sources": {"rows_per_part": max(100, rows // 16), "list": entries},
        "clean": {"min_characters": MIN_CHARACTERS, "guard": [str(folder / "guard.parquet")]},
        "shards": {"format": "parquet", "bytes": 4_000_000},
    }
    (folder / "corpus.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    truth = expected(sources)
    text = json.dumps([vars(row) for row in truth], ensure_ascii=False, indent=0)
    (folder / "truth.json").write_text(text, encoding="utf-8")
    return Messy(folder / "corpus.yaml", truth)


def needed(rows: int) -> dict[str, int]:
    """How many pictures of each kind a corpus of so many rows takes."""
    return {
        "photos": rows * 32 // 100 + 420,
        "drawings": rows * 25 // 100,
        "objects": rows * 15 // 100,
        "benchmark": max(20, rows // 150),
    }


def read_truth(folder: Path) -> list[Expected]:
    rows = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    return [Expected(**{**row, "outcomes": tuple(row["outcomes"])}) for row in rows]


# ---- The truth


def expected(sources: list[Source]) -> list[Expected]:
    """The truth about all rows: their own faults first, then, among rows without any, twins."""
    rows = [row for source in sources for row in _alone(source)]
    priority = {source.name: source.priority for source in sources}
    groups: dict[tuple[str, str], list[Expected]] = defaultdict(list)
    for row in rows:
        if row.outcomes == (KEPT,) and row.twins:
            groups[row.language, row.twins].append(row)
    settled = {}
    for (language, shown), group in groups.items():
        best = max(priority[row.source] for row in group)
        first = {row.image for row in group if priority[row.source] == best}
        images = {row.image for row in group}
        for row in group:
            name = f"{language} {shown}" if len(images) > 1 else ""
            lost = ("duplicate", "near_duplicate")
            outcomes = (KEPT,) if len(images) == 1 else lost
            if row.image in first and len(images) > 1:
                outcomes = (KEPT,) if len(first) == 1 else (KEPT, *lost)
            settled[row.id] = dataclasses.replace(row, outcomes=outcomes, twins=name)
    return [settled.get(row.id, dataclasses.replace(row, twins="")) for row in rows]


def _alone(source: Source) -> Iterator[Expected]:
    for file, items in enumerate(source.split()):
        for record, item in enumerate(items):
            image = f"{source.name}/{file}/{record}"
            texts = item.texts or (None,)
            for caption, text in enumerate(texts):
                faults = item.faults | (frozenset({"no_text"}) if text is None else text.faults)
                yield Expected(
                    id=f"{image}/{caption}" if source.listed and item.texts is not None else image,
                    source=source.name,
                    language=source.language,
                    image=image,
                    what=item.what if text is None else f"{item.what}; {text.what}",
                    image_hash=None if item.image is None else hashlib.sha256(item.image).hexdigest(),
                    text=text.value if text is not None and isinstance(text.value, str) else None,
                    outcomes=tuple(sorted(faults)) or (KEPT,),
                    twins=item.shows,
                )


# ---- The sources


class _Sources:
    """Deals pictures to sources, and faults among them."""

    def __init__(self, pictures: Pictures, rows: int, seed: int):
        self._pictures, self._rows, self._seed = pictures, rows, seed
        # Pictures for faults and unusual forms are shown nowhere else.
        self._spare = iter(pictures.photos[self._share(20) :])
        for kind, number in needed(rows).items():
            if len(getattr(pictures, kind)) < 0.97 * number:  # look-alikes were left out
                raise ValueError(f"{rows} rows need {number} {kind}; there are {len(getattr(pictures, kind))}.")

    def _share(self, percent: float) -> int:
        return round(self._rows * percent / 100)

    def make(self) -> list[Source]:
        pictures, share = self._pictures, self._share
        photos, drawings, objects = pictures.photos, pictures.drawings, pictures.objects
        english = [self._good(photo, "en", captions=2) for photo in photos[: share(12)]]
        # The second half of the photos of photos-en again, which is no duplicate: the language is another.
        chinese = [self._good(photo, "zh") for photo in photos[share(6) : share(6) + share(14)]]
        drawn_en = [self._good(drawing, "en") for drawing in drawings[: share(15)]]
        drawn_zh = [self._good(drawing, "zh") for drawing in drawings[share(10) : share(10) + share(14)]]
        things = [self._good(thing, "en") for thing in objects[: share(14)]]
        only_zh = photos[share(12) : share(20)]  # in photos-zh, not in photos-en
        only_en = photos[: share(6)]
        mirror = [
            *self._copies(photos[: share(3)], "en", copied),
            *self._copies(drawings[: share(2)], "en", copied_drawing),
            *self._copies(objects[: share(1)], "en", copied),
            *self._copies(only_zh[: share(1)], "en", copied),  # kept: its twin is Chinese
            *self._rescued(english, "en"),
            *self._unusual("en"),
        ]
        web = [
            *self._copies(photos[share(8) : share(10)], "zh", copied),
            *self._copies(drawings[share(12) : share(13)], "zh", copied_drawing),
            *self._copies(only_en[: share(1)], "zh", copied),
            *self._rescued(chinese, "zh"),
            *self._unusual("zh"),
        ]
        things += self._copies(objects[: share(0.5)], "en", copied)  # in the same source
        twice = self._good(next(self._spare), "en")
        said_again = dataclasses.replace(twice.texts[0], what="said before", faults=frozenset({"duplicate"}))
        english.append(dataclasses.replace(twice, texts=(twice.texts[0], said_again)))
        english.append(dataclasses.replace(self._good(next(self._spare), "en"), texts=(), what="an empty list"))
        self._guarded(english, mirror, "en")
        self._guarded(chinese, web, "zh")
        made = [
            Source("photos-en", "en", 10, english, messy_files.parquet_with_lists, files=3, listed=True),
            Source("photos-zh", "zh", 9, chinese, messy_files.parquet_with_structs, files=2),
            Source("emoji-en", "en", 8, drawn_en, messy_files.parquet_with_binary, files=2),
            Source("emoji-zh", "zh", 7, drawn_zh, messy_files.webdataset, files=2),
            Source("objects-en", "en", 5, things, messy_files.img2dataset, files=2),
            Source("镜像-en", "en", 1, mirror, messy_files.parquet_of_many_types, files=2),
            Source("web-zh", "zh", 2, web, messy_files.nested_tar, files=2),
        ]
        for source in made:
            self._spoil(source)
        return made

    def _good(self, picture: Picture, language: str, captions: int = 1) -> Item:
        said = list(dict.fromkeys(getattr(picture, language)))[:captions]  # each once
        texts = tuple(messy_texts.judged(Text(text), language, MIN_CHARACTERS) for text in said)
        return Item(picture.data, texts, "as it is", shows=self._shown(picture), licence=picture.licence)

    def _shown(self, picture: Picture) -> str:
        return self._pictures.twins.get(picture.name, picture.name)

    def _copies(self, pictures: Iterable[Picture], language: str, copy: Callable) -> list[Item]:
        """Every third byte by byte, the others encoded anew."""
        items = []
        for number, picture in enumerate(pictures):
            choose = random.Random(f"{self._seed} copy {picture.name} {language}")
            data, what = (picture.data, "copy: the same bytes") if number % 3 == 0 else copy(picture.data, choose)
            item = self._good(picture, language)
            if item.texts and not item.texts[0].faults:
                items.append(dataclasses.replace(item, image=data, what=what))
        return items

    def _rescued(self, items: list[Item], language: str) -> list[Item]:
        """Copies of pictures whose twin of higher rank falls to another rule, so that the copy must be kept: the twin
        is cut short, or its texts are too short. Spoils `items`."""
        copies = []
        for number in range(max(2, self._share(0.3))):
            picture = next(self._spare)
            good = self._good(picture, language)
            if number % 2:
                items.append(dataclasses.replace(good, image=picture.data[:-400], what="cut", faults=FAULTS[0][2]))
            else:
                items.append(dataclasses.replace(good, texts=(messy_texts.SHORT[language],)))
            copies.append(dataclasses.replace(good, what="its twin of higher rank is no good"))
        return copies

    def _unusual(self, language: str) -> list[Item]:
        items = []
        for _ in range(max(1, self._share(1) // len(UNUSUAL))):
            for what, make in UNUSUAL.items():
                picture = next(self._spare)
                data = make(opened(picture.data).convert("RGB"))
                good = self._good(picture, language)
                # Grey pictures of different colours may look alike; these are all different photos.
                items.append(dataclasses.replace(good, image=data, what=what))
        for text in messy_texts.UNUSUAL[language]:
            items.append(dataclasses.replace(self._good(next(self._spare), language), texts=(text,)))
        return items

    def _guarded(self, exact: list[Item], changed: list[Item], language: str) -> None:
        """Evaluation images: as they are in one source, copied in another."""
        for picture in self._pictures.benchmark:
            item = dataclasses.replace(
                self._good(picture, language), what="evaluation image", faults=frozenset({"evaluation_image"})
            )
            exact.append(item)
            data, what = copied(picture.data, random.Random(f"{self._seed} guard {picture.name} {language}"))
            changed.append(dataclasses.replace(item, image=data, what=f"evaluation image, {what}"))

    def _spoil(self, source: Source) -> None:
        """Adds every fault of images and of texts at least once, each with a picture of its own, and shuffles."""
        faulty = FAULTS + BOMBS
        for number in range(max(len(faulty), self._share(0.5))):
            what, make, reasons = faulty[number % len(faulty)]
            picture = next(self._spare)
            bomb = (what, make, reasons) in BOMBS
            if bomb and number >= len(faulty):
                continue
            good = self._good(picture, source.language)
            source.items.append(dataclasses.replace(good, image=make(picture.data), what=what, faults=reasons))
        texts = messy_texts.FAULTS[source.language]
        for number in range(max(len(texts), self._share(0.4))):
            good = self._good(next(self._spare), source.language)
            source.items.append(dataclasses.replace(good, texts=(texts[number % len(texts)],)))
        source.items.append(dataclasses.replace(self._good(next(self._spare), source.language), texts=None))
        random.Random(f"{self._seed} order of {source.name}").shuffle(source.items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawn", action="store_true", help="without ../shared/data")
    options = parser.parse_args()
    shared = Path(__file__).parents[4] / "shared"
    take = needed(options.rows) | {"seed": options.seed}
    pictures = drawn(**take) if options.drawn else real(shared, **take)
    messy = build(options.output, pictures, options.rows, options.seed)
    print(f"{len(messy.truth)} rows; {messy.config}")


if __name__ == "__main__":
    main()
