"""What was measured of a model, read for its card: results.json and the cosines of pairs, held against what a card
needs and against the weights that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from conversion.hub_contents import model_tensors, open_tensors
from eval.files import read_json

NUMBER = (int, float)
# What is read of a results.json, and of the JSON of benchmarks.pair_cosines.
ABOUT = {"weights": str, "dtype": str}
BENCHMARK = {
    "name": str,
    "protocol": str,
    "counts": dict,
    "metrics": {"*": {"*": {"value": NUMBER, "chance": NUMBER}}},
}
TASK = {"name": str, "title": str, "kind": str, "data": (str, type(None)), "split": str}
RESULTS = {
    "models": [{"name": str, "about": ABOUT, "tasks": [{"task": TASK, "created": str, "benchmarks": [BENCHMARK]}]}]
}
THRESHOLD = {"threshold": NUMBER, "wrong": NUMBER, "right": NUMBER}
PAIRS = {"right": [NUMBER], "wrong": [NUMBER], "right_pairs": int, "wrong_pairs": int, "thresholds": [THRESHOLD]}
SOURCE = {"name": str, "language": str, "rows": int, "rows_from": str}
TABLE_12 = Path(__file__).parents[1] / "training" / "corpus" / "table_12.yaml"
COSINES = {"about": ABOUT, "data": str, "quantiles": [NUMBER], "languages": {"*": PAIRS}}


def read_results(results: str | Path | None) -> dict[str, Any] | None:
    """A results.json of `python -m eval`.

    Raises:
        ValueError: for a file that is damaged, or lacks what a card needs.
    """
    if results is None:
        return None
    document = read_json(Path(results))
    if not isinstance(document, dict) or not document.get("models"):
        raise ValueError(f"{results} is no results.json of `python -m eval`: it has no models.")
    return _require(document, RESULTS, str(results))


def read_cosines(folder: Path, path: str | Path | None) -> dict[str, Any] | None:
    """What `benchmarks.pair_cosines` wrote for the model in `folder`.

    Raises:
        ValueError: for a file that is damaged, lacks what a card needs, or is about other weights.
    """
    if path is None:
        return None
    document = read_json(Path(path))
    _require(document, COSINES, str(path))
    return of_these_weights(folder, [document], str(path))


def bm_6b_sources() -> list[dict[str, str]]:
    """The rows of the paper's training data, as far as they are known: training/corpus/table_12.yaml.

    Raises:
        ValueError: for a file that is damaged, or lacks an entry.
    """
    try:
        document = yaml.safe_load(TABLE_12.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{TABLE_12} is not a readable YAML file: {error}") from error
    rows = []
    for one in _require(document, {"sources": [SOURCE]}, str(TABLE_12))["sources"]:
        pairs, own = one.get("pairs_in_paper"), one.get("public", True)
        row = {
            "name": one["name"],
            "language": one["language"],
            "public": "no"
            if not own
            else "its images; the paper's new captions are not"
            if one.get("generated")
            else "yes",
            "pairs": _amount(pairs) if pairs else "see the paper's Table 12",
            "published": f"{_amount(one['rows'])} ({one['rows_from'].partition(';')[0]})" if own else "none",
        }
        rows.append(row)
        if one.get("translated"):
            rows.append(
                {**row, "name": f"{one['name']}, translated", "language": "zh", "public": "no", "published": "none"}
            )
    return rows


def _amount(number: int) -> str:
    return f"{number / 10**9:.2f} billion" if number >= 10**9 else f"{number / 10**6:.0f} million"


def _require(value: Any, wanted: Any, where: str) -> Any:
    """Holds a document against the entries that a card reads: a dict of them, [of each item], or {"*": of each value}.

    Raises:
        ValueError: naming the first entry that is missing or of another kind.
    """
    kind = wanted if isinstance(wanted, (type, tuple)) else type(wanted)
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be a {getattr(kind, '__name__', 'number')}, not {value!r:.80}: evaluate again.")
    if isinstance(wanted, list):
        for i, item in enumerate(value):
            _require(item, wanted[0], f"{where}[{i}]")
    elif isinstance(wanted, dict):
        for name, of_it in wanted.items():
            for key in value if name == "*" else [name]:
                if key not in value:
                    raise ValueError(f"{where} lacks the entry {key!r}, which a card needs: evaluate again.")
                _require(value[key], of_it, f"{where}.{key}")
    return value


def of_these_weights(folder: Path, candidates: list[dict[str, Any]], source: str) -> dict[str, Any]:
    """The candidate that was measured with the weights of this folder.

    Raises:
        ValueError: if none was: a card shows no number of another model.
    """
    import torch

    from eval.fingerprints import weights_fingerprint

    names = set(model_tensors(folder))
    known: dict[str, str] = {}
    for one in candidates:
        dtype, seen = one["about"]["dtype"], one["about"]["weights"]
        if dtype not in known:
            # As eval had them in memory: all parameters in one dtype.
            cast = getattr(torch, dtype)
            state = {name: read().to(cast) for name, read in open_tensors(folder) if name in names}
            known[dtype] = weights_fingerprint(_Stored(state))
        if seen == known[dtype]:
            return one
    raise ValueError(f"{source} was measured with other weights than those in {folder}: evaluate this folder.")


class _Stored:
    """Weights that look like a module to `weights_fingerprint`."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state_dict = lambda: state
