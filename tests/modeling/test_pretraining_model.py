"""The pretraining model: what flows where, equivalences, exchange of folders with the inference model, parameters of
Table 9, bad input."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForPreTraining
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import modeling_m2encoder.modeling_m2encoder as modeling
from modeling_m2encoder import (
    M2EncoderConfig,
    M2EncoderForPreTraining,
    M2EncoderModel,
    M2EncoderTextModel,
    M2EncoderVisionModel,
)
from modeling_m2encoder.modeling_m2encoder_pretraining import M2EncoderForPreTrainingOutput

CONTEXTS = ["tokens", "cls"]


def build(config: M2EncoderConfig, **overrides) -> M2EncoderForPreTraining:
    """Weights that are far from the initial ones, so that every path has an effect that shows."""
    torch.manual_seed(0)
    values = {**config.to_dict(), "num_decoder_layers": 2, "initializer_range": 0.2, **overrides}
    return M2EncoderForPreTraining(M2EncoderConfig(**values)).eval()


@pytest.fixture
def pretrained(config) -> M2EncoderForPreTraining:
    return build(config)


@pytest.fixture
def batch(processor, captions, images) -> dict[str, Tensor]:
    """Six pairs; every third token that is neither [CLS] nor padding is masked, and a quarter of the patches is not."""
    batch = dict(processor(text=captions, images=images, return_tensors="pt"))
    places = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    batch["text_mask"] = (places % 3 == 1) & (batch["attention_mask"] == 1)
    batch["patch_mask"] = (torch.arange(16).expand(6, -1) + torch.arange(6)[:, None]) % 4 != 0
    return batch


def losses(output: M2EncoderForPreTrainingOutput) -> Tensor:
    return torch.stack([output.loss_cmlm, output.loss_cmim])


# ---- Interface


def test_outputs(pretrained, batch, config):
    with torch.no_grad():
        output = pretrained(**batch, return_loss=True)
        logits = pretrained.pretraining_heads.text_head(output.text_decoder_states)
    assert list(output)[:1] == ["loss"] and list(output)[-4:] == [
        "loss_cmlm",
        "loss_cmim",
        "text_decoder_states",
        "predicted_patches",
    ]
    assert output.text_decoder_states.shape == (*batch["input_ids"].shape, 32)
    assert output.predicted_patches.shape == (6, 16, 3 * 8 * 8)
    mask = batch["text_mask"]
    expected = torch.nn.functional.cross_entropy(logits[mask], batch["input_ids"][mask])
    assert output.loss_cmlm.item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_masks_it_is_the_inference_model(pretrained, batch):
    """The contrastive side is made from the whole inputs, whatever is masked."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        plain = M2EncoderModel.forward(pretrained, **inputs, return_loss=True)
        for output in (pretrained(**inputs, return_loss=True), pretrained(**batch, return_loss=True)):
            assert torch.equal(output.loss, plain.loss)
            assert torch.equal(output.text_embeds, plain.text_embeds)
            assert torch.equal(output.image_embeds, plain.image_embeds)
        alone = pretrained(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert alone.loss_cmlm is None and alone.image_embeds is None and torch.equal(alone[0], plain.text_embeds)


def test_masks_can_be_given_alone(pretrained, batch):
    with torch.no_grad():
        both = pretrained(**batch)
        text = pretrained(**{k: v for k, v in batch.items() if k != "patch_mask"})
        image = pretrained(**{k: v for k, v in batch.items() if k != "text_mask"})
        as_tuple = pretrained(**batch, return_dict=False)
    assert torch.equal(text.loss_cmlm, both.loss_cmlm) and text.loss_cmim is None
    assert torch.equal(image.loss_cmim, both.loss_cmim) and image.loss_cmlm is None
    assert torch.equal(as_tuple[-1], both.predicted_patches)


def test_other_image_sizes(pretrained, batch):
    larger = {**batch, "pixel_values": torch.randn(6, 3, 48, 64), "patch_mask": torch.rand(6, 48) < 0.75}
    with torch.no_grad():
        output = pretrained(**larger, interpolate_pos_encoding=True)
    assert output.predicted_patches.shape == (6, 48, 192) and torch.isfinite(losses(output)).all()


# ---- What flows where


@pytest.mark.parametrize("context", CONTEXTS)
def test_predictions_depend_on_the_other_modality(config, batch, context):
    model = build(config, decoder_context=context)
    with torch.no_grad():
        output = model(**batch)
        other_image = model(**{**batch, "pixel_values": batch["pixel_values"].roll(1, 0)})
        rolled = {name: batch[name].roll(1, 0) for name in ("input_ids", "attention_mask")}
        other_text = model(**{**batch, **rolled, "text_mask": batch["text_mask"].roll(1, 0)})
    words = model.pretraining_heads.text_head(output.text_decoder_states - other_image.text_decoder_states)
    assert words[batch["text_mask"]].abs().max() > 0.01
    assert (output.predicted_patches - other_text.predicted_patches).abs().max() > 0.01


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_context_is_all_tokens_or_only_cls(config, batch, context):
    """What the decoder makes of other states behind [CLS]."""
    model = build(config, decoder_context=context)
    decoder = model.pretraining_heads.image_to_text_decoder
    states, seen = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    behind = torch.cat([seen[:, :1], torch.randn(2, 6, 32)], dim=1)
    cls = torch.cat([torch.randn(2, 1, 32), seen[:, 1:]], dim=1)
    with torch.no_grad():
        same = torch.equal(decoder(states, seen), decoder(states, behind))
        assert same == (context == "cls")
        assert not torch.equal(decoder(states, seen), decoder(states, cls))


def test_masked_tokens_are_never_seen(pretrained, batch):
    """Another word behind the mask: the decoder of the text gives the same bits, the one of the image does not."""
    other = batch["input_ids"].clone()
    other[batch["text_mask"]] = (other[batch["text_mask"]] + 3) % pretrained.config.vocab_size
    with torch.no_grad():
        output = pretrained(**batch)
        changed = pretrained(**{**batch, "input_ids": other})
    assert torch.equal(output.text_decoder_states, changed.text_decoder_states)
    assert not torch.equal(output.loss_cmlm, changed.loss_cmlm)
    assert not torch.equal(output.predicted_patches, changed.predicted_patches)


def test_masked_patches_are_never_seen(pretrained, batch):
    """Other pixels behind the mask; the mask's place is a pixel block of 8 x 8."""
    block = batch["patch_mask"].reshape(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pixels = torch.where(block, batch["pixel_values"].flip(0) + 0.3, batch["pixel_values"])
    with torch.no_grad():
        output = pretrained(**batch)
        changed = pretrained(**{**batch, "pixel_values": pixels})
    assert torch.equal(output.predicted_patches, changed.predicted_patches)
    assert not torch.equal(output.loss_cmim, changed.loss_cmim)
    assert not torch.equal(output.text_decoder_states, changed.text_decoder_states)


@pytest.mark.parametrize("context", CONTEXTS)
def test_dropped_patches(config, batch, context):
    """The first pass and what CMLM sees of it do without them; CMIM's own pass holds all places."""
    model = build(config, decoder_context=context)
    kept = torch.arange(12).expand(6, -1)
    pixels = batch["pixel_values"].clone()
    pixels[:, :, 24:] += 1  # the last row of patches, which is not kept
    with torch.no_grad():
        whole, dropped = model(**batch), model(**batch, kept_patches=kept)
        changed = model(**{**batch, "pixel_values": pixels}, kept_patches=kept)
    assert dropped.vision_model_output.last_hidden_state.shape == (6, 13, 32)
    assert torch.equal(dropped.predicted_patches, whole.predicted_patches)
    assert torch.equal(dropped.loss_cmim, whole.loss_cmim)
    assert not torch.equal(dropped.text_decoder_states, whole.text_decoder_states)
    assert torch.equal(dropped.text_decoder_states, changed.text_decoder_states)
    assert torch.equal(dropped.image_embeds, changed.image_embeds)
    assert not torch.equal(dropped.predicted_patches, changed.predicted_patches)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["loss_cmlm", "loss_cmim"])
def test_each_loss_teaches_both_encoders(config, batch, context, name):
    model = build(config, decoder_context=context).train()
    getattr(model(**batch), name).backward()
    for part in ("layers.0.text.mlp.fc1", "layers.0.vision.mlp.fc1", "upper_layers.0.mlp.fc1"):
        assert model.encoder.get_submodule(part).weight.grad.abs().max() > 0, part


def test_every_parameter_learns(pretrained, batch):
    output = pretrained.train()(**batch, return_loss=True)
    (output.loss + 0.3 * output.loss_cmlm + 0.3 * output.loss_cmim).backward()
    # Softmax does not see a bias of the keys: its gradient is 0 but for rounding.
    learned = {n for n, p in pretrained.named_parameters() if p.grad is not None and p.grad.any()}
    assert not [n for n, _ in pretrained.named_parameters() if n not in learned and "k_proj.bias" not in n]


def test_it_can_learn_by_heart(config, batch):
    """A few steps on one batch, from the configured start: both masked losses fall far."""
    model = build(config, initializer_range=config.initializer_range).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(60):
        output = model(**batch)
        losses(output).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(losses(output).detach())
    assert seen[0][0].item() == pytest.approx(math.log(config.vocab_size), rel=0.1)
    assert seen[0][1].item() == pytest.approx(1, rel=0.1)  # normalised pixels have the variance 1
    assert (seen[-1] < torch.tensor([0.5, 0.9]) * seen[0]).all()


# ---- Equivalences


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_padding_changes_nothing(config, processor, captions, images, batch, implementation, context):
    model = build(config, decoder_context=context).double()
    model.set_attn_implementation(implementation)
    batch["pixel_values"] = batch["pixel_values"].double()
    padded = processor(text=captions, images=images, return_tensors="pt", padding="max_length")
    longer = padded["input_ids"].shape[1] - batch["input_ids"].shape[1]
    assert longer > 0
    padded = {
        **batch,
        "input_ids": padded["input_ids"],
        "attention_mask": padded["attention_mask"],
        "text_mask": torch.nn.functional.pad(batch["text_mask"], (0, longer)),
    }
    with torch.no_grad():
        short, long = model(**batch), model(**padded)
    torch.testing.assert_close(losses(short), losses(long), atol=1e-6, rtol=0)
    torch.testing.assert_close(short.predicted_patches, long.predicted_patches, atol=1e-6, rtol=0)


def test_sdpa_equals_eager(pretrained, batch, monkeypatch):
    """Against torch's own sdpa kernel, which the CPU path replaces by the written-out form."""
    with torch.no_grad():
        pretrained.set_attn_implementation("eager")
        eager = pretrained(**batch)
        pretrained.set_attn_implementation("sdpa")
        default = pretrained(**batch)
        calls = []
        kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setattr(
            modeling, "eager_attention_forward", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs)
        )
        sdpa = pretrained(**batch)
    assert len(calls) == 4 * 3 + 2 * 2 * 2  # four encoder passes of 3 layers; two decoders, two layers, two attentions
    for other in (default, sdpa):
        torch.testing.assert_close(losses(other), losses(eager), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.predicted_patches, eager.predicted_patches, atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(config, batch, use_reentrant):
    plain = build(config, drop_path_rate=0.3).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.pretraining_heads.text_to_image_decoder.layers[0].gradient_checkpointing
    seen = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)  # the same paths are dropped
        output = model(**batch, return_loss=True)
        (output.loss + losses(output).sum()).backward()
        seen.append(losses(output))
    assert torch.equal(*seen)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if use_reentrant:  # it adds the gradients of states that are used twice in another order
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(a.grad, b.grad), name


