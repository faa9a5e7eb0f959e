"""A Hub folder -> ONNX graphs of its two towers, for onnxruntime, transformers.js and whatever else runs ONNX.

python -m conversion.export MODEL_DIR                # writes MODEL_DIR/onnx
python -m conversion.export MODEL_DIR --output DIR   # writes a folder that holds only what transformers.js reads

Every graph is run in onnxruntime and compared with torch before it gets its name (docs/export.md has the figures).

Shapes: B batch, L text tokens, S image side in pixels, E embedding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, PreTrainedModel

from modeling_m2encoder import M2EncoderConfig, M2EncoderTextModel, M2EncoderVisionModel
from modeling_m2encoder.hub_folder import complete_or_absent
from modeling_m2encoder.modeling_m2encoder import M2EncoderOutput

# What `pip install "m2encoder[export]"` brings and this file needs.
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# A protobuf, and so an .onnx file, must stay below 2 GiB; the rest is left for the graph itself.
LARGEST_FILE = 2 * 2**30 - 64 * 2**20
# Largest difference between onnxruntime and torch, in parts of the largest element of torch's embeddings.
TOLERANCE = 1e-4
# Smallest cosine between an embedding of the int8 graph and torch's.
INT8_COSINE = 0.95
# Gather is the word embedding, half of the text tower. Conv stays in fp32: onnxruntime has no int8 kernel for it on
# the CPU, and the patch embedding is small.
INT8_OPS = ["MatMul", "Gemm", "Gather"]


class _TextTower(M2EncoderTextModel):
    """The text half with one output, so that the graph holds nothing else; it takes texts of any length."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> M2EncoderOutput:
        # The model cuts long texts behind an `if`, which tracing would drop: here the cut is made always. It belongs
        # into the graph, because transformers.js cuts the wrong end of a text, and its end token.
        limit, length = self.config.max_text_length, input_ids.shape[1]
        first = (attention_mask.sum(dim=1, keepdim=True) - (limit - 1)).clamp(min=1)
        kept = first + torch.arange(torch.sym_min(length, limit) - 1, device=input_ids.device)
        kept = torch.cat([torch.zeros_like(first), kept], dim=1)
        inputs = input_ids.gather(1, kept), attention_mask.gather(1, kept)
        return M2EncoderOutput(text_embeds=super().forward(*inputs).text_embeds)


class _VisionTower(M2EncoderVisionModel):
    """The vision half with one output."""

    def forward(self, pixel_values: Tensor) -> M2EncoderOutput:
        return M2EncoderOutput(image_embeds=super().forward(pixel_values).image_embeds)


@dataclass(frozen=True)
class Tower:
    """One half of the model: its file name (transformers.js' own), its class, the names of its only output and of what
    changes from call to call, and what transformers.js reads to prepare its inputs."""

    name: str
    model_class: type[PreTrainedModel]
    output: str
    dynamic_shapes: dict[str, dict[int, str]]
    prepared_by: tuple[str, ...]


TOWERS = {
    "M2EncoderTextModel": Tower(
        "text_model",
        _TextTower,
        "text_embeds",
        {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}},
        ("tokenizer.json", "tokenizer_config.json"),
    ),
    "M2EncoderVisionModel": Tower(
        "vision_model", _VisionTower, "image_embeds", {"pixel_values": {0: "batch"}}, ("preprocessor_config.json",)
    ),
}


def export(
    model_dir: str | Path, output: str | Path | None = None, *, largest_file: int = LARGEST_FILE
) -> dict[str, float]:
    """Writes `onnx/text_model.onnx`, `onnx/vision_model.onnx` and their int8 versions (`*_quantized.onnx`).

    Inputs are `input_ids` and `attention_mask` [B, L] (int64; texts longer than `max_text_length` lose their
    beginning, as in torch) or `pixel_values` [B, 3, S, S] (float32); B and L may change from call to call. The only
    output is `text_embeds` or `image_embeds` [B, E] (float32), L2-normalised.

    Args:
        model_dir: a Hub folder with both halves, or with one of them, which is then the only one written.
        output: a new folder, which gets `onnx/` and what transformers.js reads beside it; `model_dir` itself by
            default.
        largest_file: graphs with more bytes of weights keep them in `<name>.onnx_data`, and `config.json` says so to
            transformers.js.

    Returns:
        For each graph how it agrees with torch: fp32 the largest relative difference, int8 the smallest cosine.

    Raises:
        ImportError: without the packages of the `export` extra.
        ValueError: when `model_dir` is no Hub folder of this model, or half of one; when `output` or `onnx/` exists;
            when a graph does not agree with torch. Nothing is written then.
        OSError: when the disk is full.
    """
    _check_packages()
    model_dir = Path(model_dir)
    towers = _towers(model_dir)
    config_file = model_dir / "config.json"
    with ExitStack() as stack:
        if output is None:
            onnx_dir = stack.enter_context(complete_or_absent(model_dir / "onnx"))
        else:
            onnx_dir = stack.enter_context(complete_or_absent(output)) / "onnx"
        onnx_dir.mkdir(parents=True)
        agreement: dict[str, float] = {}
        for tower in towers:
            agreement |= _export_tower(tower, model_dir, onnx_dir, largest_file)
        config = _javascript_config(config_file, onnx_dir)
        if output is None:
            # Leaves the stack first: a config that names data which is not there yet harms nobody.
            config_file = stack.enter_context(complete_or_absent(config_file, replace=True))
        else:
            config_file = onnx_dir.with_name("config.json")
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _prepare_inputs(towers, model_dir, None if output is None else onnx_dir.parent)
    return agreement


