"""CUB-200-2011, Stanford Dogs and Stanford Cars: test images of named classes, from the files of their authors.

One text per class, "a photo of a NAME, a type of bird." and 一张NAME的照片。; the paper does not say what its prompts
were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .layout import FineGrainedSet, ImageRow, Text
from .phrases import with_article
from .sources import field, numbers, read_mat, require_file
from .tables import read_table

# Which of the test images; the paper has 4,021 of the 8,041 of Stanford Cars, "even" and "first" give that many.
CARS_RULES = ("even", "first", "all")


def build_cub(sources: Mapping[str, Path], rule: str, seed: int) -> FineGrainedSet:
    folder = sources["annotations"]
    names = {number: name.partition(".")[2] for number, name in _pairs(folder / "classes.txt").items()}
    files = _pairs(folder / "images.txt")
    labels = _pairs(folder / "image_class_labels.txt")
    training = _pairs(folder / "train_test_split.txt")
    order = sorted(names, key=int)
    rows = []
    for image_id in sorted(files, key=int):
        if image_id not in labels or image_id not in training or labels[image_id] not in names:
            raise ValueError(f"{folder}: image {image_id} ({files[image_id]}) has no class or no split.")
        if training[image_id] == "0":
            rows.append((image_id, files[image_id], order.index(labels[image_id])))
    return _classes(folder, "cub_birds", [names[number] for number in order], rows, rule, "a type of bird")


def _pairs(path: Path) -> dict[str, str]:
    """Lines of "NUMBER VALUE"."""
    require_file(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    pairs = {}
    for number, line in enumerate(lines, 1):
        key, _, value = line.strip().partition(" ")
        if line.strip() and not (key.isdecimal() and value):
            raise ValueError(f"Line {number} of {path} must be a number and a value, not {line[:80]!r}.")
        if value:
            pairs[key] = value
    return pairs


def build_dogs(sources: Mapping[str, Path], rule: str, seed: int) -> FineGrainedSet:
    path = sources["annotations"]
    found = read_mat(path, "file_list", "labels")
    files = [str(name) for name in np.atleast_1d(field(str(path), found, "file_list"))]
    labels = numbers(f"{path}: labels", field(str(path), found, "labels")).astype(int).tolist()
    if len(labels) != len(files):
        raise ValueError(f"{path} has {len(files)} files but {len(labels)} labels.")
    names: dict[int, str] = {}
    rows = []
    for file, label in zip(files, labels, strict=True):
        # n02085620-Chihuahua/n02085620_2650.jpg
        folder, _, image = file.partition("/")
        name = folder.partition("-")[2]
        if not name or not image or names.setdefault(label - 1, name) != name:
            raise ValueError(
                f"{path}: {file!r} with label {label} does not fit WORDNETID-BREED/FILE and one breed per label."
            )
        rows.append((Path(image).stem, file, label - 1))
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"{path}: the labels must be 1 to {len(names)}, not {sorted(label + 1 for label in names)[:5]}..."
        )
    return _classes(path, "stanford_dogs", [names[label] for label in sorted(names)], rows, rule, "a type of dog")


def build_cars(sources: Mapping[str, Path], rule: str, seed: int) -> FineGrainedSet:
    """cars_test_annos_withlabels.mat with cars_meta.mat, or cars_annos.mat of the other release, which has both."""
    path = sources["annotations"]
    found = read_mat(path, "annotations", "class_names")
    meta = sources.get("meta")
    where = str(meta or path)
    names = field(where, read_mat(meta, "class_names") if meta else found, "class_names")
    rows = []
    for own in np.atleast_1d(field(str(path), found, "annotations")):
        if getattr(own, "test", 1) == 0:
            continue
        file = getattr(own, "fname", None) or getattr(own, "relative_im_path", None)
        label = getattr(own, "class", None)
        if file is None or label is None:
            raise ValueError(
                f"{path}: an annotation has no file name or no class (cars_test_annos.mat has none; take "
                "cars_test_annos_withlabels.mat)."
            )
        rows.append((Path(str(file)).stem, str(file), int(numbers(f"{path}: class", label)[0]) - 1))
    keep = rows[_cars_part(rule, len(rows))]
    names = [str(name) for name in np.atleast_1d(names)]
    dropped = {"images of the other half": len(rows) - len(keep)} if len(keep) < len(rows) else {}
    return _classes(path, "stanford_cars", names, keep, rule, "a type of car", dropped)


def _cars_part(rule: str, rows: int) -> slice:
    return {"even": slice(None, None, 2), "first": slice((rows + 1) // 2), "all": slice(None)}[rule]


def count_cars(sources: Mapping[str, Path], rules: Sequence[str], seed: int) -> dict[str, tuple[int, int]]:
    """(images, texts) of each rule."""
    built = build_cars(sources, "all", seed)
    return {rule: (len(built.images[_cars_part(rule, len(built.images))]), len(built.texts)) for rule in rules}


def _classes(
    path: Path,
    table: str,
    labels: Sequence[str],
    rows: Sequence[tuple[str, str, int]],
    rule: str,
    kind: str,
    dropped: Mapping[str, int] | None = None,
) -> FineGrainedSet:
    """All classes are in the gallery, also those without an image."""
    translated = {row["label"]: row for row in read_table(table)}
    unknown = [label for label in labels if label not in translated]
    if unknown:
        raise ValueError(f"{path} has classes that {table}.tsv does not name: {', '.join(unknown[:5])}.")
    if len(set(labels)) < len(labels):
        raise ValueError(f"{path} has {len(labels)} classes, but only {len(set(labels))} distinct names.")
    texts = {}
    for label in labels:
        # Stanford Cars writes its classes as one would; the others are spelled out in the table.
        english, chinese = translated[label].get("en", label), translated[label]["zh"]
        prompt = f"a photo of {with_article(english)}, {kind}."
        texts[label] = Text(label, prompt, f"一张{chinese}的照片。", english, chinese)
    wrong = [f"{file} has class {label + 1}" for _, file, label in rows if not 0 <= label < len(labels)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]}, but there are {len(labels)} classes.")
    images = [ImageRow(image_id, file, (labels[label],), label) for image_id, file, label in rows]
    names = [text.name_en for text in texts.values()]
    return FineGrainedSet(rule, images, texts, class_names=names, dropped=dropped or {})