def test_half_precision(pretrained, batch):
    with torch.no_grad():
        expected = losses(pretrained(**batch))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = losses(pretrained(**batch))
        output = pretrained.to(torch.bfloat16)(**batch)
    assert mixed.dtype == losses(output).dtype == torch.float32
    torch.testing.assert_close(mixed, expected, rtol=0.05, atol=0)
    torch.testing.assert_close(losses(output), expected, rtol=0.05, atol=0)


def test_autocast_trains_with_fp32_gradients(pretrained, batch):
    """bf16 products, fp32 weights: each gradient is fp32 and points where the exact one does."""
    gradients = []
    for enabled in (False, True):
        model = copy.deepcopy(pretrained).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**batch, return_loss=True)
            total = output.loss + losses(output).sum()
        total.backward()
        assert total.dtype == torch.float32 and output.text_decoder_states.dtype == torch.float32
        gradients.append({name: p.grad for name, p in model.named_parameters() if "k_proj.bias" not in name})
    for name, exact in gradients[0].items():
        rounded = gradients[1][name]
        assert rounded.dtype == torch.float32, name
        assert torch.nn.functional.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.98, name


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


def test_the_published_vocabulary_never_has_the_logits_of_a_batch():
    """384 masked tokens of 115,244: the largest tensor of forward and backward is one chunk of 256 rows."""
    config = M2EncoderConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_upper_layers=0,
        num_decoder_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        projection_dim=8,
        image_size=32,
    )
    torch.manual_seed(0)
    model = M2EncoderForPreTraining(config).train()
    batch = {"input_ids": torch.randint(50005, 115_244, (16, 40)), "pixel_values": torch.randn(16, 3, 32, 32)}
    mask = torch.zeros(16, 40, dtype=torch.bool)
    mask[:, 5:29] = True
    with LargestTensor() as seen:
        model(**batch, text_mask=mask, patch_mask=torch.ones(16, 4, dtype=torch.bool)).loss_cmlm.backward()
    assert seen.elements == 256 * 115_244 < 384 * 115_244
    assert model.pretraining_heads.text_head.weight.grad.any()


