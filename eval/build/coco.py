"""COCO-MCC (which categories an image holds) and COCO-Count (how many of each), from instances_*.json.

The paper does not say how it chose its 2,222 and 3,238 images. A rule is an id such as `set:min2:first:keep`:

* what the text tells: `set`, the categories; `count`, the categories with their numbers;
* `minN`: at least N categories; `maxN`: no category more than N times, `max-` without a limit;
* which images: `unique`, those whose text fits no other image; `first`, the first image (by id) of each text; `all`;
* crowd annotations (a group outlined as one): `keep` as one object; `ignore` the annotation; `drop` the image.

Texts list categories in the order of COCO's ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from .layout import FineGrainedSet, ImageRow, Question, Text, question
from .phrases import categories, category_counts, category_set
from .sources import field, read_json, read_json_lines, stable_hash

# Crowds hold their category, but nobody counted them. `first`: one image per text, as the paper's counts suggest.
DEFAULT_SET, DEFAULT_COUNT = "set:min2:first:keep", "count:min1:max10:first:drop"
SET_RULES = tuple(
    f"set:min{least}:{select}:{crowd}"
    for least, select, crowd in product((1, 2, 3), ("unique", "first"), ("keep", "ignore", "drop"))
)
COUNT_RULES = tuple(
    f"count:min{least}:max{most}:{select}:{crowd}"
    for least, most, select, crowd in product(
        (1, 2), ("-", 10, 20), ("unique", "first", "all"), ("keep", "ignore", "drop")
    )
)


@dataclass(frozen=True)
class Annotated:
    """What the annotations say of one image."""

    image_id: int
    file_name: str
    counts: Mapping[str, int]
    """Objects by category, in the order of COCO's ids, without crowds."""
    crowds: frozenset[str]


def read_instances(annotations: Path, karpathy: Path | None = None) -> list[Annotated]:
    """The images of a COCO instances file, by id.

    Args:
        annotations: instances_val2014.json or instances_val2017.json.
        karpathy: keep only the test images that dataset_coco.json (Karpathy's split) names, or a .jsonl file of objects
            with an `image`, such as the released coco_caption_karpathy_test.jsonl.

    Raises:
        ValueError: for files of another form, categories other than the 80, or a split whose images are not here.
    """
    document = read_json(annotations)
    where = str(annotations)
    names: dict[int, str] = {}
    for own in field(where, document, "categories", list):
        names[field(f"a category of {where}", own, "id", int)] = field(f"a category of {where}", own, "name", str)
    unknown = sorted(set(names.values()) - set(categories()))
    if unknown:
        raise ValueError(f"{annotations} has categories that are not among the 80 of COCO: {unknown[:5]}.")
    images: dict[int, str] = {}
    for own in field(where, document, "images", list):
        images[field(f"an image of {where}", own, "id", int)] = field(f"an image of {where}", own, "file_name", str)
    objects: dict[int, Counter[str]] = {number: Counter() for number in images}
    crowds: dict[int, set[str]] = {number: set() for number in images}
    for own in field(where, document, "annotations", list):
        number = field(f"an annotation of {where}", own, "image_id", int)
        category = field(f"an annotation of {where}", own, "category_id", int)
        if number not in images or category not in names:
            what = f"image {number}" if number not in images else f"category {category}"
            raise ValueError(f"An annotation of {where} is about {what}, which the file does not list.")
        if own.get("iscrowd"):
            crowds[number].add(names[category])
        else:
            objects[number][names[category]] += 1
    pool = _pool(images, karpathy) if karpathy else set(images)
    return [
        Annotated(number, images[number], _ordered(objects[number]), frozenset(crowds[number]))
        for number in sorted(pool)
    ]


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in categories() if counts.get(name)}


def _pool(images: Mapping[int, str], karpathy: Path) -> set[int]:
    if karpathy.suffix == ".jsonl":
        wanted = {Path(field(str(karpathy), own, "image", str)).name for own in read_json_lines(karpathy)}
    else:
        split = field(str(karpathy), read_json(karpathy), "images", list)
        where = f"an image of {karpathy}"
        wanted = {field(where, own, "filename", str) for own in split if field(where, own, "split") == "test"}
    numbers = {name: number for number, name in images.items()}
    missing = sorted(wanted - set(numbers))
    if missing or not wanted:
        seen = f"{len(missing)} of them are not, such as {missing[0]}" if missing else "it names none"
        raise ValueError(f"The test images of {karpathy} must be in the annotations (of val2014): {seen}.")
    return {numbers[name] for name in wanted}


