"""What a model folder may hold on the Hub: which files go there, that none is missing or cut off, and that nothing goes
there that should not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MODEL_TYPE = "m2_encoder"
MODEL_FILES = re.compile(
    r"config\.json|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
    r"|(pre)?processor_config\.json|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json"
    r"|modules\.json|sentence_bert_config\.json|config_sentence_transformers\.json"
    r"|\d+_\w+/(config\.json|model\.safetensors)|onnx/[\w-]+\.onnx(_data)?|LICENSE(\.txt|\.md)?"
)
REQUIRED = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
            "tokenizer_config.json", "modules.json", "config_sentence_transformers.json")  # fmt: skip
# Made anew for every upload, or of no use to anybody else.
MADE_HERE = re.compile(r"README\.md|handler\.py|requirements\.txt|example\.png|\.eval_results/.*|\.gitattributes")
LEFT_OUT = re.compile(r"(.*/)?(\.git|\.cache|__pycache__|\.ipynb_checkpoints)/.*|(.*/)?\.DS_Store")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
# Names of files that hold secrets, and what secrets look like inside of files: tokens of the Hub, GitHub, AWS, OpenAI
# and the like, and private keys.
SECRET_NAMES = re.compile(
    r"(.*/)?(\.env(\..*)?|\.netrc|\.git-credentials|\.npmrc|\.pypirc|token|stored_tokens|id_(rsa|ed25519|ecdsa)"
    r"|credentials(\.\w+)?|.*\.(pem|key|p12|pfx))"
)
SECRETS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{50,}"
    rb"|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{32,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# Text that is searched for secrets; weights are numbers, and too large to read once more.
TEXTS = (".json", ".py", ".md", ".txt", ".yaml", ".yml", "")


@dataclass(frozen=True)
class Contents:
    """The files of a model folder."""

    files: dict[str, Path]
    """Path in the repository -> file, what goes to the Hub as it is."""
    left_out: dict[str, str]
    """Path in the folder -> why it does not go."""


def read_contents(folder: str | Path, *, token: str | None = None) -> Contents:
    """Looks through a model folder and refuses one that is not fit to be published.

    Args:
        token: a secret that no file may hold, whatever it looks like.

    Raises:
        ValueError: for no model folder, pickles, strange files, links that lead out of it, secrets, missing or damaged
            files; the message names the file and what to do.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"No model folder at {folder}: it has no config.json.")
    code = _code_files(folder, read_config(folder))
    files, left_out, strange = {}, {}, []
    for name, path in _walk(folder):
        if LEFT_OUT.fullmatch(name):
            left_out[name] = "of no use to others"
        elif SECRET_NAMES.fullmatch(name):
            raise ValueError(f"{path} looks like a secret by its name: move it out of the model folder.")
        elif path.suffix in PICKLES:
            raise ValueError(
                f"{path}: only safetensors are published, since pickles can run code when they are loaded. Save the "
                "model again with save_pretrained, or move this file away."
            )
        elif MADE_HERE.fullmatch(name):
            left_out[name] = "made anew from model_cards/"
        elif MODEL_FILES.fullmatch(name) or name in code:
            files[name] = path
        else:
            strange.append(name)
    if strange:
        raise ValueError(
            f"{folder} holds files that are no part of a model: {', '.join(sorted(strange)[:10])}. Move them away."
        )
    _refuse_secrets(files, token)
    _require(folder, files, code)
    check_weights(folder)
    return Contents(files, left_out)


def refuse_secret(name: str, content: bytes, token: str | None) -> None:
    """Raises ValueError for a text in which a token or a private key stands."""
    if SECRETS.search(content) or (token and token.encode() in content):
        raise ValueError(f"{name} holds what looks like a token or a private key: take it out, and revoke it.")


def check_weights(folder: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors of a folder, name -> (shape, dtype), after a look at every file and at the index of several.

    Raises:
        ValueError: for weights that are missing, cut off, doubled, or not what the index says.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if not index.is_file():
        if shards:
            raise ValueError(f"{folder} has {shards[0]} but no {index.name}: copy the folder again, whole.")
        return _tensors(folder / "model.safetensors")
    if (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} has model.safetensors and {index.name}: which one is the model? Remove the other.")
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{index} has no weight_map that names a file for each tensor: copy the folder again, whole.")
    named = set(where.values())
    if missing := sorted(named - set(shards)):
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names.")
    if extra := sorted(set(shards) - named):
        raise ValueError(f"{folder} has {', '.join(extra)}, which {index.name} does not name: left over from before?")
    found = {}
    for name in sorted(named):
        own = _tensors(folder / name)
        if set(own) != {tensor for tensor, shard in where.items() if shard == name}:
            raise ValueError(f"{folder / name} does not hold the tensors that {index.name} says.")
        found |= own
    return found


def model_facts(folder: str | Path) -> dict[str, Any]:
    """What a card says of a model, from its own files: `parameters` (without the heads of pretraining), `scale` =
    exp(logit_scale), `dtype`, `weight_size`, `onnx` files, and the entries of config.json.

    Raises:
        ValueError: as `check_weights`, and for a model of another kind.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = check_weights(folder)
    names = model_tensors(folder)
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    return {
        **config,
        "parameters": _amount(sum(math.prod(tensors[name][0]) for name in names if name in tensors)),
        "scale": f"{_logit_scale(folder):.1f}",
        "dtype": str(config.get("dtype") or "float32"),
        "weight_size": f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB",
        "onnx": sorted(f"onnx/{path.name}" for path in folder.glob("onnx/*.onnx")),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Raises ValueError for a model of another kind."""
    config = _read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder} holds a model of type {config.get('model_type')!r}, not {MODEL_TYPE!r}.")
    return config