def test_pixels_as_they_enter(config, batch):
    model = build(config, normalize_pixels=False)
    with torch.no_grad():
        output = model(**batch)
    mask = batch["patch_mask"]
    patches = torch.nn.functional.unfold(batch["pixel_values"], 8, stride=8).transpose(1, 2)
    expected = (output.predicted_patches - patches)[mask].square().mean()
    assert output.loss_cmim.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- Folders


def test_saved_and_reloaded(pretrained, batch, tmp_path):
    pretrained.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["M2EncoderForPreTraining"]
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is M2EncoderForPreTraining and not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(losses(loaded(**batch)), losses(pretrained(**batch)))


@pytest.mark.parametrize("kind", [M2EncoderModel, M2EncoderTextModel, M2EncoderVisionModel])
def test_a_pretraining_folder_serves_inference(kind, pretrained, batch, tmp_path):
    """Bit-identical embeddings, the heads left in the file without a word."""
    pretrained.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not [name for name in loaded.state_dict() if "pretraining" in name or "decoder" in name]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected = pretrained(**inputs)
        if kind is not M2EncoderVisionModel:
            text = loaded.get_text_features(batch["input_ids"], batch["attention_mask"])
            assert torch.equal(text.pooler_output, expected.text_model_output.pooler_output)
        if kind is not M2EncoderTextModel:
            image = loaded.get_image_features(batch["pixel_values"])
            assert torch.equal(image.pooler_output, expected.vision_model_output.pooler_output)