def _check_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'The export needs {", ".join(missing)}: install the extra with pip install -e ".[export]" '
            "(or the packages themselves)."
        )


def _towers(model_dir: Path) -> list[Tower]:
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"No Hub folder at {model_dir}: it has no config.json.")
    config = AutoConfig.from_pretrained(model_dir)
    if config.model_type != M2EncoderConfig.model_type:
        raise ValueError(
            f"{model_dir} holds a model of type {config.model_type!r}, not {M2EncoderConfig.model_type!r}."
        )
    only = [TOWERS[name] for name in config.architectures or [] if name in TOWERS]
    if only:
        print(f"{model_dir} holds a {config.architectures[0]}: only {only[0].name} is written.")
    return only or list(TOWERS.values())


def _prepare_inputs(towers: list[Tower], model_dir: Path, copy_to: Path | None) -> None:
    """Copies the files that transformers.js prepares inputs with, and says which are not there."""
    names = [name for tower in towers for name in tower.prepared_by]
    missing = [name for name in names if not (model_dir / name).is_file()]
    if missing:
        print(
            f"WARNING: {model_dir} has no {', '.join(missing)}, which transformers.js reads. "
            "modeling_m2encoder.hub_folder.save_hub_folder writes complete folders.",
            file=sys.stderr,
        )
    if copy_to is not None:
        for name in set(names) - set(missing):
            shutil.copyfile(model_dir / name, copy_to / name)


def _javascript_config(config_file: Path, onnx_dir: Path) -> dict[str, Any]:
    """config.json with a list of the graphs whose weights lie beside them: transformers.js looks for no others."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    settings = config.pop("transformers.js_config", {})
    settings.pop("use_external_data_format", None)
    beside = {path.name.removesuffix("_data"): True for path in sorted(onnx_dir.glob("*.onnx_data"))}
    if beside:
        settings["use_external_data_format"] = beside
    return {**config, "transformers.js_config": settings} if settings else config


# ---- One tower -----------------------------------------------------------------------------------------------------


def _export_tower(tower: Tower, model_dir: Path, onnx_dir: Path, largest_file: int) -> dict[str, float]:
    model = _load(tower, model_dir)
    cases = list(_cases(model.config, tower))
    expected = [_torch_embeds(model, tower, case) for case in cases]
    program = _trace(model, tower)
    del model  # the graph holds the weights from here on
    agreement = {}
    name = f"{tower.name}.onnx"
    _save(program, onnx_dir / name, largest_file)
    agreement[name] = _check_exact(name, _onnx_embeds(onnx_dir / name, tower, cases), expected)
    name = f"{tower.name}_quantized.onnx"
    _save(_quantize(program), onnx_dir / name, largest_file)
    agreement[name] = _check_int8(name, _onnx_embeds(onnx_dir / name, tower, cases), expected)
    return agreement


def _load(tower: Tower, model_dir: Path) -> PreTrainedModel:
    """The half in fp32, whatever it is stored in; incomplete weights are refused instead of made up."""
    try:
        model, report = tower.model_class.from_pretrained(model_dir, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, SafetensorError) as error:  # the names of wrong shapes, and of a file that is cut off
        raise ValueError(f"{model_dir} does not hold weights that fit its config.json: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{model_dir} does not hold the whole {tower.name}: {', '.join(missing)} are missing.")
    return model.eval()


def _trace(model: PreTrainedModel, tower: Tower) -> Any:
    """The graph as an `onnx_ir.Model`, fp32."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from transformers.exporters import OnnxConfig, OnnxExporter

    dims = {name: torch.export.Dim(name, min=1) for name in ("batch", "length")}
    shapes = {key: {i: dims[name] for i, name in axes.items()} for key, axes in tower.dynamic_shapes.items()}
    # Neither 1 nor a size of the model, which the tracer might take for a constant.
    sample = _text_inputs(model.config, [7, 3]) if tower.output == "text_embeds" else _image_inputs(model.config, 2)
    # Deferred, or a guard that no length of 1 may come refuses the trace; that 1 works is verified afterwards.
    config = OnnxConfig(dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True)
    with redirect_stdout(sys.stderr):  # torch reports its progress
        program = OnnxExporter().export(model, sample, config=config).program
    # Every node carries the stack of the Python that made it: more bytes than a small model, and paths of this machine.
    ClearMetadataAndDocStringPass()(program)
    _name_dimensions(program, tower)
    return program


