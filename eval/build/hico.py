"""HOI-POS: which interactions of a person with an object the test images of HICO show.

600 classes less the 80 of `no_interaction` are 520, which the paper prints as the number of images, and 8,593 as that
of texts: the two columns look exchanged (docs/fine_grained.md). The rule follows from the annotation file:

* `image-level`: anno.mat, which says of an image and a class +1 (shows it), -1 (does not), or 0 and NaN (unclear);
* `boxes`: anno_bbox.mat or the JSON of fredzzhang/hicodet, in which a class has box pairs. It has fewer images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .layout import FineGrainedSet, ImageRow, Question, Text, question
from .phrases import categories, hico_verbs, interaction
from .sources import field, numbers, read_json, read_mat, stable_hash

HICO_RULES = ("image-level", "boxes")
NO_INTERACTION = "no_interaction"


@dataclass(frozen=True)
class Annotated:
    """What the annotations say of one test image."""

    file_name: str
    shown: frozenset[int]
    """Numbers of the classes that it shows."""
    not_shown: frozenset[int]
    """Classes that somebody looked for in vain; empty where the file does not tell."""


@dataclass(frozen=True)
class Annotations:
    rule: str
    classes: Sequence[tuple[str, str]]
    """(verb, object) by class number."""
    images: Sequence[Annotated]


def read_annotations(path: Path) -> Annotations:
    """The test split of any of the three files.

    Raises:
        ValueError: for a file of another form, and for verbs or objects that the tables do not have.
    """
    found = _read_json(path) if path.suffix in {".json", ".zip"} else _read_mat(path)
    verbs, objects = hico_verbs() | {NO_INTERACTION}, categories()
    unknown = sorted({f"{verb} {name}" for verb, name in found.classes if verb not in verbs or name not in objects})
    if unknown:
        raise ValueError(f"{path} has classes that eval/build/tables do not translate: {', '.join(unknown[:5])}.")
    return found


def _read_mat(path: Path) -> Annotations:
    found = read_mat(path, "list_action", "anno_test", "list_test", "bbox_test")
    where = str(path)
    classes = []
    for action in np.atleast_1d(field(where, found, "list_action")):
        if not hasattr(action, "vname") or not hasattr(action, "nname"):
            raise ValueError(f"{where}: an action of list_action has no vname and nname.")
        classes.append((str(action.vname), _object(str(action.nname))))
    if "bbox_test" in found:
        return Annotations(
            "boxes", classes, [_boxes(where, own, len(classes)) for own in np.atleast_1d(found["bbox_test"])]
        )
    labels = numbers(f"{where}: anno_test", field(where, found, "anno_test"))
    files = [str(name) for name in np.atleast_1d(field(where, found, "list_test"))]
    if labels.shape != (len(classes), len(files)):
        raise ValueError(
            f"{where}: anno_test must be classes x images, {len(classes)} x {len(files)}, not {labels.shape}."
        )
    images = [
        Annotated(name, _numbers(labels[:, column] == 1), _numbers(labels[:, column] == -1))
        for column, name in enumerate(files)
    ]
    return Annotations("image-level", classes, images)


def _numbers(mask: np.ndarray) -> frozenset[int]:
    return frozenset(np.flatnonzero(mask).tolist())


def _boxes(where: str, own: Any, classes: int) -> Annotated:
    if not hasattr(own, "filename") or not hasattr(own, "hoi"):
        raise ValueError(f"{where}: an image of bbox_test has no filename and hoi.")
    shown = set()
    for pair in np.atleast_1d(own.hoi):
        # `invis` pairs have no boxes: nobody could see where.
        if not getattr(pair, "invis", 0):
            shown.add(_class(where, int(numbers(f"{where}: a hoi's id", getattr(pair, "id", None))[0]) - 1, classes))
    return Annotated(str(own.filename), frozenset(shown), frozenset())


def _read_json(path: Path) -> Annotations:
    document = read_json(path)
    where = str(path)
    verbs, objects = (field(where, document, name, list) for name in ("verbs", "objects"))
    correspondence = field(where, document, "correspondence", list)
    classes: list[tuple[str, str]] = [("", "")] * len(correspondence)
    for entry in correspondence:
        try:
            number, thing, verb = entry
            classes[number] = str(verbs[verb]), _object(str(objects[thing]))
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{where}: an entry of correspondence must be [hoi, object, verb], not {entry}."
            ) from error
    names, annotation = (field(where, document, name, list) for name in ("filenames", "annotation"))
    if len(names) != len(annotation):
        raise ValueError(f"{where} has {len(names)} filenames but {len(annotation)} annotations.")
    images = []
    for name, own in zip(names, annotation, strict=True):
        hois = field(f"{name} in {where}", own, "hoi", list)
        shown = frozenset(_class(f"{name} in {where}", number, len(classes)) for number in hois)
        images.append(Annotated(str(name), shown, frozenset()))
    return Annotations("boxes", classes, images)


def _class(where: str, number: Any, classes: int) -> int:
    if not isinstance(number, int) or not 0 <= number < classes:
        raise ValueError(f"{where}: there is no class {number!r} among the {classes}.")
    return number


def _object(name: str) -> str:
    return name.replace("_", " ")


def count_hoi_pos(sources: Mapping[str, Path], rules: Sequence[str], seed: int) -> dict[str, tuple[int, int]]:
    """(images, texts) of the rule that the file is for."""
    found = read_annotations(sources["annotations"])
    real = {number for number, (verb, _) in enumerate(found.classes) if verb != NO_INTERACTION}
    shown = [image.shown & real for image in found.images]
    return {found.rule: (sum(map(bool, shown)), len(frozenset().union(*shown)))}


def build_hoi_pos(sources: Mapping[str, Path], rule: str, seed: int) -> FineGrainedSet:
    found = read_annotations(sources["annotations"])
    if found.rule != rule:
        raise ValueError(f"{sources['annotations']} is for the rule {found.rule!r}, not {rule!r}.")
    texts = {
        number: Text(f"{verb} {name}", *interaction(verb, name))
        for number, (verb, name) in enumerate(found.classes)
        if verb != NO_INTERACTION
    }
    rows: list[ImageRow] = []
    questions: list[Question] = []
    dropped: Counter[str] = Counter()
    for image in sorted(found.images, key=lambda image: image.file_name):
        shown = sorted(image.shown & texts.keys())
        if not shown:
            dropped["images without an interaction"] += 1
            continue
        image_id = image.file_name.rpartition(".")[0]
        rows.append(ImageRow(image_id, image.file_name, tuple(texts[number].key for number in shown)))
        if asked := _other_verb(image_id, shown, image.not_shown, found.classes, texts, seed):
            questions.append(asked)
    used = {key for row in rows for key in row.keys}
    if len(used) < len(texts):
        dropped["classes that no test image shows"] = len(texts) - len(used)
    kept = {text.key: text for text in texts.values() if text.key in used}
    return FineGrainedSet(found.rule, rows, kept, questions, dropped=dict(dropped))


def _other_verb(
    image_id: str,
    shown: Sequence[int],
    not_shown: frozenset[int],
    classes: Sequence[tuple[str, str]],
    texts: Mapping[int, Text],
    seed: int,
    negatives: int = 3,
) -> Question | None:
    """The same object with other verbs, of which annotators said that the image does not show them."""
    for number in sorted(shown, key=lambda number: stable_hash(seed, image_id, number)):
        others = [other for other in sorted(not_shown & texts.keys()) if classes[other][1] == classes[number][1]]
        others.sort(key=lambda other: (stable_hash(seed, image_id, "other", other), other))
        if others:
            false = [texts[other] for other in others[:negatives]]
            return question(image_id, "verb", texts[number], false, seed)
    return None
