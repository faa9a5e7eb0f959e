"""A fine-grained set in memory, and how it is written (the folder is described in eval/build/__init__.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_m2encoder.hub_folder import complete_or_absent

from ..files import sha256_of
from .card import card
from .sources import find_images, stable_hash
from .tables import table_sha256

# Rows of image bytes per row group, and bytes of images per file: readers page by the one, uploads resume by the other.
ROWS_PER_GROUP = 100
BYTES_PER_FILE = 400 << 20


@dataclass(frozen=True)
class Text:
    key: str
    """What it says, independent of the language."""
    en: str
    zh: str
    name_en: str = ""
    """The bare class name, for sets of classes."""
    name_zh: str = ""


@dataclass(frozen=True)
class ImageRow:
    image_id: str
    file_name: str
    keys: tuple[str, ...]
    """The texts that are right for it."""
    label: int | None = None


@dataclass(frozen=True)
class Question:
    """Which of these texts is true of the image?"""

    image_id: str
    candidates: tuple[Text, ...]
    label: int
    factor: str


@dataclass(frozen=True)
class FineGrainedSet:
    """What a builder makes of the annotations."""

    rule: str
    """How images and texts were chosen: an id that its module explains."""
    images: Sequence[ImageRow]
    texts: Mapping[str, Text]
    """By key, in the order of text_id."""
    questions: Sequence[Question] = ()
    class_names: Sequence[str] = ()
    """English names by label, for sets of classes."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Images and annotations that were left out, by reason."""
    probe: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(images, texts) by each rule that was tried."""

    @property
    def counts(self) -> dict[str, int]:
        return {
            "images": len(self.images),
            "texts": len(self.texts),
            "pairs": sum(len(row.keys) for row in self.images),
            "choices": len(self.questions),
        }


def question(image_id: str, factor: str, true: Text, false: Sequence[Text], seed: int) -> Question:
    """Puts the true text at a place that depends on the image and the seed only."""
    label = stable_hash(seed, image_id, factor, true.key) % (len(false) + 1)
    return Question(image_id, (*false[:label], true, *false[label:]), label, factor)


def check(name: str, built: FineGrainedSet) -> None:
    """Raises ValueError for an empty set and for texts that are not distinct: a fault in tables or annotations."""
    if not built.images:
        raise ValueError(f"{name}: no image of the annotations fits the rule {built.rule}; left out: {built.dropped}.")
    for language in ("en", "zh"):
        texts = [getattr(text, language) for text in built.texts.values()]
        if len(set(texts)) < len(texts):
            twice = sorted({text for text in texts if texts.count(text) > 1})
            raise ValueError(f"{name}: different annotations give the same {language} text: {twice[:3]}.")
    ids = [row.image_id for row in built.images]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name}: the annotations name {len(ids) - len(set(ids))} images more than once.")


def write(
    output: Path,
    built: FineGrainedSet,
    manifest: dict[str, Any],
    *,
    title: str,
    about: str,
    licence: str,
    images: Path | None,
) -> dict[str, Any]:
    """Writes the folder, whole or not at all; the same inputs give the same bytes (with the same pyarrow).

    Args:
        manifest: what identifies the build; completed and returned.

    Raises:
        ValueError: when `output` holds something else, or an image is missing or damaged.
    """
    refuse_other_build(output, manifest)
    files = find_images(images, [row.file_name for row in built.images]) if images else None
    with complete_or_absent(output, replace=True) as folder:
        folder.mkdir()
        _write_images(folder, built, files)
        _write_rows(folder / "texts.parquet", *_texts(built))
        if built.questions:
            _write_rows(folder / "choice.parquet", *_questions(built))
        manifest = {
            **manifest,
            "images": _image_digest(built, files) if files else None,
            "captions_sha256": {language: _caption_digest(built, language) for language in ("en", "zh")},
            "files": {file.name: sha256_of(file) for file in sorted(folder.glob("*.parquet"))},
        }
        (folder / "README.md").write_text(card(title, about, licence, manifest), encoding="utf-8")
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (folder / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def refuse_other_build(output: Path, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError unless `output` is free or holds the build that `manifest` identifies, which may be renewed."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        there = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
        other = [key for key, value in manifest.items() if there.get(key) != json.loads(json.dumps(value))]
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{output} exists and is no fine-grained set: choose another folder or remove it.") from None
    if other:
        shown = ", ".join(f"{key} {_short(there.get(key))} instead of {_short(manifest[key])}" for key in other[:2])
        raise ValueError(f"{output} holds another build ({shown}): choose another folder or remove it.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _write_images(folder: Path, built: FineGrainedSet, files: Mapping[str, Path] | None) -> None:
    features = _image_features(built, files is not None)
    text_ids = {key: i for i, key in enumerate(built.texts)}
    shards = _shards(built.images, files)
    for number, rows in enumerate(shards):
        path = folder / f"test-{number:05d}-of-{len(shards):05d}.parquet"
        with pq.ParquetWriter(path, features.arrow_schema) as writer:
            for start in range(0, len(rows), ROWS_PER_GROUP):
                group = [_image_row(row, built, text_ids, files) for row in rows[start : start + ROWS_PER_GROUP]]
                writer.write_table(_table(group, features))


def _image_features(built: FineGrainedSet, with_images: bool) -> datasets.Features:
    string = datasets.Value("string")
    features: dict[str, Any] = {"image_id": string, "file_name": string}
    if with_images:
        features["image"] = datasets.Image()
    features |= {"captions_en": datasets.List(string), "captions_zh": datasets.List(string)}
    features["text_ids"] = datasets.List(datasets.Value("int32"))
    if built.class_names:
        features |= {"label": datasets.ClassLabel(names=list(built.class_names)), "name_en": string, "name_zh": string}
    return datasets.Features(features)


def _image_row(
    row: ImageRow, built: FineGrainedSet, text_ids: Mapping[str, int], files: Mapping[str, Path] | None
) -> dict[str, Any]:
    texts = [built.texts[key] for key in row.keys]
    cells: dict[str, Any] = {"image_id": row.image_id, "file_name": row.file_name}
    if files:
        cells["image"] = {"bytes": files[row.file_name].read_bytes(), "path": row.file_name}
    cells |= {"captions_en": [text.en for text in texts], "captions_zh": [text.zh for text in texts]}
    cells["text_ids"] = [text_ids[key] for key in row.keys]
    if built.class_names:
        cells |= {"label": row.label, "name_en": texts[0].name_en, "name_zh": texts[0].name_zh}
    return cells


def _shards(rows: Sequence[ImageRow], files: Mapping[str, Path] | None) -> list[list[ImageRow]]:
    shards: list[list[ImageRow]] = [[]]
    size = 0
    for row in rows:
        own = files[row.file_name].stat().st_size if files else 0
        if shards[-1] and size + own > BYTES_PER_FILE:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += own
    return shards


def _texts(built: FineGrainedSet) -> tuple[list[dict[str, Any]], datasets.Features]:
    string, number = datasets.Value("string"), datasets.Value("int32")
    features = {"text_id": number, "key": string, "text_en": string, "text_zh": string, "images": number}
    if built.class_names:
        features |= {"name_en": string, "name_zh": string}
    images = dict.fromkeys(built.texts, 0)
    for row in built.images:
        for key in row.keys:
            images[key] += 1
    rows = [
        {"text_id": i, "text_en": text.en, "text_zh": text.zh, "images": images[text.key], **vars(text)}
        for i, text in enumerate(built.texts.values())
    ]
    return [{name: row[name] for name in features} for row in rows], datasets.Features(features)


def _questions(built: FineGrainedSet) -> tuple[list[dict[str, Any]], datasets.Features]:
    string = datasets.Value("string")
    features = datasets.Features(
        {
            "image_id": string,
            "candidates_en": datasets.List(string),
            "candidates_zh": datasets.List(string),
            "label": datasets.Value("int64"),
            "factor": string,
        }
    )
    rows = [
        {
            "image_id": own.image_id,
            "candidates_en": [text.en for text in own.candidates],
            "candidates_zh": [text.zh for text in own.candidates],
            "label": own.label,
            "factor": own.factor,
        }
        for own in built.questions
    ]
    return rows, features


def _table(rows: list[dict[str, Any]], features: datasets.Features) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=features.arrow_schema)


def _write_rows(path: Path, rows: list[dict[str, Any]], features: datasets.Features) -> None:
    pq.write_table(_table(rows, features), path)


def _captions(built: FineGrainedSet, language: str) -> Iterator[str]:
    return (getattr(built.texts[key], language) for row in built.images for key in row.keys)


def _caption_digest(built: FineGrainedSet, language: str) -> str:
    return hashlib.sha256("".join(f"{text}\n" for text in _captions(built, language)).encode()).hexdigest()


def _image_digest(built: FineGrainedSet, files: Mapping[str, Path]) -> dict[str, Any]:
    lines = [f"{row.file_name} {sha256_of(files[row.file_name])}\n" for row in built.images]
    return {"files": len(lines), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}


def tables_used(names: Sequence[str]) -> dict[str, str]:
    return {f"{name}.tsv": table_sha256(name) for name in names}
