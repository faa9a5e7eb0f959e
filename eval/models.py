"""Every system that can be measured, behind one adapter of three methods.

    adapter = load("runs/quickstart/model")                                  # ours, or a converted official checkpoint
    adapter = load("OFA-Sys/chinese-clip-vit-base-patch16", dtype="bfloat16")   # a model of transformers on the Hub
    adapter = load("open_clip:ViT-g-14/laion2b_s34b_b88k")                   # a model of open_clip
    image_embeds, text_embeds = adapter.encode_images(images), adapter.encode_texts(["a dog", "一只狗"])

What differs between the families (padding, text length, masks, letter case, where the embedding is) stands in FAMILIES,
as each of them was trained. Letters: n images or texts, L text tokens, E embedding size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoProcessor

import modeling_m2encoder  # noqa: F401  registers the classes
from modeling_m2encoder.image_processing_m2encoder import to_rgb

from .fingerprints import code_fingerprint, fingerprint, processor_fingerprint, versions, weights_fingerprint
from .systems import systems

DTYPES = ("float32", "bfloat16", "float16")

# OSError: no such file, repository or revision, no network; the others: files that are not what they are called.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)

TextRule = Literal["as is", "lower", "lower, straight quotes"]
TEXT_RULES: dict[str, Callable[[str], str]] = {
    "as is": lambda text: text,
    "lower": str.lower,
    # `_preprocess_text` of Chinese-CLIP, which the official M2-Encoder script applies too (eval_retrieval.py).
    "lower, straight quotes": lambda text: text.lower().replace("“", '"').replace("”", '"'),
}


class Adapter(Protocol):
    """A system under test. Anything with these three methods can be measured."""

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """n images of any mode -> [n, E] of a floating type, on any device, not normalised."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """n texts of any length -> [n, E] of a floating type, on any device, not normalised."""

    def describe(self) -> dict[str, Any]:
        """What was measured, for JSON. At least `name`, and `fingerprint`: a hex string that changes whenever the
        embeddings can."""


@dataclass(frozen=True)
class Family:
    """How texts are prepared for the models of one `model_type`, and where their embeddings are."""

    padding: bool | str = True
    """True: to the longest text of the batch, where a mask or causality makes padding harmless."""
    max_length: int | None = None
    """Tokens; None for what the tokenizer says."""
    mask: bool = True
    """Whether the model was trained with padding masked."""
    text_rule: TextRule = "as is"
    first_token: bool = False
    """Whether `pooler_output` is a sequence [n, L, E] of which the first token is the embedding."""


FAMILIES: dict[str, Family] = {
    "m2_encoder": Family(),
    "clip": Family(max_length=77),
    "metaclip_2": Family(max_length=77),
    # Longer texts are outside of what was trained, though the position table is longer: Chinese-CLIP 52 (its issue 15:
    # other lengths give other numbers), AltCLIP 77 (arXiv 2211.06679), FLAVA 77 (its zero-shot code), ALIGN 64.
    "chinese_clip": Family(max_length=52, text_rule="lower, straight quotes"),
    "altclip": Family(max_length=77),
    "flava": Family(max_length=77, first_token=True),
    "align": Family(max_length=64),
    # Trained on texts padded to 64 without a mask, pooled at the last position. SigLIP's own tokenizer lowers the case
    # (and drops punctuation); the Gemma tokenizer of SigLIP 2 may not, and that model has seen lower case only.
    "siglip": Family(padding="max_length", max_length=64, mask=False, text_rule="lower"),
    "siglip2": Family(padding="max_length", max_length=64, mask=False, text_rule="lower"),
}


class TransformersAdapter:
    """A model of transformers (or of ours) with `get_image_features` and `get_text_features`, and its processor."""

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        *,
        name: str,
        family: Family,
        revision: str | None = None,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.processor, self.name, self.family = model, processor, name, family
        self.revision, self.autocast = revision, autocast

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """n images -> [n, E].

        Raises:
            ValueError: for an image that the processor refuses.
        """
        # Not through the whole processor: some (Siglip2Processor) put defaults of their own before the checkpoint's.
        prepare = getattr(self.processor, "image_processor", self.processor)
        inputs = prepare(images=[to_rgb(image) for image in images], return_tensors="pt")
        return self._embed(self.model.get_image_features, inputs)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """n texts -> [n, E]; longer texts than the model takes are cut by its tokenizer."""
        rule = TEXT_RULES[self.family.text_rule]
        limit = {} if self.family.max_length is None else {"max_length": self.family.max_length}
        settings = {"padding": self.family.padding, "truncation": True, "return_tensors": "pt", **limit}
        tokenize = getattr(self.processor, "tokenizer", self.processor)
        inputs = dict(tokenize(text=[rule(text) for text in texts], **settings))
        if not self.family.mask:
            inputs.pop("attention_mask", None)
        return self._embed(self.model.get_text_features, inputs)

    def describe(self) -> dict[str, Any]:
        """See the keys; `parameters` is a number, `weights` and `preprocessing` are hashes of their content."""
        parameter = next(self.model.parameters())
        tokenizer = getattr(self.processor, "tokenizer", None)
        about = {
            "name": self.name,
            "revision": self.revision,
            "class": type(self.model).__name__,
            "model_type": getattr(getattr(self.model, "config", None), "model_type", None),
            "dtype": _dtype_name(parameter.dtype),
            "autocast": None if self.autocast is None else _dtype_name(self.autocast),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "max_text_length": self.family.max_length or getattr(tokenizer, "model_max_length", None),
            "padding": self.family.padding,
            "text_rule": self.family.text_rule,
            **self._hashes,
            "library": versions("torch", "transformers", "tokenizers", "pillow", "numpy"),
        }
        # The name is left out: a copy of a folder is the same model.
        key = {name: value for name, value in about.items() if name not in ("name", "revision")}
        return {**about, "device": parameter.device.type, "fingerprint": fingerprint(key)}

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {
            "weights": weights_fingerprint(self.model),
            "preprocessing": processor_fingerprint(self.processor),
            "code": code_fingerprint(self.model, self.processor),
        }

    def _embed(self, features: Callable[..., Any], inputs: Any) -> torch.Tensor:
        parameter = next(self.model.parameters())
        moved = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        mixed = torch.autocast(parameter.device.type, self.autocast) if self.autocast else nullcontext()
        with _inference(self.model), mixed:
            output = features(**moved)
        pooled = output if isinstance(output, torch.Tensor) else output.pooler_output  # remote code may still return it
        return pooled[:, 0] if self.family.first_token else pooled


def adapt(
    model: torch.nn.Module, processor: Any, *, name: str = "model", autocast: torch.dtype | None = None
) -> TransformersAdapter:
    """An adapter for a model in memory, for example in the middle of its training: on its device and in its dtype.

    It is evaluated without dropout and left in the mode it was in. `describe` hashes the weights once, at its first
    call: make a new adapter when they have changed.

    Args:
        model: with `get_image_features` and `get_text_features`; of a `model_type` that is not in FAMILIES, texts are
            padded to the longest and cut where the tokenizer says.
        autocast: run under autocast in this dtype.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return TransformersAdapter(
        model, processor, name=name, family=FAMILIES.get(model_type, Family()), autocast=autocast
    )