def _name_dimensions(program: Any, tower: Tower) -> None:
    """Calls the free dimensions `batch` and `length`; the tracer's own names for them are numbers."""
    import onnx_ir

    graph = program.graph
    names = {
        value.shape[axis]: name for value in graph.inputs for axis, name in tower.dynamic_shapes[value.name].items()
    }
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(size, size) for size in value.shape])


def _quantize(program: Any) -> Any:
    """Weights in int8, one scale per output channel; activations are quantised at run time, so nothing is calibrated.

    Weights use 7 of the 8 bits: with all of them, pairs of products overflow the 16 bits that x86 processors without
    VNNI add them in, and the cosine with torch falls from 0.999 to 0.93.
    """
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.configs import ExportFormat

    config = OnnxRuntimeDynamicConfig(op_types_to_quantize=INT8_OPS, per_channel=True, reduce_range=True)
    return OnnxRuntimeQuantizer(config).quantize(program, {}, ExportFormat.ONNX)


def _save(program: Any, path: Path, largest_file: int) -> None:
    import onnx_ir

    size = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    onnx_ir.save(program, path, external_data=f"{path.name}_data" if size > largest_file else None)


# ---- Against torch -------------------------------------------------------------------------------------------------


def _text_inputs(config: M2EncoderConfig, lengths: list[int]) -> dict[str, Tensor]:
    """Random texts of these lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def _image_inputs(config: M2EncoderConfig, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.rand(shape, generator=generator) * 2 - 1}


def _cases(config: M2EncoderConfig, tower: Tower) -> Iterator[dict[str, Tensor]]:
    """Other sizes than the traced one: a single token, the longest text, ragged batches, a text that is too long; one
    and three images."""
    if tower.output == "image_embeds":
        yield from (_image_inputs(config, batch) for batch in (1, 3))
    else:
        limit = config.max_text_length
        batches = ([1], [limit], [limit, 1, limit // 2], [2, 5, 4, 3], [limit + 9, limit + 1, 4])
        yield from (_text_inputs(config, lengths) for lengths in batches)


@torch.no_grad()
def _torch_embeds(model: PreTrainedModel, tower: Tower, inputs: dict[str, Tensor]) -> Tensor:
    # The published class, not the traced one: what is added for tracing is verified too.
    return super(tower.model_class, model).forward(**inputs)[tower.output]


def _onnx_embeds(path: Path, tower: Tower, cases: list[dict[str, Tensor]]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = [{name: tensor.numpy() for name, tensor in inputs.items()} for inputs in cases]
    return [torch.from_numpy(session.run([tower.output], feed)[0]) for feed in feeds]


def _check_exact(name: str, seen: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(seen, expected, strict=True)
    # torch's max, because Python's overlooks a NaN behind a number
    difference = torch.stack([(ours - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs]).max().item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"Verification failed: {name} differs from torch by {difference:.1e} ({TOLERANCE:.0e} allowed)."
        )
    print(f"{name}: differs from torch by {difference:.1e} of the largest element ({TOLERANCE:.0e} allowed).")
    return difference


def _check_int8(name: str, seen: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(seen, expected, strict=True)
    cosine = torch.stack([cosine_similarity(ours, theirs).min() for ours, theirs in pairs]).min().item()
    if not cosine >= INT8_COSINE:
        raise ValueError(f"Verification failed: {name} has cosine {cosine:.4f} with torch ({INT8_COSINE} asked for).")
    print(f"{name}: cosine with torch at least {cosine:.4f} ({INT8_COSINE} asked for).")
    return cosine


# ---- Command line --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The command line; a mistake of the user is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.export",
        description="Write the text and the vision tower of a Hub folder as ONNX, in fp32 and int8.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="a Hub folder; it gets a folder onnx/")
    parser.add_argument(
        "--output", metavar="DIR", help="leave MODEL_DIR alone and write a new folder for transformers.js"
    )
    args = parser.parse_args(arguments)
    # `kill` becomes an exception, so that what is half written is removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        export(args.model_dir, args.output)
        print(f"Wrote {args.output or Path(args.model_dir, 'onnx')}.")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
