"""Class names and prompt templates, taken at run time from the packages and files that keep them.

    read_listed(Listed(package="open_clip", file="zero_shot_metadata.py", entry="IMAGENET_CLASSNAMES"))

A package is found, not imported: of a Python file only the one assignment is read, and nothing of it is run.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tasks import Listed

# What to install for a package, without the dependencies that only its own code needs.
INSTALL = {
    "open_clip": "pip install --no-deps open_clip_torch",
    "cn_clip": "pip install --no-deps cn_clip",
    "clip_benchmark": "pip install --no-deps clip_benchmark",
}


def read_listed(listed: Listed, data_folder: Path | None = None) -> tuple[str, ...]:
    """The strings that a task file names, in their order. In templates {} stands for the class name.

    Args:
        data_folder: where `data_file` lies.

    Raises:
        ValueError: for a package that is not installed (the message says how to), a file or an entry that is missing,
            or one that holds something else.
    """
    if listed.data_file is not None:
        if data_folder is None:
            raise ValueError(f"{listed.data_file} comes with the data: name their folder with --data.")
        text = _read(data_folder / listed.data_file)
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    path = _package_folder(str(listed.package)) / str(listed.file)
    entry = str(listed.entry)
    values = _json_entry(path, entry) if path.suffix == ".json" else _python_entry(path, entry)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{entry} in {path} is not a list of strings: another version of {listed.package}?")
    return tuple(value.replace("{c}", "{}") for value in values)


def names_of_column(labels: Sequence[int], names: Sequence[str], locate: Any) -> dict[int, str]:
    """label -> name from the rows of the data.

    Args:
        locate: row -> where it stands, for messages.

    Raises:
        ValueError: where two rows give one label different names.
    """
    known: dict[int, str] = {}
    for row, (label, text) in enumerate(zip(labels, names, strict=True)):
        if known.setdefault(label, text) != text:
            raise ValueError(f"{locate(row)} calls label {label} {text!r}, an earlier row {known[label]!r}.")
    return known


def collisions(names: Mapping[int, str]) -> dict[str, list[int]]:
    """Names that several classes share, with the labels: no classifier can tell those apart, which caps top-1."""
    labels = defaultdict(list)
    for label, name in names.items():
        labels[name].append(label)
    return {name: own for name, own in labels.items() if len(own) > 1}


def best_top1(names: Mapping[int, str], labels: Sequence[int]) -> float:
    """The top-1 accuracy in [0, 1] of a perfect model in expectation, given that classes share names: their images go
    to one of the classes of that name at random."""
    shared = Counter(names.values())
    return sum(1 / shared[names[label]] for label in labels) / len(labels)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        how = INSTALL.get(package, f"pip install {package}")
        raise ValueError(
            f"The class names or templates are kept in the package {package}, which is not installed: {how}"
        )
    return Path(folders[0])


def _json_entry(path: Path, entry: str) -> Any:
    try:
        return json.loads(_read(path)).get(entry)
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error


def _python_entry(path: Path, entry: str) -> list[str] | None:
    """The strings of `entry = [...]`, where an item is a string or `lambda c: f"a photo of a {c}."`."""
    try:
        tree = ast.parse(_read(path))
    except SyntaxError as error:
        raise ValueError(f"{path} is not Python: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == entry for target in node.targets):
            items = node.value.elts if isinstance(node.value, (ast.List, ast.Tuple)) else []
            strings = [_string(item) for item in items]
            return None if None in strings else strings
    return None


def _string(node: ast.expr) -> str | None:
    if isinstance(node, ast.Lambda):
        node = node.body
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join("{}" if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"No readable file of class names or templates at {path}: {error}") from error