def load(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    revision: str | None = None,
    autocast: str | None = None,
    text_rule: TextRule | None = None,
    trust_remote_code: bool = False,
) -> Adapter:
    """The adapter of a model folder, a Hub id, `open_clip:ARCHITECTURE/WEIGHTS`, or a system of systems.yaml.

    Args:
        name_or_path: a folder that `from_pretrained` loads, a model id of the Hub, or after `open_clip:` what
            `open_clip.list_pretrained()` lists with a slash between, or `hf-hub:ORG/NAME`, or `local-dir:FOLDER`; or a
            name such as CN-CLIP-1B, which stands for a model at its checked revision.
        dtype: of the weights, and so of the whole computation: "float32", "bfloat16" or "float16". Scores are computed
            in fp32 in any case.
        device: the accelerator of this process (LOCAL_RANK, if several were launched), else the CPU, if left out.
        revision: a branch, tag or commit of the Hub; ORG/NAME@REVISION says the same.
        autocast: "bfloat16" or "float16" for mixed precision: weights stay in `dtype`, products are in this one.
        text_rule: what is done to texts instead of what the family does, see TEXT_RULES. The official M2-Encoder script
            uses "lower, straight quotes".
        trust_remote_code: run Python code that comes with the model. Never without being asked.

    Raises:
        ValueError: for what is neither; for a folder without a checkpoint, a raw training checkpoint, a kind of model
            that has no adapter, weights that are damaged or do not fit, or unknown settings.
    """
    for what, value in (("dtype", dtype), ("autocast", autocast)):
        if value not in DTYPES and not (what == "autocast" and value is None):
            raise ValueError(f"{what} is one of {', '.join(DTYPES)}, not {value!r}.")
    if text_rule is not None and text_rule not in TEXT_RULES:
        raise ValueError(f"text_rule is one of {', '.join(map(repr, TEXT_RULES))}, not {text_rule!r}.")
    name = str(name_or_path)
    if name in systems() and not Path(name).exists():
        name, checked = systems()[name].loadable()
        revision = revision or checked
    where = torch.device(device) if device is not None else _own_device()
    mixed = None if autocast is None else getattr(torch, autocast)
    if name.startswith("open_clip:"):
        from .open_clip_adapter import load_open_clip

        if revision or text_rule:
            raise ValueError(f"{name}: open_clip takes no revision and has its own text rules.")
        return load_open_clip(name.removeprefix("open_clip:"), dtype=dtype, device=where, autocast=mixed)
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        _check_folder(path)
        name, revision = str(path), None
    elif revision is None and "@" in name:
        name, _, revision = name.partition("@")
    config = _read(name, AutoConfig.from_pretrained, name, revision=revision, trust_remote_code=trust_remote_code)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name} is a {config.model_type!r}; there are adapters for {', '.join(FAMILIES)}, open_clip:..."
        )
    family = FAMILIES[config.model_type]
    commit = getattr(config, "_commit_hash", None)  # so that all files are of one state of the repository
    model, processor = _load_parts(name, config, commit or revision, getattr(torch, dtype), trust_remote_code)
    return TransformersAdapter(
        model.to(where).eval(),
        processor,
        name=name,
        family=family if text_rule is None else replace(family, text_rule=text_rule),
        revision=commit or revision,
        autocast=mixed,
    )


