"""The YAML files of model_cards/: what a card says beside its numbers."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_m2encoder.configuration_m2encoder import SIZES

FOLDER = Path(__file__).parents[1] / "model_cards"
CARDS = ("nano", "0.4B", "1B", "10B", "trained")


@dataclass(frozen=True)
class CardSettings:
    """One size's YAML file over common.yaml. Texts are jinja templates."""

    name: str
    origin: str
    """published: weights of the paper's authors, converted; trained: with this code."""
    summary: str
    metadata: dict[str, Any]
    """Of the front matter: licence, base_model, widget examples."""
    license_note: str
    usage: dict[str, Any]
    limits: list[str]
    paper: dict[str, Any]
    tags: list[str]
    bm_6b: dict[str, Any]
    intended_use: list[str]
    not_intended_use: list[str]
    bias: list[str]
    system: str | None = None
    """Its row in eval/systems.yaml, whose published numbers it shows."""
    example: str | None = None
    """A picture in model_cards/ that goes into the repository."""
    paper_parameters: dict[str, Any] | None = None
    reference_scores: dict[str, Any] | None = None
    checkpoint: str | None = None
    reproduce: str | None = None


def load_settings(card: str, folder: Path = FOLDER) -> CardSettings:
    """The settings of "nano", "0.4B", "1B", "10B" or "trained".

    Raises:
        ValueError: for another name, or a file that is damaged, lacks an entry or has an unknown one.
    """
    if card not in CARDS:
        raise ValueError(f"There is no card {card!r}: choose one of {', '.join(CARDS)}.")
    path = folder / f"{card}.yaml"
    values = {**_read(folder / "common.yaml"), **_read(path)}
    known = {one.name: one for one in dataclasses.fields(CardSettings)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{path}: unknown entry {name}.{f' Did you mean {near[0]}?' if near else ''}")
    for name, one in known.items():
        if name not in values and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}: the entry {name} is missing.")
        kind = {"dict": dict, "list": list, "str": str}[str(one.type).partition("[")[0].partition(" ")[0]]
        if values.get(name) is not None and not isinstance(values[name], kind):
            raise ValueError(f"{path}: {name} must be a {kind.__name__}, not {values[name]!r}.")
    if values["origin"] not in ("published", "trained"):
        raise ValueError(f"{path}: origin must be published or trained, not {values['origin']!r}.")
    return CardSettings(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable YAML file: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must be a mapping, not {document!r}.")
    return document


def choose_card(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """Which card fits a model folder, and why.

    A training leaves its settings beside the folder (`config.json` of the run); without them a model with the measures
    of a published size is taken for the converted checkpoint.

    Raises:
        ValueError: if nothing tells what the model is.
    """
    run = training_settings(folder)
    size = next((name for name in SIZES if _has_size(config, name)), None)
    if run is not None:
        if size == "nano" and scenes_manifest(run) is not None:
            return "nano", "it has nano's measures and was trained on drawn scenes"
        return "trained", f"{folder.parent / 'config.json'} is the record of a training"
    if size in ("0.4B", "1B", "10B"):
        return size, (
            f"it has the measures of {size}, and no record of a training lies beside it: taken for the converted "
            "checkpoint; if it was fine-tuned, say --size trained"
        )
    raise ValueError(
        f"{folder} does not tell which card fits: it is no published size, and no training's config.json lies beside "
        f"it. Name one with --size: {', '.join(CARDS)}."
    )


def training_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the training that wrote a folder, from the `config.json` beside it; None if there is none.

    Raises:
        ValueError: for a record that lacks what a card says of a training.
    """
    path = folder.resolve().parent / "config.json"
    settings = _json(path)
    if not isinstance(settings, dict) or not {"data", "steps", "batch_size"} <= set(settings):
        return None
    kinds = {"data": dict, "objective": dict, "optimizer": dict, "steps": int, "batch_size": int, "seed": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(settings.get(name), kind)]
    if not wrong and not {"name", "lr", "weight_decay"} <= set(settings["optimizer"]):
        wrong = ["optimizer"]
    if wrong:
        raise ValueError(f"{path} is the record of a training, but its {wrong[0]} is {settings.get(wrong[0])!r:.80}.")
    return settings


def _json(path: Path) -> Any:
    """None for what cannot be read: the file may be anybody's."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None


def scenes_manifest(run: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the scenes that a run was trained on; None for other data, or where they are gone."""
    for pattern in run["data"].get("files", ()):
        manifest = _json(Path(pattern).parent / "manifest.json")
        if isinstance(manifest, dict) and {"version", "settings", "held_out_pairs"} <= set(manifest):
            return manifest
    return None


def _has_size(config: dict[str, Any], size: str) -> bool:
    # The vocabulary is the tokenizer's, and initialisation leaves no trace in a trained model.
    free = ("vocab_size", "initializer_range", "position_init", "num_decoder_layers")
    return all(config.get(name) == value for name, value in SIZES[size].items() if name not in free)
