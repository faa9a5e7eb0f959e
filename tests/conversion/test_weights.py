"""The key table in both directions, what is dropped, sizes from shapes, position tables of another image size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from conversion.weights import (
    config_from_shapes,
    from_official,
    key_table,
    match_keys,
    official_config,
    our_shapes,
    resize_positions,
    to_official,
)
from modeling_m2encoder import SIZES, M2EncoderConfig, M2EncoderModel


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.fixture
def tiny(tiny_state, tiny_config) -> M2EncoderConfig:
    return config_from_shapes(shapes_of(tiny_state), official_config=tiny_config)


def test_the_table_is_one_to_one_and_complete(tiny):
    table = key_table(tiny)
    assert table.keys() == our_shapes(tiny).keys() == M2EncoderModel(tiny).state_dict().keys()
    assert len(set(table.values())) == len(table)


def test_embeddings_are_the_official_ones(tiny, tiny_state, tiny_outputs):
    model = M2EncoderModel(tiny).eval()
    model.load_state_dict(from_official(tiny_state, tiny))
    pixels = (tiny_outputs["pixel_values_0_1"] - 0.5) / 0.5
    with torch.no_grad():
        seen = model(tiny_outputs["input_ids"], pixels, tiny_outputs["attention_mask"])
    for ours, theirs in (
        (seen.text_embeds, "text_embeds"),
        (seen.image_embeds, "image_embeds"),
        (seen.backbone_text_embeds, "text_backbone_embeds"),
        (seen.backbone_image_embeds, "image_backbone_embeds"),
        (seen.logits_per_image, "logits_per_image"),
    ):
        assert (ours - tiny_outputs[theirs]).abs().max() <= 2e-6, theirs


def test_there_and_back_is_bit_exact(tiny, tiny_state):
    ours = from_official(tiny_state, tiny)
    again = from_official(to_official(ours, tiny), tiny)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_back_and_there_keeps_every_key_of_the_official_files(tiny, tiny_state):
    official = to_official(from_official(tiny_state, tiny), tiny)
    assert shapes_of(official) == shapes_of(tiny_state)
    table, dropped = match_keys(shapes_of(tiny_state), tiny)
    for key in table.values():
        assert torch.equal(official[key], tiny_state[key])
    for key in dropped:
        if key.startswith("backbone_vl."):
            assert torch.equal(official[key], tiny_state[key.replace(".B.", ".A.")])
    assert official["norm.weight"].eq(1).all() and official["pooler.dense.weight"].eq(0).all()
    assert official["logit_vl_scale"] == official["logit_scale"] == tiny_state["logit_scale"]


@pytest.mark.parametrize("backbone", [True, False])
def test_a_model_of_ours_there_and_back(backbone: bool):
    """A model trained here: fewer text positions than the official 1,024, perhaps without backbone projections."""
    config = M2EncoderConfig.from_size("nano", use_backbone_projection=backbone)
    torch.manual_seed(0)
    ours = M2EncoderModel(config).state_dict()
    official = to_official(ours, config)
    assert official["backbone.encoder.embed_positions.B.weight"].shape[0] == 1024
    read = config_from_shapes(shapes_of(official), official_config=official_config(config))
    assert read.use_backbone_projection
    again = from_official(official, read)
    for name in ("backbone_text_projection.weight", "backbone_image_projection.weight"):
        if not backbone:
            assert again.pop(name).eq(0).all()
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    for field in ("num_attention_heads", "max_position_embeddings", "image_size", "max_text_length", "patch_size"):
        assert getattr(read, field) == getattr(config, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intermediate_size", 100),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-6),
        ("num_channels", 1),
        ("max_position_embeddings", 2000),
        ("num_upper_layers", 0),
    ],
)
def test_what_the_official_code_cannot_express_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        official_config(M2EncoderConfig.from_size("nano", **{field: value}))


def test_faults_are_listed_all_together(tiny, tiny_state):
    shapes = shapes_of(tiny_state)
    del shapes["backbone.encoder.layers.1.ffn.B.fc2.bias"], shapes["itc_vl_image_proj.fc.weight"]
    shapes["mystery.weight"] = (3,)
    shapes["backbone.encoder.layers.7.ffn.A.fc1.weight"] = (192, 48)
    shapes["logit_scale"] = (2,)
    shapes["backbone.vision_embed.cls_token"] = (1, 48)
    with pytest.raises(ValueError) as error:
        match_keys(shapes, tiny)
    told = str(error.value)
    assert "2 missing" in told and "2 left over" in told and "2 of the wrong shape" in told
    for named in ("layers.1.ffn.B.fc2.bias", "itc_vl_image_proj", "mystery.weight", "layers.7", "logit_scale [2]"):
        assert named in told
    assert "backbone.vision_embed.cls_token [1, 48], expected [1, 1, 48]" in told


def test_known_extra_keys_are_dropped_with_a_reason(tiny, tiny_state):
    shapes = shapes_of(tiny_state)
    extra = {"visual_tokenizer.quantize.embedding": (8, 4), "itc_teacher.proj.weight": (3, 3)}
    _, dropped = match_keys(shapes | extra, tiny)
    assert set(extra) <= set(dropped)
    kinds = {key.split(".")[0] for key in dropped}
    assert kinds == {"backbone", "backbone_vl", "norm", "pooler", "logit_vl_scale", "visual_tokenizer", "itc_teacher"}
    assert all(dropped.values())
    assert sum(key.startswith("backbone_vl.") for key in dropped) == 22  # 20 in the one layer, 2 in the final norm


def test_without_backbone_projections_they_are_dropped(tiny_state, tiny_config):
    config = config_from_shapes(shapes_of(tiny_state), official_config=tiny_config)
    config.use_backbone_projection = False
    _, dropped = match_keys(shapes_of(tiny_state), config)
    assert "itc_text_proj.fc.weight" in dropped and "itc_image_proj.fc.weight" in dropped


# ---- Sizes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["0.4B", "1B", "10B"])
def published(request) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The shapes that tell the size of a published checkpoint."""
    size = SIZES[request.param]
    width, ffn = size["hidden_size"], size["intermediate_size"]
    shapes = {
        "backbone.text_embed.weight": (115244, width),
        "backbone.vision_embed.proj.weight": (width, 3, 16, 16),
        "backbone.encoder.embed_positions.A.weight": (199, width),
        "backbone.encoder.embed_positions.B.weight": (1024, width),
        "itc_vl_text_proj.fc.weight": (size["projection_dim"], width),
    }
    shapes |= {f"backbone.encoder.layers.{i}.ffn.B.fc1.weight": (ffn, width) for i in range(size["num_hidden_layers"])}
    shapes |= {f"backbone_vl.layers.{i}.ffn.A.fc1.weight": (ffn, width) for i in range(3)}
    return request.param, shapes


