"""The systems of the comparison, from systems.yaml: what to load, or why only the published number is shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from .tasks import LOADER


@dataclass(frozen=True)
class PublishedNumber:
    """A number of no benchmark of ours."""

    what: str
    value: float
    """In percent, as published."""
    source: str


@dataclass(frozen=True)
class System:
    """A row of a comparison. Exactly one of `model`, `convert` and `published_only` is there."""

    name: str
    languages: tuple[str, ...]
    """Of the texts it was trained on."""
    model: str | None = None
    """What `eval.models.load` takes."""
    revision: str | None = None
    """The commit on the Hub that somebody checked; None if none is known."""
    convert: str | None = None
    """The published checkpoint of which `python -m conversion.convert` makes a folder that can be loaded."""
    published_only: str | None = None
    """Why it cannot be run."""
    other_weights: str | None = None
    """How the open weights differ from those that the paper measured."""
    in_paper: bool = True
    """Whether it stands in one of the paper's Tables 1 to 5."""
    tables: tuple[int, ...] = ()
    """Which of them; empty if no source at hand says."""
    notes: tuple[str, ...] = ()
    published: tuple[PublishedNumber, ...] = ()

    @property
    def adapter(self) -> str | None:
        """What runs it; None if nothing does."""
        if self.model is None:
            return None if self.convert is None else "ours, after conversion"
        return "open_clip" if self.model.startswith("open_clip:") else "transformers"

    @property
    def where(self) -> str:
        """Its place in the paper, for a table."""
        if not self.in_paper:
            return "later"
        return f"Table {', '.join(map(str, self.tables))}" if self.tables else "one of Tables 1 to 5"

    def loadable(self) -> tuple[str, str | None]:
        """What to load, and its revision.

        Raises:
            ValueError: if there is nothing to load; the message says what to do instead.
        """
        if self.model:
            return self.model, self.revision
        if self.convert:
            raise ValueError(
                f"{self.name} is published as {self.convert}: make a folder of it (python -m conversion.convert "
                f"{self.convert} OUT_DIR) and name that, e.g. {self.name}=OUT_DIR."
            )
        raise ValueError(f"{self.name} cannot be run: {self.published_only}. Reports show its published numbers.")


@cache
def systems() -> dict[str, System]:
    """All systems by name, in the order of the file."""
    document = yaml.load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), Loader=LOADER)
    return {name: _read(name, dict(entry)) for name, entry in document.items()}


def _read(name: str, entry: dict) -> System:
    numbers = tuple(PublishedNumber(**number) for number in entry.pop("published", ()))
    lists = {key: tuple(entry.pop(key, ())) for key in ("languages", "notes", "tables")}
    system = System(name, published=numbers, **lists, **entry)
    assert sum(map(bool, (system.model, system.convert, system.published_only))) == 1, f"{name} in systems.yaml"
    return system
