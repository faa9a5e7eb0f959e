"""A published checkpoint -> a folder that `AutoModel.from_pretrained` loads, and back.

python -m conversion.convert m2_encoder_0.4B.ckpt OUT_DIR --sp-model sp.model --verify
python -m conversion.convert HUB_DIR OUT.ckpt --reverse

Weights are read and written shard by shard, so that memory stays at 1.5 GB and one shard whatever the size
(docs/parity.md has the measurement).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedTokenizerBase

from conversion.checkpoint_file import open_checkpoint
from conversion.official_forward import OfficialModel
from conversion.tokenizer import glm_tokenizer
from conversion.weights import (
    config_from_shapes,
    match_keys,
    official_config,
    our_shapes,
    to_official,
    to_ours,
)
from modeling_m2encoder import M2EncoderConfig, M2EncoderImageProcessorPil, M2EncoderProcessor
from modeling_m2encoder.hub_folder import complete_or_absent, write_hub_extras

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What has been read of a mapped file counts as resident memory until the map is closed: it is opened anew after so
# much.
MAPPED_BYTES = 512 * 2**20
# Embeddings of the written folder against the official forward pass on the source, both in fp32 (docs/parity.md).
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Source:
    """A published checkpoint and how it becomes ours."""

    path: Path
    layout: str
    config: M2EncoderConfig
    table: dict[str, str]  # our name -> official key
    dropped: dict[str, str]  # official key -> reason
    dtypes: dict[str, torch.dtype]  # our name -> what it is written as
    bytes_read: dict[str, int]  # our name -> size in the checkpoint

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The named parameters as our model holds them, copied out of the file.

        Raises:
            ValueError: when a value does not fit into the dtype it is written as.
        """
        for group in self._groups(names):
            official, _ = open_checkpoint(self.path)
            for name in group:
                key = self.table[name]
                if self.bytes_read[name] <= MAPPED_BYTES:
                    yield name, self._converted(name, to_ours(key, official[key], self.config))
                else:
                    yield name, to_ours(key, self._in_pieces(name), self.config)

    def _groups(self, names: list[str]) -> Iterator[list[str]]:
        """Runs of names of which together at most MAPPED_BYTES are read, or single larger ones."""
        group: list[str] = []
        total = 0
        for name in names:
            if group and total + self.bytes_read[name] > MAPPED_BYTES:
                yield group
                group, total = [], 0
            group.append(name)
            total += self.bytes_read[name]
        yield group

    def _in_pieces(self, name: str) -> Tensor:
        """A tensor that is larger than what may be mapped, some rows from every map."""
        key = self.table[name]
        official, _ = open_checkpoint(self.path)
        whole = torch.empty(official[key].shape, dtype=self.dtypes[name])
        rows = max(1, MAPPED_BYTES * len(whole) // self.bytes_read[name])
        for first in range(0, len(whole), rows):
            official, _ = open_checkpoint(self.path)
            whole[first : first + rows] = self._converted(name, official[key][first : first + rows])
        return whole

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        converted = tensor.to(self.dtypes[name], copy=True).contiguous()
        if converted.dtype != tensor.dtype and _finite(tensor) and not _finite(converted):
            raise ValueError(
                f"{self.table[name]} has values up to {max(map(abs, _range(tensor))):.3g}, which {converted.dtype} "
                "cannot hold: convert to bfloat16 or float32."
            )
        return converted


def _range(tensor: Tensor) -> tuple[float, float]:
    low, high = tensor.aminmax()  # makes no copies; either is NaN when any value is
    return low.item(), high.item()


def _finite(tensor: Tensor) -> bool:
    return all(map(math.isfinite, _range(tensor)))


def convert(
    checkpoint: str | Path,
    out_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: str = "auto",
    official_config: dict[str, Any] | None = None,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
) -> None:
    """Writes `out_dir`, complete or not at all.

    Args:
        checkpoint: any of the four published layouts.
        size: "auto", or the published size that the checkpoint must have.
        official_config: the official JSON config, for any other size.
        image_size: side of the model's images in pixels; the position table is resized.
        dtype: of the written weights; as in the checkpoint by default.
        verify: load the folder again and compare it with the checkpoint before it gets its name.

    Raises:
        ValueError: for a checkpoint that is not one, is of another model or size, or does not fit; when `out_dir`
            exists; when the verification fails.
        OSError: when the disk is full.
    """
    out_dir = Path(out_dir)
    with complete_or_absent(out_dir) as folder:
        folder.mkdir()
        source = recognise(checkpoint, size, official_config, image_size, dtype)
        _say_what_was_found(source)
        _check_space(source, folder)
        _write_weights(source, folder, max_shard_size)
        _write_rest(source.config, tokenizer, folder)
        if verify:
            verify_folder(folder, source)
    print(f"Wrote {out_dir}.")


def recognise(
    checkpoint: str | Path,
    size: str = "auto",
    official_config: dict[str, Any] | None = None,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Source:
    """Recognises a checkpoint by its keys and shapes, without reading its values; arguments and errors as `convert`."""
    official, layout = open_checkpoint(checkpoint)
    shapes = {key: tuple(tensor.shape) for key, tensor in official.items()}
    config = config_from_shapes(shapes, size=size, official_config=official_config, image_size=image_size)
    table, dropped = match_keys(shapes, config)
    integers = [key for key in table.values() if not official[key].is_floating_point()]
    if integers:
        raise ValueError(f"{checkpoint}: {', '.join(integers)} must be floating-point numbers (quantised weights?).")
    config.architectures = ["M2EncoderModel"]
    config.dtype = dtype or official[table["encoder.text_embeddings.word_embeddings.weight"]].dtype
    dtypes = {name: dtype or official[key].dtype for name, key in table.items()}
    bytes_read = {name: official[key].nbytes for name, key in table.items()}
    return Source(Path(checkpoint), layout, config, table, dropped, dtypes, bytes_read)


def _say_what_was_found(source: Source) -> None:
    config, shapes = source.config, our_shapes(source.config)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    print(
        f"{source.path}: {source.layout} layout, {config.num_hidden_layers} + {config.num_upper_layers} layers of "
        f"width {config.hidden_size}, images of {config.image_size} pixels, {count / 1e6:.1f}M parameters, "
        f"{config.dtype}."
    )
    for reason, number in Counter(source.dropped.values()).items():
        first = next(key for key, why in source.dropped.items() if why == reason)
        what = first if number == 1 else f"{first} and {number - 1} more"
        print(f"Dropped {what}: {reason}.")


# ---- Writing -------------------------------------------------------------------------------------------------------


def _check_space(source: Source, folder: Path) -> None:
    shapes = our_shapes(source.config)
    needed = sum(torch.Size(shapes[name]).numel() * dtype.itemsize for name, dtype in source.dtypes.items())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The weights need {needed / 1e6:,.1f} MB, and {folder.parent.parent} has {free / 1e6:,.1f} MB left."
        )


def _write_weights(source: Source, folder: Path, max_shard_size: int | str) -> None:
    shapes = our_shapes(source.config)
    empty = {name: torch.empty(shapes[name], dtype=dtype, device="meta") for name, dtype in source.dtypes.items()}
    plan = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for filename, names in plan.filename_to_tensors.items():
        shard = dict(source.tensors(names))
        try:
            save_file(shard, folder / filename, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors' own name for a full disk
            raise OSError(f"Could not write {filename}: {error}") from error
        print(f"{filename}: {len(shard)} tensors, {sum(tensor.nbytes for tensor in shard.values()) / 1e9:.2f} GB.")
        del shard  # or it would stay until the next one is complete
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_rest(config: M2EncoderConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if len(tokenizer) > config.vocab_size:
        print(
            f"WARNING: the tokenizer has {len(tokenizer):,} tokens and the model {config.vocab_size:,} word "
            "embeddings: texts with ids beyond them will be refused by the model.",
            file=sys.stderr,
        )
    ids = {
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    for name, value in ids.items():
        setattr(config, name, value if value is not None and value < config.vocab_size else None)
    side = {"height": config.image_size, "width": config.image_size}
    config.save_pretrained(folder)
    M2EncoderProcessor(M2EncoderImageProcessorPil(size=side), tokenizer).save_pretrained(folder)
    write_hub_extras(folder)


# ---- Checking ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def verify_folder(folder: Path, source: Source) -> None:
    """Loads the folder as users do and compares it with the checkpoint: every tensor, and embeddings of random input.

    The checkpoint's embeddings come from `official_forward`, which shares no code with the model.

    Raises:
        ValueError: for the first difference.
    """
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"Verification failed: the written folder loads with {report}.")
    loaded = model.state_dict()
    for name, expected in source.tensors(list(source.table)):
        if not torch.equal(loaded[name], expected.float()):
            raise ValueError(f"Verification failed: {name} is not {source.table[name]} of the checkpoint.")
    print(f"Verified: all {len(loaded)} tensors are those of the checkpoint.")
    processor = AutoProcessor.from_pretrained(folder)
    blank = processor(images=torch.zeros(3, 8, 8, dtype=torch.uint8), text="a", return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    length = min(24, source.config.max_text_length)
    ids = torch.randint(source.config.vocab_size, (2, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([[length], [2]])).long()
    pixels = torch.rand(blank["pixel_values"].shape, generator=generator) * 2 - 1
    seen = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    state = {source.table[name]: tensor for name, tensor in loaded.items()}
    _compare_embeddings(seen, OfficialModel(state, source.config.num_attention_heads), ids, mask, pixels)


def _compare_embeddings(seen: Any, official: OfficialModel, ids: Tensor, mask: Tensor, pixels: Tensor) -> None:
    texts, images = official.embed_texts(ids, mask), official.embed_images(pixels)
    pairs = {"text": (seen.text_embeds, texts.upper), "image": (seen.image_embeds, images.upper)}
    if seen.backbone_text_embeds is not None:
        pairs["backbone text"] = (seen.backbone_text_embeds, texts.backbone)
        pairs["backbone image"] = (seen.backbone_image_embeds, images.backbone)
    worst = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}
    told = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    if not all(value <= TOLERANCE for value in worst.values()):  # also refuses NaN
        raise ValueError(f"Verification failed: embeddings differ from the official forward pass by {told}.")
    print(f"Verified: embeddings differ from the official forward pass by at most {told} (allowed {TOLERANCE:.0e}).")


# ---- Back ----------------------------------------------------------------------------------------------------------


def reverse(hub_dir: str | Path, out_file: str | Path) -> None:
    """Writes the official layout of a Hub folder, with an official JSON config beside it, each complete or not at all.

    Raises:
        ValueError: when the folder holds no M2-Encoder, or one that the official code cannot express; when a file
            exists.
        OSError: when the disk is full.
    """
    hub_dir, out_file = Path(hub_dir), Path(out_file)
    json_file = out_file.with_suffix(".json")
    for path in (out_file, json_file):
        if path.exists():
            raise ValueError(f"{path} exists already: choose another name or remove it first.")
    if not (hub_dir / "config.json").is_file():
        raise ValueError(f"No Hub folder at {hub_dir}: it has no config.json.")
    config = AutoConfig.from_pretrained(hub_dir)
    if config.model_type != M2EncoderConfig.model_type:
        raise ValueError(f"{hub_dir} holds a model of type {config.model_type!r}, not {M2EncoderConfig.model_type!r}.")
    names = official_config(config)
    official = to_official(_read_shards(hub_dir), config)
    with complete_or_absent(json_file) as named, complete_or_absent(out_file) as written:
        named.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
        try:
            torch.save({"state_dict": official}, written)
        except RuntimeError as error:  # torch's own name for a full disk
            raise OSError(f"Could not write {out_file.name}: {error}") from error
    print(f"Wrote {out_file} and {json_file}.")
    if config.vocab_size != M2EncoderConfig().vocab_size:
        print(
            f"WARNING: the official code tokenises with its own sp.model of {M2EncoderConfig().vocab_size:,} pieces; "
            f"this model has {config.vocab_size:,}. Give it ids from the tokenizer in {hub_dir}.",
            file=sys.stderr,
        )


def _read_shards(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no model.safetensors.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}
    return tensors


# ---- Command line --------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert",
        description="Turn a published M2-Encoder checkpoint into a Hub folder, or back into the official layout.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="m2_encoder_*.ckpt; with --reverse a Hub folder")
    add("out_dir", metavar="OUT_DIR", help="must not exist; with --reverse a .ckpt file")
    add(
        "--size",
        choices=["auto", "0.4B", "1B", "10B"],
        default="auto",
        help="refuse any other size (default: %(default)s)",
    )
    add("--config", metavar="FILE", help="the official JSON config, for a size that was not published")
    add("--sp-model", metavar="FILE", help="the official tokenizer's sp.model")
    add("--image-size", type=int, metavar="N", help="side of the images in pixels: resizes the position table")
    add("--dtype", choices=list(DTYPES), help="of the written weights (default: as in the checkpoint)")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file (default: %(default)s)")
    add("--verify", action="store_true", help="load the folder again and compare tensors and embeddings")
    add("--reverse", action="store_true", help="write the official layout from a Hub folder")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; a mistake of the user is one line on stderr and exit status 1."""
    parser = _parser()
    args = parser.parse_args(arguments)
    # `kill` becomes an exception, so that what is half written is removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if args.reverse:
            ignored = [name for name in vars(args) if name not in ("checkpoint", "out_dir", "reverse")]
            ignored = [
                f"--{name.replace('_', '-')}" for name in ignored if getattr(args, name) != parser.get_default(name)
            ]
            if ignored:
                parser.error(f"--reverse takes no {', '.join(ignored)}")
            reverse(args.checkpoint, args.out_dir)
            return
        if args.sp_model is None:
            parser.error("--sp-model is needed: the tokenizer is not in the checkpoint")
        named = None if args.config is None else _read_json(args.config)
        convert(
            args.checkpoint,
            args.out_dir,
            glm_tokenizer(args.sp_model, max_length=(named or {}).get("max_text_len", 52)),
            size=args.size,
            official_config=named,
            image_size=args.image_size,
            dtype=DTYPES.get(args.dtype),
            max_shard_size=args.max_shard_size,
            verify=args.verify,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        signal.signal(signal.SIGTERM, before)


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the settings of a model.")
    return content


if __name__ == "__main__":
    main()
