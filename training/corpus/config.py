"""What a corpus is made of and how: one YAML file, one section per stage.

A key that no setting has is an error, so that a typing mistake does not become a default.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class ExecutorSettings:
    """Who runs the tasks of a stage: an executor of datatrove. It is no part of what a stage makes: a corpus begun
    with one may go on with another."""

    kind: Literal["local", "ray", "slurm"] = "local"
    workers: int = 2
    """Tasks run at the same time."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to datatrove's executor: `partition`, `time`, `cpus_per_task`, ... of a Slurm job."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"executor.workers is {self.workers}; at least 1.")


@dataclass(frozen=True)
class CorpusConfig:
    """A corpus: where it is made, and the sections of its stages as they stand in the YAML file."""

    output: Path
    seed: int
    executor: ExecutorSettings
    sections: Mapping[str, Any]
    """stage -> its settings, unread; `section` reads one."""

    def section(self, stage: str, kind: type[Settings]) -> Settings:
        """The settings of a stage, as the dataclass that the stage defines.

        Raises:
            ValueError: if the section has an unknown or missing key or a value of the wrong type.
        """
        return build(kind, self.sections.get(stage) or {}, stage)

    def has(self, stage: str) -> bool:
        """Whether the file has a section of this stage."""
        return stage in self.sections


STAGES = ("sources", "clean", "score", "rewrite", "translate", "shards", "tokenizer")
"""In their order. `plan` makes nothing and reads the sections of these."""


def load_config(path: str | Path) -> CorpusConfig:
    """Reads a corpus file. Relative paths in it are relative to the folder the command runs in.

    Raises:
        ValueError: for a file that is missing, no YAML mapping, or has a key that is no section.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable corpus file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected a mapping with `output` and sections.")
    known = {"output", "seed", "executor", "plan", *STAGES}
    if unknown := sorted(str(key) for key in values if key not in known):
        raise ValueError(f"{path}: unknown sections {unknown}; there are {sorted(known)}.")
    if not isinstance(values.get("output"), str):
        raise ValueError(f"{path}: `output` is {values.get('output')!r}; name the folder of the corpus.")
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"{path}: `seed` is {seed!r}; a whole number from 0.")
    executor = build(ExecutorSettings, values.get("executor") or {}, "executor")
    sections = {stage: values[stage] for stage in (*STAGES, "plan") if stage in values}
    return CorpusConfig(Path(values["output"]), seed, executor, sections)


def build(kind: Any, value: Any, where: str) -> Any:
    """`value`, as YAML gives it, as an object of `kind`: dataclasses, lists, tuples, dicts, optionals, literals.

    Raises:
        ValueError: naming the place, what is there and what is expected.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        return build(choices[0], value, where) if len(choices) == 1 else _first(choices, value, where)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin in (list, tuple):
        if isinstance(value, list):
            items = [build(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value)]
            return tuple(items) if origin is tuple else items
    elif origin is dict:
        if isinstance(value, dict):
            return {
                build(arguments[0], key, where): build(arguments[1], item, f"{where}.{key}")
                for key, item in value.items()
            }
    elif kind is Path:
        if isinstance(value, str):
            return Path(value)
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    expected = f"one of {list(arguments)}" if origin is Literal else getattr(origin or kind, "__name__", str(kind))
    raise ValueError(f"{where} is {value!r}; expected {expected}.")


def _first(choices: list[Any], value: Any, where: str) -> Any:
    failures = []
    for choice in choices:
        try:
            return build(choice, value, where)
        except ValueError as error:
            failures.append(str(error))
    raise ValueError(" Or: ".join(failures))


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; expected a mapping.")
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind) if item.init]
    if unknown := sorted(str(key) for key in value if key not in names):
        raise ValueError(f"{where}: unknown settings {unknown}; there are {names}.")
    missing = [
        item.name
        for item in dataclasses.fields(kind)
        if item.init
        and item.name not in value
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {missing} must be set.")
    try:
        return kind(**{name: build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