def test_published_sizes_are_recognised(published):
    name, shapes = published
    config = config_from_shapes(shapes)
    for field, value in SIZES[name].items():
        assert getattr(config, field) == value
    assert (config.image_size, config.patch_size, config.vocab_size) == (224, 16, 115244)
    assert config_from_shapes(shapes, size=name).to_dict() == config.to_dict()
    others = {"0.4B", "1B", "10B"} - {name}
    for other in others:
        with pytest.raises(ValueError, match=f"not of size {other}.*It has the shapes of {name}"):
            config_from_shapes(shapes, size=other)


def test_official_json_files_without_heads(published):
    """The published JSON files do not name the heads; the version does (base 12, large 16, huge 32)."""
    name, shapes = published
    version = {"0.4B": {}, "1B": {"beit_version": "large"}, "10B": {"beit_version": "huge"}}[name]
    assert config_from_shapes(shapes, official_config=version).num_attention_heads == SIZES[name]["num_attention_heads"]


def test_an_unpublished_size_needs_its_config(tiny_state, tiny_config):
    with pytest.raises(ValueError, match="hidden_size 48.*--config"):
        config_from_shapes(shapes_of(tiny_state))
    wrong = tiny_config | {"encoder_layers": 3, "vocab_size": 7}
    with pytest.raises(ValueError, match="encoder_layers is 3 in the config and 2.*vocab_size is 7"):
        config_from_shapes(shapes_of(tiny_state), official_config=wrong)
    with pytest.raises(ValueError, match="share_attn"):
        config_from_shapes(shapes_of(tiny_state), official_config=tiny_config | {"share_attn": True})


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"], "OpenAI's CLIP or an open_clip"),
        (["module.bert.encoder.layer.0.attention.self.query.weight", "module.visual.conv1.weight"], "Chinese-CLIP"),
        (
            ["text_model.encoder.layer.0.attention.self.key.bias", "vision_model.encoder.layers.0.mlp.fc1.bias"],
            r"Chinese-CLIP \(transformers\)",
        ),
        (["text_model.encoder.layers.0.mlp.fc1.bias", "vision_model.encoder.layers.0.mlp.fc1.bias"], "CLIP or SigLIP"),
        (["beit3.encoder.layers.0.self_attn.k_proj.A.weight"], "BEiT-3"),
        (["bert.encoder.layer.0.attention.self.query.weight"], "BERT"),
        (["model.embed_tokens.weight"], "language model"),
        (["encoder.layers.0.text.mlp.fc1.bias"], "our own layout"),
        (["a.b", "c"], "none of its keys, but a.b, c"),
        ([], "no tensors at all"),
    ],
)
def test_other_models_are_recognised(keys, name):
    with pytest.raises(ValueError, match=f"not an M2-Encoder checkpoint.*{name}"):
        config_from_shapes(dict.fromkeys(keys, (2, 2)))