def test_auto_model_of_a_pretraining_folder_is_the_inference_model(pretrained, tmp_path):
    pretrained.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is M2EncoderModel
    state = pretrained.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    # ... and back: a folder that the inference model wrote.
    loaded.save_pretrained(tmp_path / "plain")
    assert AutoModelForPreTraining.from_pretrained(tmp_path / "plain").config.num_decoder_layers == 2


def test_a_plain_folder_starts_pretraining(model, batch, tmp_path):
    """Encoder to the bit, heads new, and said so."""
    model.save_pretrained(tmp_path)
    loaded, info = M2EncoderForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    heads = {f"pretraining_heads.{name}" for name, _ in loaded.pretraining_heads.named_parameters()}
    assert set(info["missing_keys"]) == heads and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        output = loaded(**batch)
        assert torch.equal(output.text_embeds, model(batch["input_ids"], None, batch["attention_mask"]).text_embeds)
    assert output.loss_cmlm.item() == pytest.approx(math.log(model.config.vocab_size), rel=0.1)


def test_left_over_decoder_layers_are_heard_of(pretrained, tmp_path):
    pretrained.save_pretrained(tmp_path)
    config = M2EncoderConfig.from_pretrained(tmp_path, num_decoder_layers=1)
    _, info = M2EncoderForPreTraining.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert all(".layers.1." in name for name in info["unexpected_keys"]) and info["unexpected_keys"]


def test_initial_weights(config):
    torch.manual_seed(0)
    values = {**config.to_dict(), "hidden_size": 256, "intermediate_size": 512, "num_decoder_layers": 4}
    model = M2EncoderForPreTraining(M2EncoderConfig(**values))
    heads, std = model.pretraining_heads, 0.02
    assert heads.mask_token.std().item() == pytest.approx(std, rel=0.2)
    assert heads.text_head.weight.std().item() == pytest.approx(std, rel=0.1) and not heads.text_head.bias.any()
    layer = heads.text_to_image_decoder.layers[1]
    for linear in (layer.cross_attn.v_proj, layer.cross_attn.out_proj, layer.self_attn.v_proj, layer.mlp.fc2):
        assert linear.weight.std().item() == pytest.approx(std * math.sqrt(math.log(12)), rel=0.03)
    assert layer.cross_attn.k_proj.weight.std().item() == pytest.approx(std, rel=0.03)
    # The encoder keeps its own factor: depth 2.
    value = model.encoder.layers[0]["text"].self_attn.v_proj.weight
    assert value.std().item() == pytest.approx(std * math.sqrt(math.log(4)), rel=0.03)
    assert model.logit_scale.item() == pytest.approx(2.6592)


