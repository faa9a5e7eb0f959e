"""The model: equivalences (saved = reloaded, padded = unpadded, sdpa = eager, checkpointed = not), shapes, bad
input."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForZeroShotImageClassification

from modeling_m2encoder import M2EncoderConfig, M2EncoderModel, M2EncoderTextModel, M2EncoderVisionModel
from modeling_m2encoder.modeling_m2encoder import drop_path


@pytest.fixture
def batch(processor, captions, images) -> dict[str, torch.Tensor]:
    return dict(processor(text=captions, images=images, return_tensors="pt"))


# ---- Interface


def test_forward_and_features_agree(model, batch):
    with torch.no_grad():
        both = model(**batch)
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
        image = model.get_image_features(batch["pixel_values"])
        text_alone = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        image_alone = model(pixel_values=batch["pixel_values"])
    assert both.text_embeds.shape == both.image_embeds.shape == (6, 24)
    assert text.last_hidden_state.shape[:2] == batch["input_ids"].shape
    assert image.last_hidden_state.shape == (6, 1 + 16, 32)
    normalise = torch.nn.functional.normalize
    assert torch.equal(both.text_embeds, normalise(text.pooler_output, dim=-1))
    assert torch.equal(both.image_embeds, normalise(image.pooler_output, dim=-1))
    assert not torch.allclose(text.pooler_output.norm(dim=-1), torch.ones(6))
    assert torch.equal(text_alone.text_embeds, both.text_embeds) and text_alone.image_embeds is None
    assert torch.equal(image_alone.image_embeds, both.image_embeds) and image_alone.logits_per_image is None
    expected = math.exp(2.6592) * both.image_embeds @ both.text_embeds.T
    torch.testing.assert_close(both.logits_per_image, expected)
    assert torch.equal(both.logits_per_text, both.logits_per_image.T)
    assert list(both) == [
        "logits_per_image",
        "logits_per_text",
        "text_embeds",
        "image_embeds",
        "text_model_output",
        "vision_model_output",
    ]


def test_loss_is_symmetric_cross_entropy(model, batch):
    output = model(**batch, return_loss=True)
    logits = output.logits_per_image.double()
    by_hand = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    assert output.loss.item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_hidden_states_and_attentions(model, batch):
    model.set_attn_implementation("eager")
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    for features, length in (
        (output.text_model_output, batch["input_ids"].shape[1]),
        (output.vision_model_output, 17),
    ):
        assert [state.shape for state in features.hidden_states] == [(6, length, 32)] * 4
        assert [weights.shape for weights in features.attentions] == [(6, 4, length, length)] * 3
        torch.testing.assert_close(features.attentions[0].sum(-1), torch.ones(6, 4, length))


def test_backbone_projection_is_an_option(config, batch):
    torch.manual_seed(0)
    model = M2EncoderModel(M2EncoderConfig(**{**config.to_dict(), "use_backbone_projection": True})).eval()
    output = model(**batch)
    assert output.backbone_text_embeds.shape == output.backbone_image_embeds.shape == (6, 24)
    assert not torch.allclose(output.backbone_text_embeds, output.text_embeds)


# ---- Equivalences


def test_reloaded_in_a_new_process_is_bit_identical(checkpoint: Path, model, batch, tmp_path: Path):
    with torch.no_grad():
        output = model(**batch)
    save_file({name: value.contiguous() for name, value in batch.items()}, tmp_path / "batch.safetensors")
    code = (
        "import sys, torch, modeling_m2encoder\n"
        "from transformers import AutoModel\n"
        "from safetensors.torch import load_file, save_file\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "assert type(model).__name__ == 'M2EncoderModel' and not model.training\n"
        "output = model(**load_file(sys.argv[2]))\n"
        "save_file({'text': output.text_embeds.detach(), 'image': output.image_embeds.detach()}, sys.argv[3])\n"
    )
    arguments = [str(checkpoint), str(tmp_path / "batch.safetensors"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=Path(__file__).parents[2])
    from safetensors.torch import load_file

    reloaded = load_file(tmp_path / "out.safetensors")
    assert torch.equal(reloaded["text"], output.text_embeds)
    assert torch.equal(reloaded["image"], output.image_embeds)


def test_every_weight_survives_saving(checkpoint: Path, model):
    reloaded, info = AutoModelForZeroShotImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = reloaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("half", [M2EncoderTextModel, M2EncoderVisionModel])
def test_halves_load_only_their_weights(half, checkpoint: Path, model, batch):
    loaded, info = half.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    other = ".vision" if half is M2EncoderTextModel else ".text"
    assert not [name for name, _ in loaded.named_parameters() if other in name]
    with torch.no_grad():
        whole = model(**batch)
        if half is M2EncoderTextModel:
            output = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            assert torch.equal(output.text_embeds, whole.text_embeds) and torch.equal(output[0], output.text_embeds)
        else:
            output = loaded(pixel_values=batch["pixel_values"])
            assert torch.equal(output.image_embeds, whole.image_embeds)


def test_sdpa_equals_eager(model, batch, monkeypatch):
    """Against torch's own sdpa kernel, which the CPU path replaces by the written-out form."""
    with torch.no_grad():
        default = model(**batch)
        model.set_attn_implementation("eager")
        eager = model(**batch)
        model.set_attn_implementation("sdpa")
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        import modeling_m2encoder.modeling_m2encoder as module

        calls = []
        kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setattr(
            module, "eager_attention_forward", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs)
        )
        sdpa = model(**batch)
    assert len(calls) == 6  # three layers, two modalities
    for other in (default, sdpa):
        torch.testing.assert_close(other.logits_per_image, eager.logits_per_image, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.text_embeds, eager.text_embeds, atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_changes_nothing(model, processor, captions, implementation):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        longest = model.get_text_features(**processor(text=captions, return_tensors="pt"))
        to_52 = processor(text=captions, return_tensors="pt", padding="max_length")
        assert to_52["input_ids"].shape[1] == 52
        padded = model.get_text_features(**to_52)
        alone = [model.get_text_features(**processor(text=[c], return_tensors="pt")).pooler_output for c in captions]
    torch.testing.assert_close(longest.pooler_output, padded.pooler_output, atol=1e-6, rtol=0)
    torch.testing.assert_close(longest.pooler_output, torch.cat(alone), atol=1e-6, rtol=0)


def test_mask_is_not_guessed_from_ids(model, processor, captions):
    """The end token is the padding token: without a mask, trailing end tokens are text."""
    padded = processor(text=captions[:1], return_tensors="pt", padding="max_length")
    masked = model.get_text_features(**padded).pooler_output
    unmasked = model.get_text_features(padded["input_ids"]).pooler_output
    assert not torch.allclose(masked, unmasked, atol=1e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(config, batch, use_reentrant):
    config = M2EncoderConfig(**{**config.to_dict(), "drop_path_rate": 0.3})
    torch.manual_seed(0)
    plain = M2EncoderModel(config).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)  # the same paths are dropped
        loss = model(**batch, return_loss=True).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_every_parameter_learns(model, batch):
    model.train()(**batch, return_loss=True).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_long_text_is_cut_as_the_tokenizer_cuts(model, tokenizer, captions):
    """The stock zero-shot pipeline does not truncate; the model does it, row by row."""
    texts = [captions[0], " ".join(captions[:2] * 10), captions[3] * 12]
    cut = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    whole = tokenizer(texts, return_tensors="pt", padding=True)
    assert whole["input_ids"].shape[1] > 52 == cut["input_ids"].shape[1]
    with torch.no_grad():
        expected = model.get_text_features(cut["input_ids"], cut["attention_mask"]).pooler_output
        given = model.get_text_features(whole["input_ids"], whole["attention_mask"]).pooler_output
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
        length = int(whole["attention_mask"][1].sum())
        unmasked = model.get_text_features(whole["input_ids"][1:2, :length]).pooler_output
        torch.testing.assert_close(unmasked, expected[1:2], atol=1e-6, rtol=0)


def test_other_image_sizes(model, batch):
    with torch.no_grad():
        same = model.get_image_features(batch["pixel_values"], interpolate_pos_encoding=True).pooler_output
        larger = torch.randn(2, 3, 48, 64)
        output = model.get_image_features(larger, interpolate_pos_encoding=True)
        table = model.encoder.vision_embeddings.interpolate_positions(32, 32)
    assert torch.equal(same, model.get_image_features(batch["pixel_values"]).pooler_output)
    assert output.last_hidden_state.shape == (2, 1 + 6 * 8, 32)
    # Resizing to the table's own size is the identity, and so is not resizing at all, which is what happens.
    torch.testing.assert_close(table, model.encoder.vision_embeddings.position_embeddings.weight[2:])


# ---- Patch dropping


def test_kept_patches_are_all_that_is_seen(model, batch):
    """Other pixels in the dropped patches change no bit; in a kept one they do."""
    pixels = batch["pixel_values"]
    kept = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5] for i in range(6)])
    seen = torch.zeros(6, 16, dtype=torch.bool).scatter(1, kept, True)
    block = seen.reshape(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        output = model.get_image_features(pixels, kept_patches=kept)
        same = model.get_image_features(torch.where(block, pixels, 7.0), kept_patches=kept)
        other = model.get_image_features(torch.where(block, 7.0, pixels), kept_patches=kept)
        embeds = model(**batch, kept_patches=kept).image_embeds
    assert output.last_hidden_state.shape == (6, 1 + 5, 32)
    assert torch.equal(output.pooler_output, same.pooler_output)
    assert (output.pooler_output - other.pooler_output).abs().max() > 1e-3
    assert torch.equal(embeds, torch.nn.functional.normalize(output.pooler_output, dim=-1))


def test_keeping_all_patches_changes_nothing(model, batch):
    """In their order to the last bit, and in any order: positions go with their patches."""
    pixels = batch["pixel_values"]
    in_order = torch.arange(16).expand(6, -1)
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0)).expand(6, -1)
    with torch.no_grad():
        plain, same, other = (
            model.get_image_features(pixels, kept_patches=kept).pooler_output for kept in (None, in_order, shuffled)
        )
        larger = torch.randn(2, 3, 48, 64)
        whole, kept = (
            model.get_image_features(larger, interpolate_pos_encoding=True, kept_patches=kept).pooler_output
            for kept in (None, torch.arange(48).flip(0).expand(2, -1))
        )
    assert torch.equal(plain, same)
    torch.testing.assert_close(plain, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, kept, atol=1e-5, rtol=0)


