"""Which tensor of the official checkpoints is which of ours. Pure functions, both directions; no files are touched
here.

The two layouts hold the same numbers under other names, with four differences: the official upper layers have a second
expert that nothing runs, a few heads serve only pretraining, `logit_scale` has no dimension there and one here, and the
position table may belong to another image size. Used by `python -m conversion.convert`.

Shapes: D width, F feed-forward width, E embedding, V vocabulary, P patches, K patch side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from modeling_m2encoder import SIZES, M2EncoderConfig, M2EncoderModel

Shape = tuple[int, ...]

EXPERT = {"vision": "A", "text": "B"}
FIRST_PATCH_ROW = 3  # rows 0 and 1 of a position table are fairseq's, row 2 is [CLS]

# One layer, ours -> official; X is the expert. The official FFN puts the expert before the part, everything else after.
LAYER_PARTS = {
    "layer_norm1": "self_attn_layer_norm.X",
    "self_attn.q_proj": "self_attn.q_proj.X",
    "self_attn.k_proj": "self_attn.k_proj.X",
    "self_attn.v_proj": "self_attn.v_proj.X",
    "self_attn.inner_layer_norm": "self_attn.inner_attn_ln.X",
    "self_attn.out_proj": "self_attn.out_proj.X",
    "layer_norm2": "final_layer_norm.X",
    "mlp.fc1": "ffn.X.fc1",
    "mlp.inner_layer_norm": "ffn.X.ffn_layernorm",
    "mlp.fc2": "ffn.X.fc2",
}

VISION_POSITIONS = "backbone.encoder.embed_positions.A.weight"
TEXT_POSITIONS = "backbone.encoder.embed_positions.B.weight"
OFFICIAL_TEXT_ROWS = 1024  # fixed in the official code, whatever the longest text
UNIQUE_KEYS = {
    "encoder.text_embeddings.word_embeddings.weight": "backbone.text_embed.weight",
    "encoder.text_embeddings.position_embeddings.weight": TEXT_POSITIONS,
    "encoder.vision_embeddings.cls_token": "backbone.vision_embed.cls_token",
    "encoder.vision_embeddings.patch_embedding.weight": "backbone.vision_embed.proj.weight",
    "encoder.vision_embeddings.patch_embedding.bias": "backbone.vision_embed.proj.bias",
    "encoder.vision_embeddings.position_embeddings.weight": VISION_POSITIONS,
    "text_projection.weight": "itc_vl_text_proj.fc.weight",
    "image_projection.weight": "itc_vl_image_proj.fc.weight",
    "logit_scale": "logit_scale",
}
BACKBONE_PROJECTIONS = {
    "backbone_text_projection.weight": "itc_text_proj.fc.weight",
    "backbone_image_projection.weight": "itc_image_proj.fc.weight",
}

# Official keys that carry nothing for embeddings: what they are, and why they may go.
DROPPED = {
    r"backbone_vl\..*\.B\..*": "text experts of the upper layers: the official code runs the vision experts for both",
    r"norm\.(weight|bias)": "a LayerNorm of the pretraining heads",
    r"pooler\.dense\.(weight|bias)": "the pooler of the pretraining heads",
    r"backbone\.vision_embed\.mask_token": "the patch mask of pretraining",
    r"logit_vl_scale": "unused by the official code too: similarities are scaled by logit_scale",
    r"visual_tokenizer\..*": "the frozen image tokenizer of pretraining",
    r".*itc_teacher.*": "a distillation teacher",
}

# Other models by keys that only they have together, for the error message; the first that fits.
OTHER_MODELS = {
    "our own layout already (load it with AutoModel)": (r"encoder\.layers\.\d+\.(text|vision)\.",),
    "Chinese-CLIP (the official cn_clip code)": (r"\bbert\.encoder\.layer\.\d+\.", r"\bvisual\."),
    "Chinese-CLIP (transformers)": (r"text_model\.encoder\.layer\.\d+\.", r"vision_model\.encoder\.layers\.\d+\."),
    "a CLIP or SigLIP of transformers": (r"vision_model\.encoder\.layers\.\d+\.",),
    "OpenAI's CLIP or an open_clip model": (r"\bvisual\.(conv1|transformer|trunk|class_embedding)\b",),
    "Microsoft's BEiT-3": (r"\bbeit3\.",),
    "a text encoder like BERT": (r"encoder\.layer\.\d+\.attention\.self\.",),
    "a language model": (r"\bembed_tokens\.weight|\bwte\.weight",),
}


# ---- The table -----------------------------------------------------------------------------------------------------


def key_table(config: M2EncoderConfig) -> dict[str, str]:
    """Every parameter of `M2EncoderModel(config)` -> its official key; one to one.

    Raises:
        ValueError: without upper layers, which the official layout cannot express.
    """
    if config.num_upper_layers == 0:
        raise ValueError("The official layout needs upper layers (beit3_vl_layers > 0); this model has none.")
    table = dict(UNIQUE_KEYS)
    if config.use_backbone_projection:
        table |= BACKBONE_PROJECTIONS
    for kind in ("weight", "bias"):
        for modality, expert in EXPERT.items():
            table[f"encoder.layer_norm.{modality}.{kind}"] = f"backbone.encoder.layer_norm.{expert}.{kind}"
            for i in range(config.num_hidden_layers):
                for ours, official in LAYER_PARTS.items():
                    name = f"encoder.layers.{i}.{modality}.{ours}.{kind}"
                    table[name] = f"backbone.encoder.layers.{i}.{official.replace('X', expert)}.{kind}"
        table[f"encoder.upper_layer_norm.{kind}"] = f"backbone_vl.layer_norm.A.{kind}"
        for i in range(config.num_upper_layers):
            for ours, official in LAYER_PARTS.items():
                official = official.replace("X", "A")
                table[f"encoder.upper_layers.{i}.{ours}.{kind}"] = f"backbone_vl.layers.{i}.{official}.{kind}"
    return table


def our_shapes(config: M2EncoderConfig) -> dict[str, Shape]:
    """The parameters of `M2EncoderModel(config)`, without making it."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in M2EncoderModel(config).state_dict().items()}


