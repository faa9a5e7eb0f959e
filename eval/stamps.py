"""What finished work depends on, and where it is found again. Nothing here imports torch or reads weights.

A stamp says which files, by name, size and time, which settings and which libraries gave a score. Equal stamps, equal
scores: so work that is done is known in a moment, and a model that is known need not be loaded to be named.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_json, replaced, write_json
from .tasks import Task

if TYPE_CHECKING:
    from .run import Settings

# Of the score files; raise it when the meaning of a number changes.
FORMAT = 1

# The libraries whose version can change an embedding, and those that the scores need besides.
MODEL_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow", "numpy")
LIBRARIES = (*MODEL_LIBRARIES, "datasets")

# Of a model that is run, besides its files.
MODEL_SETTINGS = ("dtype", "autocast", "text_rule")

ROOT = Path(__file__).parents[1]


def stamp(model: str, task: Task, settings: Settings, revision: str | None = None) -> dict[str, Any]:
    """What a score depends on, as JSON: equal stamps mean that it need not be computed again."""
    about = dataclasses.asdict(task)
    for entry in ("published", "notes", "title"):
        del about[entry]
    source = settings.source(task)
    sources = [source] if isinstance(source, str | Path) else list(source or ())
    document = {
        "format": FORMAT,
        "task": about,
        "data": [_files_state(Path(one)) for one in sources],
        # The weights lie in the folder itself; what lies below it may be our own output.
        "model": _files_state(Path(model).expanduser(), below=False) or model,
        "revision": revision,
        "settings": {name: getattr(settings, name) for name in ("limit", *MODEL_SETTINGS)},
        "libraries": _versions(LIBRARIES),
    }
    return _plain(document)


def model_stamp(model: str, settings: Settings, revision: str | None, device: str) -> str | None:
    """The sha256 of what a model's embeddings depend on, in hex, from its files alone; None for a model whose files are
    not known before it is loaded: one of open_clip, or of the Hub without a pinned commit."""
    files = _files_state(Path(model).expanduser(), below=False)
    if not files and (model.startswith("open_clip:") or revision is None or len(revision) != 40):
        return None
    code = [*(ROOT / "modeling_m2encoder").glob("*.py"), ROOT / "eval" / "models.py", ROOT / "eval" / "fingerprints.py"]
    return _digest(
        {
            "model": files or f"{model}@{revision}",
            "settings": {name: getattr(settings, name) for name in (*MODEL_SETTINGS, "trust_remote_code")},
            "device": device,
            "libraries": _versions(MODEL_LIBRARIES),
            "code": sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in code),
        }
    )


def is_done(folder: Path, name: str, now: dict[str, Any]) -> bool:
    """Whether NAME.json and NAME.npz of a folder are of this stamp."""
    if not (folder / f"{name}.npz").is_file():
        return False
    return _stamped(folder / f"{name}.json", now) is not None


class KeptScores:
    """Finished scores in a cache folder, so that a run into another output folder need not compute them again."""

    def __init__(self, folder: Path):
        self.folder = folder

    def keep(self, folder: Path, name: str, now: dict[str, Any]) -> None:
        """Copy the scores that a run has just written.

        Raises:
            ValueError: if they cannot be written.
        """
        place = self.folder / _digest(now)[:32]
        _copy(folder / f"{name}.npz", place.with_suffix(".npz"))
        _copy(folder / f"{name}.json", place.with_suffix(".json"))

    def take(self, folder: Path, name: str, model: str, now: dict[str, Any]) -> bool:
        """Copy scores of this stamp to NAME.json and NAME.npz, for a model called `model`; whether there were any.

        Raises:
            ValueError: if they cannot be written.
        """
        place = self.folder / _digest(now)[:32]
        document = _stamped(place.with_suffix(".json"), now)
        if document is None or not place.with_suffix(".npz").is_file():
            return False
        _copy(place.with_suffix(".npz"), folder / f"{name}.npz")
        write_json(folder / f"{name}.json", {**document, "name": model})
        (folder / f"{name}.failed.json").unlink(missing_ok=True)
        return True


def _stamped(path: Path, now: dict[str, Any]) -> dict[str, Any] | None:
    """A score file of this stamp; None for one that is not there, damaged or of another."""
    if not path.is_file():
        return None
    try:
        document = read_json(path)
        return document if document.get("stamp") == now else None
    except (ValueError, AttributeError):  # damaged: done again
        return None


def _copy(source: Path, target: Path) -> None:
    with replaced(target) as beside:
        shutil.copyfile(source, beside)


def _files_state(path: Path, below: bool = True) -> list[Any]:
    """Name, size and time of a file, of all files in a folder (and below it), or of those that a pattern matches."""
    if path.is_dir():
        files = sorted(item for item in path.glob("**/*" if below else "*") if item.is_file())
    else:
        files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path)))]
    states = [(file.absolute(), file.stat()) for file in files]
    return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    """As it comes back from a JSON file: lists for tuples, strings for the keys."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
