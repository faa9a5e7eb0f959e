"""Whether data are what a task file says: columns, split, revision, counts, and the captions themselves.

    findings = verify(load_task("flickr8k-cn"), "flickr8k_cn_val.parquet")

A finding is "ok", "warning" (nothing is known to hold the data against) or "wrong". `run` scores nothing whose data are
wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .data import Table, open_table
from .files import read_json, write_text
from .fine_grained import FineGrained
from .retrieval import Captioned
from .tasks import Task
from .zero_shot import Labelled

Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}"


def require(task: Task, findings: Sequence[Finding]) -> None:
    """Raises ValueError for findings that are wrong, naming all of them."""
    wrong = [finding.what for finding in findings if finding.level == "wrong"]
    if wrong:
        raise ValueError(f"The data are not those of the task {task.name}: {'; '.join(wrong)}.")


def check_captioned(task: Task, data: Captioned) -> list[Finding]:
    """Revision, images, captions and their checksum of a retrieval task."""
    findings = [check_revision(task, data.table), _count("images", task.expected.images, len(data.table))]
    for language, lists in data.captions.items():
        texts = sum(map(len, lists))
        findings.append(_count(f"{language} texts", task.expected.texts.get(language), texts))
        if not texts:
            findings.append(Finding("wrong", f"there is no {language} caption at all"))
        seen = captions_checksum(lists)
        known = task.expected.sha256.get(language)
        if known is None:
            findings.append(
                Finding(
                    "warning", f"no checksum is recorded for the {language} captions; --write records theirs: {seen}"
                )
            )
        else:
            level: Level = "ok" if seen == known else "wrong"
            findings.append(Finding(level, f"the {language} captions have the checksum {seen}, recorded is {known}"))
    return findings


def check_labelled(task: Task, data: Labelled) -> list[Finding]:
    """Revision, images and classes of a classification task."""
    classes = len(next(iter(data.classes.values())).names)
    return [
        check_revision(task, data.table),
        _count("images", task.expected.images, len(data.table)),
        _count("classes", task.expected.classes, classes),
    ]


def check_fine_grained(task: Task, data: FineGrained) -> list[Finding]:
    """A built folder against its own manifest, and against the counts of the paper."""
    counts, paper = data.manifest.get("counts", {}), data.manifest.get("paper") or {}
    findings = [_count(what, counts.get(what), seen) for what, seen in data.counts.items()]
    for language, known in (data.manifest.get("captions_sha256") or {}).items():
        seen = _built_checksum(data.captions.captions[language])
        level: Level = "ok" if seen == known else "wrong"
        findings.append(Finding(level, f"the {language} captions have the checksum {seen}, the manifest says {known}"))
    reproduced = paper.get("reproduced")
    told = f"the paper counts {paper.get('images')} images and {paper.get('texts')} texts"
    findings.append(Finding("ok", f"{told}, as here") if reproduced else Finding("warning", f"{told}: not reproduced"))
    return findings


def check_revision(task: Task, table: Table) -> Finding:
    """The commit that the data were downloaded at against the pinned one."""
    pinned, seen = task.data.revision, table.revision
    if seen is not None and pinned is not None and seen != pinned:
        return Finding("wrong", f"the data are at revision {seen}, the task pins {pinned}")
    if seen is not None and pinned is not None:
        return Finding("ok", f"revision {seen}, as pinned")
    if pinned is not None:
        return Finding("warning", f"nothing says at which revision the local files were downloaded (pinned: {pinned})")
    if task.data.id is not None:
        pin = f"; to pin what is here: data.revision: {seen}" if seen else ""
        return Finding("warning", f"revision not pinned: {task.data.id} may change under this task{pin}")
    return Finding("ok", "local data, which have no revision")


def captions_checksum(lists: Sequence[Sequence[str]]) -> str:
    """sha256 over the captions of all images: of each image in their order, of the images in any order, so that mirrors
    which sort their rows differently agree."""
    rows = sorted(hashlib.sha256(json.dumps(list(own), ensure_ascii=False).encode()).hexdigest() for own in lists)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def record(path: Path, images: int, texts: Mapping[str, int], checksums: Mapping[str, str]) -> Path:
    """Write what was seen into a task file's `expected` (`verify --write`); the rest of the file stays as it is.

    Raises:
        ValueError: for a file that cannot be written.
    """
    block = ["expected:", f"  images: {images}", f"  texts: {_flow(texts)}", "  sha256:"]
    block += [f"    {language}: {checksum}" for language, checksum in checksums.items()]
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("expected:")), len(lines))
    end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip()), len(lines))
    lines[start:end] = block
    write_text(path, "\n".join(lines) + "\n")
    return path


def _flow(values: Mapping[str, int]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"


def check_scenes(task: Task, folder: str | Path) -> list[Finding]:
    """That the folder holds as many test images, and questions of each task, as its manifest says.

    Raises:
        ValueError: for a folder that is no scenes data set, or lacks a file.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is not a scenes folder: it has no manifest.json. To get one: {task.data.obtain}.")
    manifest = read_json(folder / "manifest.json")
    settings = manifest.get("settings", {})
    findings = [_count("images", settings.get("test"), len(open_table([folder / task.data.files])))]
    for name in manifest.get("tasks", ()):
        questions = len(open_table([folder / "tasks" / f"{name}.parquet"]))
        findings.append(_count(f"{name} questions", settings.get("task_size"), questions))
    return findings


def _count(what: str, expected: int | None, seen: int) -> Finding:
    if expected is None:
        return Finding("warning", f"{seen:,} {what}; how many there should be is not recorded")
    if seen != expected:
        return Finding("wrong", f"{expected:,} {what} expected, {seen:,} seen")
    return Finding("ok", f"{seen:,} {what}")


def _built_checksum(lists: Sequence[Sequence[str]]) -> str:
    """As eval/build/__init__.py defines it: every caption of every row in order, each followed by a newline."""
    digest = hashlib.sha256()
    for own in lists:
        for caption in own:
            digest.update(caption.encode() + b"\n")
    return digest.hexdigest()