def select(images: Sequence[Annotated], rule: str) -> tuple[dict[str, list[Annotated]], dict[str, int]]:
    """The images of each text (by key), and how many images were left out, by reason."""
    kind, least, *most, which, crowd = rule.split(":")
    limit = int(most[0][3:]) if most and most[0] != "max-" else None
    found: dict[str, list[Annotated]] = {}
    dropped: Counter[str] = Counter()
    for image in images:
        if crowd == "drop" and image.crowds:
            dropped["images with a crowd"] += 1
            continue
        counts = _told(image, crowd)
        if len(counts) < int(least[3:]):
            dropped["images without a category" if not counts else f"images with under {least[3:]} categories"] += 1
        elif limit and max(counts.values()) > limit:
            dropped[f"images with more than {limit} of a category"] += 1
        else:
            found.setdefault(_key(kind, counts), []).append(image)
    kept = {key: own if which == "all" else own[:1] for key, own in found.items() if which != "unique" or len(own) == 1}
    shared = sum(map(len, found.values())) - sum(map(len, kept.values()))
    if shared:
        dropped["images whose text fits another image"] += shared
    return kept, dict(dropped)


def _told(image: Annotated, crowd: str) -> dict[str, int]:
    """The categories and numbers that a text tells of an image."""
    crowds = {name: 1 for name in image.crowds} if crowd == "keep" else {}
    return _ordered(Counter(image.counts) + Counter(crowds))


def _key(kind: str, counts: Mapping[str, int]) -> str:
    if kind == "set":
        return ", ".join(counts)
    return ", ".join(f"{name}={count}" for name, count in counts.items())


def _text(kind: str, counts: Mapping[str, int]) -> Text:
    english, chinese = category_set(list(counts)) if kind == "set" else category_counts(counts)
    return Text(_key(kind, counts), english, chinese)


def count_coco(sources: Mapping[str, Path], rules: Sequence[str], seed: int) -> dict[str, tuple[int, int]]:
    """(images, texts) of each rule; the annotations are read once."""
    images = read_instances(sources["annotations"], sources.get("karpathy"))
    chosen = {rule: select(images, rule)[0] for rule in rules}
    return {rule: (sum(map(len, kept.values())), len(kept)) for rule, kept in chosen.items()}


def build_coco(sources: Mapping[str, Path], rule: str, seed: int) -> FineGrainedSet:
    images = read_instances(sources["annotations"], sources.get("karpathy"))
    kept, dropped = select(images, rule)
    kind, crowd = rule.split(":")[0], rule.split(":")[-1]
    told = {own.image_id: _told(own, crowd) for group in kept.values() for own in group}
    chosen = sorted((own for group in kept.values() for own in group), key=lambda own: own.image_id)
    texts: dict[str, Text] = {}
    for own in chosen:
        text = _text(kind, told[own.image_id])
        texts.setdefault(text.key, text)
    rows = [ImageRow(str(own.image_id), own.file_name, (_key(kind, told[own.image_id]),)) for own in chosen]
    ask = _other_category if kind == "set" else _other_count
    questions = [asked for own in chosen if (asked := ask(own, told[own.image_id], seed))]
    return FineGrainedSet(rule, rows, texts, questions, dropped=dropped)


def _other_category(image: Annotated, told: Mapping[str, int], seed: int, negatives: int = 3) -> Question:
    """One category of the text replaced by a similar one that the image lacks."""
    order = list(categories())
    replaced = list(told)[stable_hash(seed, "replaced", image.image_id) % len(told)]
    absent = [name for name in order if name not in image.counts and name not in image.crowds]
    # COCO's order keeps similar things together: animals, vehicles, cutlery.
    others = sorted(absent, key=lambda name: abs(order.index(name) - order.index(replaced)))[:negatives]
    false = [_text("set", _ordered({name: 1 for name in told if name != replaced} | {other: 1})) for other in others]
    return question(str(image.image_id), "category", _text("set", told), false, seed)


def _other_count(image: Annotated, told: Mapping[str, int], seed: int) -> Question | None:
    """One number raised or lowered by one; none for an image in which a crowd makes the numbers doubtful."""
    if image.crowds:
        return None
    changed = list(told)[stable_hash(seed, "changed", image.image_id) % len(told)]
    numbers = [number for number in (told[changed] - 1, told[changed] + 1) if number > 0]
    false = [_text("count", told | {changed: number}) for number in numbers]
    return question(str(image.image_id), "count", _text("count", told), false, seed)
