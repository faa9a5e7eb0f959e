"""The benchmarks: one YAML file each in this folder, read into a `Task`; the path of any other such file will do.

    task = load_task("flickr30k")        # or load_task("my_benchmark.yaml")
    task.data.id, task.columns.captions, task.expected.texts

A file says where the rows come from and at which revision, which columns matter, under which protocol they are scored,
what the data must look like (`python -m eval verify`), and what others published. `flickr30k.yaml` is a commented
example. A file is checked against the dataclasses below when it is read: an unknown entry, a wrong type or a missing
entry is named.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

FOLDER = Path(__file__).parent

# Safe either way; the one in C reads all the files in a tenth of the time, and every report reads them.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Data:
    """Where the rows are."""

    format: Literal["parquet", "webdataset", "jsonl", "built", "scenes"]
    """webdataset: tars of samples; jsonl: lines that name an image file beside them; built: a folder that
    `python -m eval build` wrote; scenes: a folder that `python -m training.scenes` wrote."""
    files: str | dict[str, str] = "*"
    """A glob pattern below the data set's root; or one per language, whose rows are joined by `columns.image_id`."""
    id: str | None = None
    """The data set on the Hugging Face Hub; None where it is not there, or not in a form that can be loaded."""
    revision: str | None = None
    """The commit that was checked (40 hex digits); None if none was, and `verify` says so."""
    split: str = "test"
    obtain: str | None = None
    """How to get the data where `id` alone does not do it."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read."""

    image: str = "image"
    captions: dict[str, str] = field(default_factory=dict)
    """language -> column, whose cells hold one caption or a list of captions."""
    label: str | None = None
    """Integers, for classification."""
    image_id: str | None = None
    """What names an image; paired tests between models and languages check it."""
    split: str | None = None
    """A column that says to which split a row belongs, where one file holds several."""
    caption_separator: str | None = None
    """What parts the captions of a cell that is one string; WebDataset mirrors use a newline."""


@dataclass(frozen=True)
class Listed:
    """Strings that are taken at run time from where they are kept: exactly one of the three places."""

    column: str | None = None
    """A column of the data that holds the class name of each row."""
    data_file: str | None = None
    """A text file in the data folder, one name a line in the order of the labels."""
    package: str | None = None
    """An installed package; nothing of it is run."""
    file: str | None = None
    """The file within the package: .json, or .py with a list of strings or of `lambda c: f"..."`."""
    entry: str | None = None
    """The key of the JSON object, or the variable of the Python file."""


@dataclass(frozen=True)
class ClassTexts:
    """The classes in one language."""

    names: tuple[str, ...] | dict[int, str] | Listed
    """In the order of the labels, or label -> name."""
    templates: tuple[str, ...] | Listed
    """Prompts in which {} stands for the name."""


@dataclass(frozen=True)
class Expected:
    """What `verify` holds the data against; whatever is None or left out is not known."""

    images: int | None = None
    texts: dict[str, int] = field(default_factory=dict)
    classes: int | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    """language -> `eval.verify.captions_checksum`."""


@dataclass(frozen=True)
class Published:
    """A number that others published."""

    system: str
    language: str
    metric: str
    """As in results.json: text_to_image_R@1, mean_recall, top-1, ..."""
    value: float
    """In percent, as published."""
    source: str
    note: str | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark. Kinds: retrieval in both directions, zero-shot classification, fine-grained (retrieval over short
    texts that several images may share), and the scenes."""

    name: str
    title: str
    kind: Literal["retrieval", "classification", "fine-grained", "scenes"]
    protocol: str
    """An id that stands beside every number: data/size/rule/precision."""
    data: Data
    columns: Columns = Columns()
    paired: bool = False
    """Whether every language describes the very same images, so that a gap between languages is one."""
    positives: Literal["text-equal", "owner"] = "text-equal"
    """Whether equal texts are right for all the images that have them, or each for its own image only."""
    captions_per_image: int | None = None
    """Only the first so many captions of each image and language."""
    classes: dict[str, ClassTexts] = field(default_factory=dict)
    expected: Expected = Expected()
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know."""

    @property
    def languages(self) -> tuple[str, ...]:
        """zh and en first."""
        return ordered_languages(self.columns.captions or self.classes or dict.fromkeys(("zh", "en")))


def ordered_languages(names: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """zh, en, and then the others by name."""
    return tuple(sorted(names, key=lambda name: (("zh", "en").index(name) if name in ("zh", "en") else 2, name)))


def task_names() -> list[str]:
    """The benchmarks of this folder."""
    return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("*.yaml"))


def task_files(names: Sequence[str]) -> list[Path]:
    """The files of ("all",), of names, or of paths to YAML files, each once, in the order given.

    Raises:
        ValueError: for no names, or an unknown one; the message lists those that there are.
    """
    if not names:
        raise ValueError(f"Name at least one task: all, or of {', '.join(task_names())}; or the path of a YAML file.")
    chosen = [one for name in names for one in (task_names() if name == "all" else [name])]
    return list(dict.fromkeys(task_path(name) for name in chosen))