def test_resized_vocabulary(pretrained, batch):
    size = pretrained.config.vocab_size + 5
    pretrained.resize_token_embeddings(size)
    heads = pretrained.pretraining_heads
    assert heads.text_head.weight.shape == (size, 32) and heads.text_head.bias.shape == (size,)
    with torch.no_grad():
        assert torch.isfinite(losses(pretrained(**batch))).all()


# ---- Sizes


@pytest.mark.parametrize(
    ("size", "decoder_layers", "published"), [("0.4B", 4, 402e6), ("1B", 3, 924e6), ("10B", 2, 11.2e9)]
)
def test_parameters_of_table_9(size, decoder_layers, published):
    config = M2EncoderConfig.from_size(size)
    with torch.device("meta"):
        model = M2EncoderForPreTraining(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert config.num_decoder_layers == decoder_layers
    assert total == pytest.approx(published, rel=0.02)
    # By hand: two decoders, of layers with 8 D x D and 2 F x D projections, 5 norms over D and 1 over F; a norm each;
    # two outputs; one token.
    d, f = config.hidden_size, config.intermediate_size
    layer = 8 * (d * d + d) + 2 * f * d + f + d + 2 * (5 * d) + 2 * f
    heads = 2 * (decoder_layers * layer + 2 * d) + (d + 1) * (115_244 + 768) + d
    with torch.device("meta"):
        plain = sum(parameter.numel() for parameter in M2EncoderModel(config).parameters())
    assert total == plain + heads


def test_nano_stays_small():
    config = M2EncoderConfig.from_size("nano", bos_token_id=0, eos_token_id=1, pad_token_id=1, mask_token_id=2)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in M2EncoderForPreTraining(config).parameters()) < 3_000_000


# ---- Bad input


def test_bad_masks_are_named(pretrained, batch):
    text, patches, pixels = batch["text_mask"], batch["patch_mask"], batch["pixel_values"]
    cases = [
        ({"text_mask": text[:, 1:]}, r"text_mask must be bool \[6, \d+\]"),
        ({"text_mask": text.long()}, "text_mask must be bool"),
        ({"text_mask": torch.ones_like(text)}, "covers padding"),
        ({"patch_mask": patches[:, 1:]}, r"patch_mask must be bool \[6, 16\], got torch.bool \[6, 15\]"),
        ({"patch_mask": patches[:1]}, "patch_mask must be bool"),
        ({"patch_mask": patches.float()}, "patch_mask must be bool"),
        ({"pixel_values": None}, "cross-modal"),
        ({"pixel_values": pixels[:3]}, "cross-modal"),
        ({"input_ids": None, "attention_mask": None}, "cross-modal"),
    ]
    for changed, named in cases:
        with pytest.raises(ValueError, match=named):
            pretrained(**{**batch, **changed})


def test_no_mask_token(config, batch):
    model = build(config, mask_token_id=None)
    with pytest.raises(ValueError, match="mask_token_id is not set"):
        model(**batch)
    with torch.no_grad():
        assert model(**{k: v for k, v in batch.items() if k != "text_mask"}).loss_cmim.isfinite()


def test_masked_texts_are_not_cut(config, batch):
    model = build(config, max_text_length=5)
    with pytest.raises(ValueError, match="at most config.max_text_length = 5"):
        model(**batch)


def test_nothing_masked_costs_nothing(pretrained, batch):
    """A rank whose batch has nothing to mask still takes part in every gradient."""
    output = pretrained.train()(
        **{**batch, "text_mask": torch.zeros_like(batch["text_mask"]), "patch_mask": batch["patch_mask"] & False}
    )
    losses(output).sum().backward()
    assert losses(output).tolist() == [0, 0]
    heads = pretrained.pretraining_heads
    assert not heads.text_head.weight.grad.any() and not heads.pixel_head.weight.grad.any()