def why_dropped(official_key: str) -> str | None:
    """The reason for leaving a key of the official files out, or None when it is none of the known ones."""
    return next((reason for pattern, reason in DROPPED.items() if re.fullmatch(pattern, official_key)), None)


# ---- Official -> ours ----------------------------------------------------------------------------------------------


def match_keys(shapes: Mapping[str, Shape], config: M2EncoderConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Every parameter of ours -> its official key, and the keys that are dropped -> why.

    Args:
        shapes: the shapes of an official state dict, without the `_forward_module.` prefix.

    Raises:
        ValueError: naming every key that is missing, left over or of the wrong shape.
    """
    table = key_table(config)
    expected = {table[name]: shape for name, shape in our_shapes(config).items()}
    dropped = {key: reason for key in shapes if key not in expected and (reason := why_dropped(key))}
    if not config.use_backbone_projection:
        unused = {key: "the model is made without backbone projections" for key in BACKBONE_PROJECTIONS.values()}
        dropped |= {key: reason for key, reason in unused.items() if key in shapes}
    missing = sorted(expected.keys() - shapes.keys())
    left_over = sorted(shapes.keys() - expected.keys() - dropped.keys())
    wrong = [
        f"{key} {list(shapes[key])}, expected {list(expected[key])}"
        for key in sorted(expected.keys() & shapes.keys())
        if not _fits(key, shapes[key], expected[key])
    ]
    if missing or left_over or wrong:
        lists = {"missing": missing, "left over": left_over, "of the wrong shape": wrong}
        parts = [f"\n{len(keys)} {what}:\n  " + "\n  ".join(keys) for what, keys in lists.items() if keys]
        raise ValueError("The checkpoint does not fit the model." + "".join(parts))
    return table, dropped


def _fits(key: str, seen: Shape, expected: Shape) -> bool:
    if key == "logit_scale":
        return seen in ((), (1,))
    if key == VISION_POSITIONS:  # resized to the model's image size
        side = math.isqrt(max(seen[0] - FIRST_PATCH_ROW, 0)) if len(seen) == 2 else 0
        return side > 0 and seen == (side**2 + FIRST_PATCH_ROW, expected[1])
    if key == TEXT_POSITIONS:  # `to_official` fills the table up
        return len(seen) == 2 and seen[0] >= expected[0] and seen[1] == expected[1]
    return seen == expected


def to_ours(official_key: str, tensor: Tensor, config: M2EncoderConfig) -> Tensor:
    """One official tensor as our model holds it; a view of the same memory wherever nothing changes.

    Raises:
        ValueError: when text positions beyond `config.max_position_embeddings` are in use.
    """
    if official_key == "logit_scale":
        return tensor.reshape(1)
    if official_key == VISION_POSITIONS:
        return resize_positions(tensor, config.image_size // config.patch_size)
    if official_key == TEXT_POSITIONS:
        kept, rest = tensor.split([config.max_position_embeddings, len(tensor) - config.max_position_embeddings])
        if rest.any():
            raise ValueError(f"{official_key} has values beyond the {len(kept)} rows that the config asks for.")
        return kept
    return tensor


def resize_positions(table: Tensor, side: int) -> Tensor:
    """A vision position table [3 + P, D] for a grid of `side` x `side` patches.

    The three first rows stay, the patch rows are resized by area interpolation as the official code does when it
    reads a checkpoint. (For larger tables of the Lightning layout it cuts rows off instead, which leaves the top of
    the picture in the wrong raster; no published model goes that way, and it is not copied.)
    """
    first, patches = table[:FIRST_PATCH_ROW], table[FIRST_PATCH_ROW:]
    old = math.isqrt(len(patches))
    if old == side:
        return table
    grid = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="area")
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(side**2, -1).to(table.dtype)])


def from_official(state_dict: Mapping[str, Tensor], config: M2EncoderConfig) -> dict[str, Tensor]:
    """A whole official state dict -> ours.

    Raises:
        ValueError: as `match_keys`.
    """
    table, _ = match_keys({key: tuple(value.shape) for key, value in state_dict.items()}, config)
    return {name: to_ours(key, state_dict[key], config) for name, key in table.items()}


# ---- Ours -> official ----------------------------------------------------------------------------------------------


def official_config(config: M2EncoderConfig) -> dict[str, Any]:
    """The official JSON config of a model, as far as it decides the architecture.

    Raises:
        ValueError: naming everything that the official code cannot express.
    """
    fixed = {
        "intermediate_size": 4 * config.hidden_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "num_channels": 3,
        "max_position_embeddings": min(config.max_position_embeddings, OFFICIAL_TEXT_ROWS),
        "num_upper_layers": max(config.num_upper_layers, 1),
    }
    wrong = [
        f"{key} is {getattr(config, key)}, not {value}" for key, value in fixed.items() if getattr(config, key) != value
    ]
    if wrong:
        raise ValueError("The official code cannot express this model: " + "; ".join(wrong) + ".")
    return {
        "loss_names": {"itc": 1},
        # The version matters for the number of heads only, and that is named.
        "beit_version": "base",
        "encoder_layers": config.num_hidden_layers,
        "beit3_vl_layers": config.num_upper_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_attention_heads": config.num_attention_heads,
        "out_embed_dim": config.projection_dim,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "vocab_size": config.vocab_size,
        "max_text_len": config.max_text_length,
        # Not read by the official code: which rows of its 1,024 are the model's own.
        "max_position_embeddings": config.max_position_embeddings,
        "tokenizer_type": "GLMChineseTokenizer",
        "tokenizer": "./vlmo/tokenizer",
        "test_only": True,
        "flash_attn": False,
    }


def to_official(state_dict: Mapping[str, Tensor], config: M2EncoderConfig) -> dict[str, Tensor]:
    """A state dict of `M2EncoderModel` -> one that the official code loads without a missing key.

    What our model does not hold cannot influence an embedding: the upper text experts share the vision experts' memory,
    `norm` is the identity, `pooler`, `mask_token`, absent backbone projections and text positions that are never
    used are zero, and `logit_vl_scale` is `logit_scale`.

    Raises:
        ValueError: naming every key that is missing, left over or of the wrong shape.
    """
    _check_ours(state_dict, config)
    official = {key: state_dict[name] for name, key in key_table(config).items()}
    official["logit_scale"] = official["logit_scale"].reshape(())
    width, like = config.hidden_size, official[TEXT_POSITIONS]
    if len(like) < OFFICIAL_TEXT_ROWS:
        official[TEXT_POSITIONS] = torch.cat([like, like.new_zeros(OFFICIAL_TEXT_ROWS - len(like), width)])
    fillers = {
        "norm.weight": like.new_ones(width),
        "norm.bias": like.new_zeros(width),
        "pooler.dense.weight": like.new_zeros(width, width),
        "pooler.dense.bias": like.new_zeros(width),
        "backbone.vision_embed.mask_token": like.new_zeros(1, 1, width),
        "logit_vl_scale": official["logit_scale"],
    }
    fillers |= {key: like.new_zeros(config.projection_dim, width) for key in BACKBONE_PROJECTIONS.values()}
    upper = {key.replace(".A.", ".B."): value for key, value in official.items() if key.startswith("backbone_vl.")}
    return {**fillers, **upper, **official}


def _check_ours(state_dict: Mapping[str, Tensor], config: M2EncoderConfig) -> None:
    expected = our_shapes(config)
    problems = [f"missing: {name}" for name in expected.keys() - state_dict.keys()]
    problems += [f"left over: {name}" for name in state_dict.keys() - expected.keys()]
    problems += [
        f"of the wrong shape: {name} {list(state_dict[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    if problems:
        raise ValueError("The weights do not fit their config:\n  " + "\n  ".join(sorted(problems)))


# ---- Which model is it? --------------------------------------------------------------------------------------------


def config_from_shapes(
    shapes: Mapping[str, Shape],
    *,
    size: str = "auto",
    official_config: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> M2EncoderConfig:
    """Recognises the model from the shapes of an official state dict.

    Everything but the number of heads shows in the shapes. It comes from the published sizes, or from `official_config`
    (the JSON files beside the official code) for any other size.

    Args:
        shapes: the shapes of an official state dict, without the `_forward_module.` prefix.
        size: "auto", or the published size it must be.
        image_size: side of the model's images; the position table is resized to it. The default is the image size of
            `official_config`, or that of the table.

    Returns:
        A config without token ids: those are the tokenizer's.

    Raises:
        ValueError: when it is another model, another size than asked for, or contradicts `official_config`.
    """
    _refuse_other_models(shapes)
    seen = _read_shapes(shapes)
    if official_config is not None:
        seen |= _read_official_config(official_config, seen)
    else:
        published = SIZES[_published_size(seen, size)]
        # The decoders are not in the published files, but pretraining can go on from one.
        seen |= {name: published[name] for name in ("num_attention_heads", "num_decoder_layers")}
    if image_size is not None:
        seen["image_size"] = image_size
    seen["use_backbone_projection"] = any(key in shapes for key in BACKBONE_PROJECTIONS.values())
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"))
    return M2EncoderConfig(**seen, **no_ids)


def _refuse_other_models(shapes: Mapping[str, Shape]) -> None:
    if "backbone.text_embed.weight" in shapes or any(key.startswith("backbone_vl.") for key in shapes):
        return
    for name, patterns in OTHER_MODELS.items():
        found = [next((key for key in shapes if re.search(pattern, key)), None) for pattern in patterns]
        if all(found):
            raise ValueError(f"This is not an M2-Encoder checkpoint: it looks like {name}, by its key {found[0]!r}.")
    some = ", ".join(list(shapes)[:5]) or "no tensors at all"
    raise ValueError(f"This is not an M2-Encoder checkpoint: it has none of its keys, but {some}.")


def _read_shapes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The architecture as the shapes tell it.

    Raises:
        ValueError: naming what is missing or malformed among the keys that tell it.
    """
    ranks = {
        "backbone.text_embed.weight": 2,  # [V, D]
        "backbone.vision_embed.proj.weight": 4,  # [D, channels, K, K]
        VISION_POSITIONS: 2,  # [3 + P, D]
        TEXT_POSITIONS: 2,
        "backbone.encoder.layers.0.ffn.B.fc1.weight": 2,  # [F, D]
        "itc_vl_text_proj.fc.weight": 2,  # [E, D]
        "backbone_vl.layers.0.ffn.A.fc1.weight": 2,
    }
    bad = [
        f"{key} {list(shapes[key])}" if key in shapes else key
        for key, n in ranks.items()
        if len(shapes.get(key, ())) != n
    ]
    if bad:
        raise ValueError(
            "The checkpoint lacks what tells its size (or has it in another form): "
            f"{', '.join(bad)}. Is it a part of a sharded checkpoint?"
        )
    words, patches, positions, text_positions, fc1, projection, _ = (shapes[key] for key in ranks)
    return {
        "vocab_size": words[0],
        "hidden_size": words[1],
        "num_hidden_layers": _count(shapes, r"backbone\.encoder\.layers\.(\d+)\."),
        "num_upper_layers": _count(shapes, r"backbone_vl\.layers\.(\d+)\."),
        "intermediate_size": fc1[0],
        "projection_dim": projection[0],
        "image_size": math.isqrt(max(positions[0] - FIRST_PATCH_ROW, 0)) * patches[-1],
        "patch_size": patches[-1],
        "num_channels": patches[1],
        "max_position_embeddings": text_positions[0],
    }


def _count(keys: Iterable[str], pattern: str) -> int:
    return 1 + max(int(match[1]) for key in keys if (match := re.match(pattern, key)))


def _published_size(seen: Mapping[str, int], size: str) -> str:
    """The published size that these shapes are; `size` says which one is asked for.

    Raises:
        ValueError: when it is none, or another one.
    """
    defaults = M2EncoderConfig()
    published = {name: {"vocab_size": defaults.vocab_size, **SIZES[name]} for name in ("0.4B", "1B", "10B")}
    fits = [name for name, its in published.items() if all(its[key] == seen[key] for key in its.keys() & seen.keys())]
    if size == "auto" and not fits:
        raise ValueError(
            f"The checkpoint has none of the published sizes ({', '.join(published)}): {_describe(seen)}. Pass "
            "--config with the official JSON file of its size, which tells the number of attention heads."
        )
    if size != "auto" and size not in fits:
        differences = [
            f"{key} is {seen[key]}, not {value}"
            for key, value in published[size].items()
            if seen.get(key, value) != value
        ]
        looks = f" It has the shapes of {fits[0]}." if fits else ""
        raise ValueError(f"The checkpoint is not of size {size}: {'; '.join(differences)}.{looks}")
    return fits[0]


def _describe(seen: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in seen.items())


def _read_official_config(official: Mapping[str, Any], seen: Mapping[str, int]) -> dict[str, int]:
    """What an official JSON config says, checked against the shapes; unnamed values are the official defaults.

    Raises:
        ValueError: for another architecture, or naming every contradiction.
    """
    other = [key for key in ("share_layer", "share_attn", "one_attn", "deepnorm") if official.get(key)]
    if other:
        raise ValueError(
            f"The config asks for {', '.join(other)}, which no published model has and ours does not either."
        )
    names = {
        "encoder_layers": "num_hidden_layers",
        "beit3_vl_layers": "num_upper_layers",
        "encoder_embed_dim": "hidden_size",
        "out_embed_dim": "projection_dim",
        "patch_size": "patch_size",
        "vocab_size": "vocab_size",
    }
    wrong = [
        f"{name} is {official[name]} in the config and {seen[ours]} in the checkpoint"
        for name, ours in names.items()
        if name in official and official[name] != seen[ours]
    ]
    if wrong:
        raise ValueError("The config belongs to another checkpoint: " + "; ".join(wrong) + ".")
    # Heads by model version, where the file does not name them (vlmo/modules/modeling_utils.py; "base" is the default).
    heads = {"base": 12, "large": 16, "huge": 32}
    version = official.get("beit_version", "base")
    if "encoder_attention_heads" not in official and version not in heads:
        raise ValueError(f"The config has neither encoder_attention_heads nor a known beit_version (got {version!r}).")
    return {
        "num_attention_heads": official.get("encoder_attention_heads") or heads[version],
        "image_size": official.get("image_size", 224),
        "max_text_length": official.get("max_text_len", 52),
        "max_position_embeddings": official.get("max_position_embeddings", seen["max_position_embeddings"]),
    }