def test_bad_kept_patches_are_named(model, batch):
    pixels = batch["pixel_values"]
    cases = [
        (torch.zeros(6, 4), r"int64 \[6, 1 to 16\], .* got torch.float32 \[6, 4\]"),
        (torch.ones(6, 16, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(5, 4, dtype=torch.long), r"got torch.int64 \[5, 4\]"),
        (torch.zeros(6, 0, dtype=torch.long), r"\[6, 0\]"),
        (torch.zeros(6, 17, dtype=torch.long), r"\[6, 17\]"),
        (torch.full((6, 2), 16), r"lie in \[0, 15\], got 16 to 16"),
        (torch.full((6, 2), -1), "got -1"),
    ]
    for kept, named in cases:
        with pytest.raises(ValueError, match=named):
            model.get_image_features(pixels, kept_patches=kept)


# ---- Initialisation


def test_initial_weights_follow_magneto():
    torch.manual_seed(0)
    config = M2EncoderConfig(
        vocab_size=500,
        hidden_size=256,
        num_hidden_layers=4,
        num_upper_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        mask_token_id=None,
    )
    encoder = M2EncoderModel(config).encoder
    for layer, depth in ((encoder.layers[1]["text"], 4), (encoder.upper_layers[0], 2)):
        scaled = 0.02 * math.sqrt(math.log(2 * depth))
        for linear in (layer.self_attn.v_proj, layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            assert linear.weight.std().item() == pytest.approx(scaled, rel=0.02)
            assert not linear.bias.any()
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_sincos_positions(config, batch, tmp_path: Path):
    """By the formula, place by place; class row and unused rows as without; learned; drawn only where missing."""
    models = []
    for kind in ("normal", "sincos"):
        torch.manual_seed(0)
        models.append(M2EncoderModel(M2EncoderConfig(**{**config.to_dict(), "position_init": kind})).train())
    normal, sincos = models
    table = sincos.encoder.vision_embeddings.position_embeddings.weight
    for patch in range(16):
        y, x = divmod(patch, 4)
        frequencies = [1 / 4 ** (i / 8) for i in range(8)]
        expected = [2 * f(p * w) for p in (x, y) for f in (math.sin, math.cos) for w in frequencies]
        torch.testing.assert_close(table[3 + patch].detach(), torch.tensor(expected), atol=1e-6, rtol=0)
    name, text = (f"encoder.{kind}_embeddings.position_embeddings.weight" for kind in ("vision", "text"))
    states = [model.state_dict() for model in models]
    for place in range(len(states[1][text]) - 2):
        frequencies = [(len(states[1][text]) - 2) ** -(i / 16) for i in range(16)]
        expected = [0.04 * f(place * w) for f in (math.sin, math.cos) for w in frequencies]
        torch.testing.assert_close(states[1][text][2 + place], torch.tensor(expected), atol=1e-6, rtol=0)
    for key, drawn in ((name, 3), (text, 2)):
        assert torch.equal(states[0][key][:drawn], states[1][key][:drawn])
        assert not torch.equal(states[0][key], states[1][key])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] if key not in (name, text))
    sincos(**batch, return_loss=True).loss.backward()
    assert (table.grad[2:].abs().sum(dim=1) > 0).all()

    # Loading neither resets what a file holds nor leaves raw memory where it holds nothing.
    with torch.no_grad():
        table += 1
    sincos.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).state_dict()[name], table)
    save_file({k: v for k, v in sincos.state_dict().items() if k != name}, tmp_path / "model.safetensors")
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()[name]
    torch.testing.assert_close(loaded[3:], table[3:] - 1, atol=1e-6, rtol=0)
    assert loaded[:3].std().item() == pytest.approx(0.02, rel=0.5)
    with torch.device("meta"):
        assert M2EncoderModel(sincos.config).state_dict()[name].shape == (19, 32)


