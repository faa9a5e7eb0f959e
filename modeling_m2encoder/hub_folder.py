"""The Hub folder: what lies beside the weights so that every tool of the ecosystem accepts it; whole or not at all.

`save_hub_folder(model, processor, folder)` is what training exports with; `write_hub_extras(folder)` completes a
folder that holds config, weights and processor already, as the conversion of published checkpoints does. Not part of
the remote code.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_import_files

# Where `trust_remote_code=True` finds the classes. `register_for_auto_class` would keep one auto class per class only.
MODEL_CODE = {
    "AutoConfig": "configuration_m2encoder.M2EncoderConfig",
    "AutoModel": "modeling_m2encoder.M2EncoderModel",
    "AutoModelForPreTraining": "modeling_m2encoder_pretraining.M2EncoderForPreTraining",
    "AutoModelForZeroShotImageClassification": "modeling_m2encoder.M2EncoderModel",
}
PROCESSOR_CODE = {"AutoProcessor": "processing_m2encoder.M2EncoderProcessor"}
IMAGE_PROCESSOR_CODE = {
    # PIL first, torchvision second, as transformers reads the pair.
    "AutoImageProcessor": [
        "image_processing_m2encoder.M2EncoderImageProcessorPil",
        "image_processing_m2encoder.M2EncoderImageProcessor",
    ]
}

# sentence-transformers: the projected vector of either modality, normalised. Its own names since version 5.4.
SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": "sentence_embedding",
    },
    "1_Normalize/config.json": {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


@contextmanager
def complete_or_absent(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A place beside `path` for a file or a folder to be written to; it takes that name when the block ends, and
    vanishes when the block fails.

    Everything is on the disk before the name appears. A process that is killed outright leaves a hidden `.NAME.*`
    behind.

    Args:
        replace: what has that name makes way at the end; otherwise it is refused.

    Raises:
        ValueError: when `path` exists and `replace` is not set.
    """
    path = Path(path)
    if not replace and (path.exists() or path.is_symlink()):
        raise ValueError(f"{path} exists already: choose another name or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        written = beside / path.name
        yield written
        _settle(written)
        if replace and path.exists():
            path.rename(beside / "older")
        written.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _settle(written: Path) -> None:
    """Flushes everything to the disk and makes it readable: safetensors writes its files with mode 0600."""
    for path in [*written.rglob("*"), written]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_hub_folder(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | Path,
    *,
    replace: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a model and its processor as a complete Hub folder.

    Call on one process, with the model out of its wrappers.

    Args:
        folder: its name appears when everything is written.
        replace: an older folder of that name makes way; otherwise it is refused.

    Raises:
        ValueError: when `folder` exists and `replace` is not set.
    """
    with complete_or_absent(folder, replace=replace) as written:
        model.save_pretrained(written, max_shard_size=max_shard_size)
        processor.save_pretrained(written)
        write_hub_extras(written)
    return Path(folder)


def write_hub_extras(folder: str | Path) -> None:
    """Completes a folder in which `config.json` and `processor_config.json` lie, as their `save_pretrained` wrote them.

    Adds the `auto_map`s and the code they name, `preprocessor_config.json` (transformers 5 no longer writes it,
    transformers.js and older versions read nothing else) and what sentence-transformers needs, unless
    sentence-transformers wrote the folder: its own files know of prompts, `truncate_dim` and further modules.
    """
    folder = Path(folder)
    _write(folder / "config.json", {**_read(folder / "config.json"), "auto_map": MODEL_CODE})
    processor = _read(folder / "processor_config.json")
    image_processor = {**processor["image_processor"], "auto_map": IMAGE_PROCESSOR_CODE}
    _write(
        folder / "processor_config.json",
        {**processor, "image_processor": image_processor, "auto_map": PROCESSOR_CODE},
    )
    _write(
        folder / "preprocessor_config.json",
        {
            **image_processor,
            "processor_class": processor["processor_class"],
            "auto_map": {**IMAGE_PROCESSOR_CODE, **PROCESSOR_CODE},
        },
    )
    if not (folder / "modules.json").exists():
        for name, content in SENTENCE_TRANSFORMERS.items():
            (folder / name).parent.mkdir(exist_ok=True)
            _write(folder / name, content)
    for file in remote_code():
        shutil.copyfile(file, folder / file.name)


def remote_code() -> list[Path]:
    """The source files that the auto maps name, and what those import from this package."""
    entries = [*MODEL_CODE.values(), *PROCESSOR_CODE.values(), *IMAGE_PROCESSOR_CODE["AutoImageProcessor"]]
    named = {Path(__file__).with_name(f"{entry.split('.')[0]}.py") for entry in entries}
    imported = {Path(file) for module in named for file in get_relative_import_files(module)}
    return sorted(named | imported)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