def model_tensors(folder: Path) -> list[str]:
    """The names in the state dict of the model that `AutoModel` makes of this folder."""
    import torch

    from modeling_m2encoder import M2EncoderConfig, M2EncoderModel

    with torch.device("meta"):
        return list(M2EncoderModel(M2EncoderConfig.from_pretrained(folder)).state_dict())


def open_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, a function that reads it) of every tensor, file by file."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                yield name, lambda file=file, name=name: file.get_tensor(name)


def _logit_scale(folder: Path) -> float:
    for name, read in open_tensors(folder):
        if name == "logit_scale":
            return math.exp(read().float().item())
    raise ValueError(f"{folder} has no logit_scale: a card needs the whole model, not half of it.")


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path in the folder, file) of every file; links to files inside the folder stand for what they point to."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            target = path.resolve()
            if not target.is_relative_to(root) or not target.exists():
                raise ValueError(f"{path} is a link to {target}, outside of the folder: put a copy in its place.")
            if target.is_dir():
                raise ValueError(f"{path} is a link to a folder: put a copy in its place.")
        if path.is_dir():
            continue
        if not path.is_file():
            raise ValueError(f"{path} is no regular file: move it away.")
        yield name, path


def _refuse_secrets(files: dict[str, Path], token: str | None) -> None:
    for path in files.values():
        if path.suffix in TEXTS:
            refuse_secret(str(path), path.read_bytes(), token)


def _require(folder: Path, files: dict[str, Path], code: list[str]) -> None:
    wanted = [*REQUIRED, *code]
    if "modules.json" in files:
        modules = _read_json(files["modules.json"], list)
        if not all(isinstance(module, dict) for module in modules):
            raise ValueError(f"{files['modules.json']} must be a list of objects.")
        wanted += [f"{module['path']}/config.json" for module in modules if module.get("path")]
    missing = [name for name in dict.fromkeys(wanted) if name not in files]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}: modeling_m2encoder.hub_folder.save_hub_folder writes whole folders."
        )
    empty = [name for name, path in files.items() if path.stat().st_size == 0]
    if empty:
        raise ValueError(f"{folder}: {', '.join(empty)} is empty.")
    for name, path in files.items():
        if name.endswith(".json"):
            _read_json(path, list if name == "modules.json" else dict)


def _code_files(folder: Path, config: dict[str, Any]) -> list[str]:
    """What `trust_remote_code=True` reads: the modules that the auto maps name, and what those import in turn."""
    if not config.get("auto_map"):
        raise ValueError(f"{folder / 'config.json'} has no auto_map, so nobody could load it from the Hub.")
    waiting, names = [], []
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            waiting += _mapped_modules(folder / name)
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.append(name)
            if (folder / name).is_file():
                text = _read_text(folder / name)
                waiting += [f"{module}.py" for module in re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)]
    return sorted(names)


def _mapped_modules(path: Path) -> list[str]:
    """{"AutoModel": "modeling_x.Model", "AutoTokenizer": [null, "tokenization_x.Fast"]} -> their files."""
    found = _read_json(path).get("auto_map") or {}
    values = found.values() if isinstance(found, dict) else [found]
    entries = [entry for value in values for entry in (value if isinstance(value, list) else [value]) if entry]
    if not isinstance(found, dict) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{path}: auto_map must name classes, as in modeling_m2encoder.M2EncoderModel, not {found!r}.")
    return [f"{entry.split('.')[0]}.py" for entry in entries]


def _tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}.")
    try:
        with safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off: {error}.") from error


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        document = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(document, kind):
        raise ValueError(f"{path} must hold {'an object' if kind is dict else 'a list'}, not {document!r:.80}.")
    return document


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


def _amount(number: int) -> str:
    """1586561 -> "1.6 M"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