def _load_parts(
    name: str, config: Any, revision: str | None, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[torch.nn.Module, Any]:
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model, report = _read(
        name, AutoModel.from_pretrained, name, config=config, dtype=dtype, output_loading_info=True, **options
    )
    # transformers fills what it does not find with random numbers, and only warns.
    absent = sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise ValueError(
            f"{name} lacks {len(absent)} of the weights of {type(model).__name__}, e.g. {absent[0]}: its scores would "
            "be those of random numbers."
        )
    # PIL even where torchvision is installed: published numbers must not depend on what else is on a machine.
    return model, _read(name, AutoProcessor.from_pretrained, name, backend="pil", **options)


def _check_folder(path: Path) -> None:
    """Raises ValueError for a path that is no folder with a config.json, and says what would be one."""
    advice = (
        "Convert an official checkpoint first (python -m conversion.convert --help), and name the folder it writes."
    )
    if path.is_file():
        raise ValueError(f"{path} is a file; a model is a folder with config.json. {advice}")
    if not path.is_dir():
        raise ValueError(f"No checkpoint at {path} (no folder): config.json and the weights are needed.")
    if not (path / "config.json").is_file():
        held = sorted(item.name for item in path.iterdir())
        raw = any(item.endswith((".ckpt", ".pt", ".pth")) for item in held)
        seen = f"it holds {', '.join(held[:20])}" if held else "it is empty"
        raise ValueError(
            f"No checkpoint at {path} ({seen}): config.json and the weights are needed.{' ' + advice if raw else ''}"
        )


def _read(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a loader of transformers; what it raises for files that are absent, damaged or foreign is a ValueError."""
    try:
        return function(*args, **options)
    # OSError: no such file, repository or revision, no network; the others: files that are not what they are called.
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


def _own_device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout; a training loop's model is in training mode again afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
