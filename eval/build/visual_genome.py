"""VG-POS: the relations that Visual Genome (1.2 or 1.4) annotates in 3,000 images, in the 150 nouns and 50 predicates
of VG150, which our tables translate.

The paper's 3,000 images are not published, nor how its 53,806 texts were made from them; all distinct relations of
3,000 images come to about that many (VG has some 21 per image), but only in free-form English words. Rule `vg150`:
images in the order of the SHA-256 of their id, the first 3,000 with a relation in the vocabulary.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .layout import FineGrainedSet, ImageRow, Question, Text, question
from .phrases import relation, vg_nouns, vg_predicates
from .sources import field, read_json, require_file, stable_hash

RULE = "vg150"
IMAGES = 3000


class Thing(NamedTuple):
    object_id: int
    name: str


class Relation(NamedTuple):
    subject: Thing
    predicate: str
    object: Thing


def read_relations(path: Path, aliases: Mapping[str, Mapping[str, str]]) -> dict[int, list[Relation]]:
    """relationships.json (or its .zip) -> the relations of each image, in normalised words.

    Args:
        aliases: word -> the word to use instead, under "objects" and "predicates".

    Raises:
        ValueError: for a file of another form.
    """

    def shrink(own: dict[str, Any]) -> Any:
        # 2.3 million relations, each a dozen dicts: keep what is needed while reading, or the file fills the memory.
        if isinstance(own.get("object_id"), int):
            names = own.get("names")
            name = own.get("name") or (names[0] if isinstance(names, list) and names else "")
            return Thing(own["object_id"], _normal(name, aliases.get("objects", {})))
        if "predicate" in own and isinstance(own.get("subject"), Thing) and isinstance(own.get("object"), Thing):
            return Relation(own["subject"], _normal(own["predicate"], aliases.get("predicates", {})), own["object"])
        return own

    document = read_json(path, object_hook=shrink)
    if not isinstance(document, list):
        raise ValueError(f"{path} must hold a list of images with their relationships, not {type(document).__name__}.")
    relations: dict[int, list[Relation]] = {}
    for image in document:
        number = field(f"an image of {path}", image, "image_id", int)
        own = relations.setdefault(number, [])
        for found in field(f"image {number} of {path}", image, "relationships", list):
            if not isinstance(found, Relation):
                raise ValueError(f"Image {number} of {path} has a relationship of another form: {str(found)[:200]}.")
            own.append(found)
    return relations


def _normal(word: Any, aliases: Mapping[str, str]) -> str:
    word = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", str(word)).lower().replace("_", " ")).strip(" .,")
    return aliases.get(word, word)


def read_aliases(path: Path) -> dict[str, str]:
    """object_alias.txt or relationship_alias.txt: lines of words with one meaning, of which the first is used.

    Raises:
        ValueError: for a file that is missing or not UTF-8.
    """
    require_file(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    aliases: dict[str, str] = {}
    for line in lines:
        first, *others = [_normal(word, {}) for word in line.split(",")]
        for word in others:
            aliases.setdefault(word, first)
    return aliases


def _read(sources: Mapping[str, Path], seed: int) -> dict[int, list[Relation]]:
    """The relations of each image, in the order in which images are taken."""
    kinds = {"objects": "object_alias", "predicates": "predicate_alias"}
    aliases = {kind: read_aliases(sources[role]) for kind, role in kinds.items() if role in sources}
    relations = read_relations(sources["relationships"], aliases)
    order = sorted(relations, key=lambda number: (stable_hash(seed, "vg-pos-v1", number), number))
    return {number: relations[number] for number in order}


def count_vg_pos(sources: Mapping[str, Path], rules: Sequence[str], seed: int) -> dict[str, tuple[int, int]]:
    """(images, texts) of `vg150`; and of the first images in free-form English, each text counted once or per image."""
    built = build_vg_pos(sources, RULE, seed)
    words = [
        {(own.subject.name, own.predicate, own.object.name) for own in relations}
        for relations in _read(sources, seed).values()
        if relations
    ][:IMAGES]
    return {
        RULE: (len(built.images), len(built.texts)),
        "free-form, each text once": (len(words), len(set().union(*words))),
        "free-form, texts of each image": (len(words), sum(map(len, words))),
    }


def build_vg_pos(sources: Mapping[str, Path], rule: str, seed: int) -> FineGrainedSet:
    relations = _read(sources, seed)
    dropped: Counter[str] = Counter()
    rows: list[ImageRow] = []
    texts: dict[str, Text] = {}
    questions: list[Question] = []
    for position, (number, annotated) in enumerate(relations.items()):
        if len(rows) == IMAGES:
            dropped[f"images beyond the first {IMAGES:,}"] = len(relations) - position
            break
        known = [own for own in annotated if _in_vocabulary(own)]
        dropped["relations outside of the vocabulary"] += len(annotated) - len(known)
        # Many images name a relation twice, for other objects.
        own_texts = {text.key: text for text in map(_text, known)}
        dropped["relations that an image repeats"] += len(known) - len(own_texts)
        if not own_texts:
            dropped["images without a relation in the vocabulary"] += 1
            continue
        texts |= own_texts
        rows.append(ImageRow(str(number), f"{number}.jpg", tuple(own_texts)))
        questions += _questions(number, known, own_texts, seed)
    return FineGrainedSet(rule, rows, texts, questions, dropped={key: n for key, n in dropped.items() if n})


def _in_vocabulary(own: Relation) -> bool:
    nouns = vg_nouns()
    return own.subject.name in nouns and own.predicate in vg_predicates() and own.object.name in nouns


def _text(own: Relation) -> Text:
    words = (own.subject.name, own.predicate, own.object.name)
    return Text(" | ".join(words), *relation(*words))


def _questions(number: int, known: Sequence[Relation], true: Mapping[str, Text], seed: int) -> list[Question]:
    """At most one question of each kind: subject and object exchanged; the relation turned into its opposite.

    Only about relations whose two nouns each name one object of the image: the false text must not be true of others.
    """
    objects: dict[str, set[int]] = {}
    for own in known:
        for thing in (own.subject, own.object):
            objects.setdefault(thing.name, set()).add(thing.object_id)
    asked: dict[str, Question] = {}
    for own in sorted(known, key=lambda own: (stable_hash(seed, number, own), own)):
        subject, predicate, other = own.subject.name, own.predicate, own.object.name
        if subject == other or len(objects[subject]) > 1 or len(objects[other]) > 1:
            continue
        row = vg_predicates()[predicate]
        changes = []
        if row["swap"] == "yes":
            changes.append(("roles", Relation(own.object, predicate, own.subject)))
        if row["opposite"]:
            changes.append(("relation", Relation(own.subject, row["opposite"], own.object)))
        for factor, change in changes:
            false = _text(change)
            if factor not in asked and false.key not in true:
                asked[factor] = question(str(number), factor, _text(own), [false], seed)
    return list(asked.values())