def test_a_part_of_a_checkpoint_is_named(tiny_state, tiny_config):
    shapes = shapes_of(tiny_state)
    del shapes["backbone.encoder.embed_positions.A.weight"]
    with pytest.raises(ValueError, match="embed_positions.A.*sharded"):
        config_from_shapes(shapes, official_config=tiny_config)


# ---- Positions -----------------------------------------------------------------------------------------------------


def test_positions_are_resized_by_area():
    """Area interpolation to half the side is the mean of 2 x 2 patches; the three first rows stay."""
    table = torch.arange(3 + 16, dtype=torch.float32)[:, None] * torch.tensor([1.0, -2.0])
    small = resize_positions(table, 2)
    grid = np.arange(3, 19, dtype=np.float32).reshape(4, 4)
    means = grid.reshape(2, 2, 2, 2).mean(axis=(1, 3)).flatten()
    assert small.shape == (7, 2)
    assert torch.equal(small[:3], table[:3])
    assert small[3:, 0].tolist() == means.tolist() and small[3:, 1].tolist() == (-2 * means).tolist()


def test_positions_are_enlarged_by_area():
    """From 2 x 2 to 3 x 3: an edge place takes one patch, the middle one the mean of the patches it overlaps."""
    table = torch.tensor([[0.0], [0], [0], [1], [2], [3], [4]])
    large = resize_positions(table, 3)[3:, 0].reshape(3, 3)
    assert large.tolist() == [[1, 1.5, 2], [2, 2.5, 3], [3, 3.5, 4]]


def test_positions_of_the_same_size_are_untouched(tiny_state):
    table = tiny_state["backbone.encoder.embed_positions.A.weight"]
    assert resize_positions(table, 4) is table
    half = resize_positions(table.half(), 2)
    assert half.dtype == torch.float16


def test_image_size_decides_the_table(tiny_state, tiny_config):
    shapes = shapes_of(tiny_state)
    config = config_from_shapes(shapes, official_config=tiny_config, image_size=96)
    ours = from_official(tiny_state, config)
    assert ours["encoder.vision_embeddings.position_embeddings.weight"].shape == (3 + 36, 48)
    from_json = config_from_shapes(shapes, official_config=tiny_config | {"image_size": 32})
    assert from_json.image_size == 32
    shapes["backbone.encoder.embed_positions.A.weight"] = (3 + 15, 48)
    with pytest.raises(ValueError, match=r"embed_positions.A.weight \[18, 48\]"):
        match_keys(shapes, config)


def test_text_positions_in_use_are_not_cut_off(tiny_state, tiny_config):
    config = config_from_shapes(
        shapes_of(tiny_state), official_config=tiny_config | {"max_position_embeddings": 20, "max_text_len": 18}
    )
    with pytest.raises(ValueError, match="values beyond the 20 rows"):
        from_official(tiny_state, config)
    tiny_state["backbone.encoder.embed_positions.B.weight"][20:] = 0
    assert from_official(tiny_state, config)["encoder.text_embeddings.position_embeddings.weight"].shape == (20, 48)