def select_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of `task_files(names)`.

    Raises:
        ValueError: as `task_files` and `load_task`, and for two files with one name.
    """
    tasks = [load_task(path) for path in task_files(names)]
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise ValueError(f"Two tasks are called {task.name!r}: their results would overwrite each other.")
    return tasks


def load_task(name: str | Path) -> Task:
    """A benchmark of this folder by its name, or the YAML file at a path.

    Raises:
        ValueError: for an unknown name, and a malformed file: the message names the file and the entry.
    """
    path = task_path(name)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    except FileNotFoundError:
        raise ValueError(f"No task file at {path}. Known tasks are: {', '.join(task_names())}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable YAML file: {error}") from error
    task = _build(Task, document, f"{path}")
    _check(task, path)
    return task


def task_path(name: str | Path) -> Path:
    """The file of a task of this folder, or `name` itself if it ends in .yaml or .yml.

    Raises:
        ValueError: for an unknown name; the message lists those that there are.
    """
    if str(name) in task_names():
        return FOLDER / f"{str(name).replace('-', '_')}.yaml"
    if Path(name).suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(str(name), task_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"Unknown task {str(name)!r}.{hint} Known are: {', '.join(task_names())}.")
    return Path(name)


def _check(task: Task, path: Path) -> None:
    """What the types alone do not say."""
    if task.name != path.stem.replace("_", "-"):
        raise ValueError(f"{path}: name must be the file's own, {path.stem.replace('_', '-')!r}, not {task.name!r}.")
    revision = task.data.revision
    if revision is not None and (len(revision) != 40 or set(revision) - set("0123456789abcdef")):
        raise ValueError(f"{path}: data.revision must be a full commit (40 hex digits) or null, not {revision!r}.")
    if task.captions_per_image is not None and task.captions_per_image < 1:
        raise ValueError(f"{path}: captions_per_image must be at least 1, not {task.captions_per_image}.")
    needs = {
        "retrieval": ("columns.captions", task.columns.captions),
        "classification": ("classes", task.classes),
        "fine-grained": ("data.format: built", task.data.format == "built"),
        "scenes": ("data.format: scenes", task.data.format == "scenes"),
    }
    entry, given = needs[task.kind]
    if not given:
        raise ValueError(f"{path}: a {task.kind} task needs {entry}.")
    if task.kind == "classification" and task.columns.label is None:
        raise ValueError(f"{path}: a classification task needs columns.label.")
    if isinstance(task.data.files, dict):
        if set(task.data.files) != set(task.columns.captions) or task.columns.image_id is None:
            raise ValueError(
                f"{path}: data.files per language needs the languages of columns.captions, and columns.image_id to "
                "join them."
            )
    for language, texts in task.classes.items():
        for entry, listed in (("names", texts.names), ("templates", texts.templates)):
            where = f"{path}: classes.{language}.{entry}"
            if isinstance(listed, Listed):
                _check_listed(listed, where)
            elif not listed or not all(text.strip() for text in dict(_items(listed)).values()):
                raise ValueError(f"{where} must hold at least one string, none of them blank.")
        if isinstance(texts.templates, tuple) and not all("{}" in template for template in texts.templates):
            raise ValueError(f"{path}: classes.{language}.templates need a {{}} where the name stands, each of them.")


def _items(listed: tuple[str, ...] | dict[int, str]) -> list[tuple[int, str]]:
    return list(listed.items()) if isinstance(listed, dict) else list(enumerate(listed))


def _check_listed(listed: Listed, where: str) -> None:
    if [listed.column, listed.data_file, listed.package].count(None) != 2:
        raise ValueError(f"{where} must name one of column, data_file and package.")
    if (listed.package is None) != (listed.file is None) or (listed.package is None) != (listed.entry is None):
        raise ValueError(f"{where}: package, file and entry belong together.")
    if where.endswith("templates") and listed.column:
        raise ValueError(f"{where} cannot come from a column of the data.")


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` of a YAML document as a `kind`: a dataclass, a Literal, a union, a dict, a tuple or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}.")
        return value
    if origin in (typing.Union, types.UnionType):
        return _build(_member(arguments, value, where), value, where)
    if origin is dict:
        _expect(value, dict, where)
        return {_build(arguments[0], k, f"{where} (key {k!r})"): _build(arguments[1], v, f"{where}.{k}")
                for k, v in value.items()}  # fmt: skip
    if origin is tuple:
        _expect(value, list, where)
        return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if kind is not types.NoneType:
        _expect(value, kind, where)
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(value, dict, where)
    hints = typing.get_type_hints(kind)
    unknown = [str(key) for key in value if key not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{where}: unknown entry {', '.join(unknown)}.{hint} Known are: {', '.join(hints)}.")
    for entry in dataclasses.fields(kind):
        optional = (entry.default, entry.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if entry.name not in value and not optional:
            raise ValueError(f"{where}: the entry {entry.name} is missing.")
    # The first separator is a colon, after the file's name, and then dots: tasks/x.yaml: data.format.
    joint = ": " if kind is Task else "."
    return kind(**{key: _build(hints[key], item, f"{where}{joint}{key}") for key, item in value.items()})


def _member(members: Sequence[Any], value: Any, where: str) -> Any:
    """Which member of a union a value is meant for, by its YAML type."""
    for member in members:
        origin = typing.get_origin(member) or member
        if isinstance(value, dict):
            # {0: tench} is label -> name, {column: name} a place.
            integers = bool(value) and all(type(key) is int for key in value)
            if origin is dict and (integers or typing.get_args(member)[0] is str):
                return member
            if dataclasses.is_dataclass(member) and not integers:
                return member
        elif isinstance(value, list):
            if origin is tuple:
                return member
        elif type(value) is origin or (origin is float and type(value) is int):
            return member
    wanted = " or ".join(_shown(member) for member in members)
    raise ValueError(f"{where} must be {wanted}, not {value!r}.")


def _expect(value: Any, kind: type, where: str) -> None:
    if type(value) is not kind:
        raise ValueError(f"{where} must be {_shown(kind)}, not {value!r}.")


def _shown(kind: Any) -> str:
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping",
             list: "a list", tuple: "a list", types.NoneType: "null"}  # fmt: skip
    return names.get(typing.get_origin(kind) or kind, "a mapping")