def test_missing_weights_are_initialised(checkpoint: Path, config, tmp_path: Path):
    """from_pretrained builds on the meta device; what no file holds must still be set, not left as raw memory."""
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "model.safetensors")
    dropped = ["logit_scale", "encoder.vision_embeddings.cls_token", "encoder.layers.0.text.self_attn.v_proj.weight"]
    save_file({k: v for k, v in weights.items() if k not in dropped}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["missing_keys"]) == sorted(dropped)
    assert loaded.logit_scale.item() == pytest.approx(2.6592)
    assert loaded.encoder.vision_embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    value = loaded.encoder.layers[0]["text"].self_attn.v_proj.weight
    assert value.std().item() == pytest.approx(0.02 * math.sqrt(math.log(4)), rel=0.1)


def test_drop_path():
    branch = torch.ones(4000, 2, 3)
    assert drop_path(branch, 0.25, training=False) is branch and drop_path(branch, 0.0, training=True) is branch
    torch.manual_seed(0)
    dropped = drop_path(branch, 0.25, training=True)
    assert len(dropped.unique()) == 2  # kept or dropped, nothing between
    assert dropped.max().item() == pytest.approx(1 / 0.75)
    assert (dropped == dropped[:, :1, :1]).all()  # whole samples
    assert (dropped[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


# ---- dtypes and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint(model, processor, batch, dtype, tmp_path: Path):
    model.to(dtype).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    with torch.no_grad():
        output = loaded(**batch)  # fp32 pixels into a half-precision model
    assert output.image_embeds.dtype == dtype and torch.isfinite(output.logits_per_image).all()


# ---- Bad input


def test_wrong_shapes_are_named(model, batch):
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    cases = [
        ({}, "nothing to encode"),
        ({"input_ids": ids[0]}, r"\[batch, tokens\]"),
        ({"input_ids": ids.float()}, "must be integers"),
        ({"input_ids": ids[:, :0]}, "no tokens"),
        ({"input_ids": ids, "attention_mask": mask[:, :-1]}, "shape of input_ids"),
        ({"input_ids": ids, "attention_mask": mask[:3]}, "shape of input_ids"),
        ({"input_ids": ids, "attention_mask": mask.flip(1)}, "pad on the right"),
        ({"input_ids": ids + 10_000}, "another model's tokenizer"),
        ({"input_ids": ids - 10_000}, "another model's tokenizer"),
        ({"pixel_values": pixels[0]}, "height, width"),
        ({"pixel_values": pixels[:, :1]}, "height, width"),
        ({"pixel_values": pixels.transpose(1, 3)}, "height, width"),
        ({"pixel_values": pixels[..., :16, :]}, "32 x 32 pixels, got 16 x 32"),
        ({"pixel_values": (pixels * 255).to(torch.uint8)}, "floating-point"),
        (
            {"pixel_values": torch.randn(1, 3, 20, 32), "interpolate_pos_encoding": True},
            "20 x 32; the nearest is 16 x 32",
        ),
        ({"pixel_values": torch.randn(1, 3, 3, 47), "interpolate_pos_encoding": True}, "the nearest is 8 x 48"),
        ({"pixel_values": torch.randn(1, 3, 0, 32), "interpolate_pos_encoding": True}, "the nearest is 8 x 32"),
        ({"input_ids": ids[:2], "pixel_values": pixels, "return_loss": True}, "one text for each image"),
        ({"input_ids": ids, "return_loss": True}, "one text for each image"),
    ]
    for arguments, named in cases:
        with pytest.raises(ValueError, match=named):
            model(**arguments)


def test_different_numbers_of_texts_and_images_give_logits(model, batch):
    output = model(input_ids=batch["input_ids"][:2], pixel_values=batch["pixel_values"])
    assert output.logits_per_image.shape == (6, 2)
