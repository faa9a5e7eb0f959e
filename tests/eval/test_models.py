"""Adapters: each equals a direct computation with the library's own classes; what cannot be loaded says why."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from eval.data import open_table
from eval.embed import Encoder
from eval.models import FAMILIES, adapt, load
from eval.ranks import retrieval_ranks
from tests.eval.tiny_models import TINY, save_tiny

LONG = "a red dog and a big blue circle " * 40
TEXTS = ["a red dog", "a red Dog", "一张红色的狗的照片", "two “big” cats", LONG]

# How each of them is used in its own documentation: the class, the longest text, and where the embedding is. The text
# is written here as it reaches the tokenizer.
DIRECT: dict[str, dict[str, Any]] = {
    "clip": {"model": transformers.CLIPModel, "length": 77, "padding": True},
    "metaclip_2": {"model": transformers.MetaClip2Model, "length": 77, "padding": True},
    "chinese_clip": {
        "model": transformers.ChineseCLIPModel,
        "length": 52,
        "padding": True,
        "texts": ["a red dog", "a red dog", "一张红色的狗的照片", 'two "big" cats', LONG],
    },
    "altclip": {"model": transformers.AltCLIPModel, "length": 77, "padding": True},
    "align": {"model": transformers.AlignModel, "length": 64, "padding": "max_length"},
    "flava": {"model": transformers.FlavaModel, "length": 77, "padding": "max_length", "first": True},
    "siglip": {"model": transformers.SiglipModel, "length": 64, "padding": "max_length", "mask": False},
    "siglip, tokenizer of SigLIP 2": {
        "model": transformers.SiglipModel,
        "length": 64,
        "padding": "max_length",
        "mask": False,
        "texts": [text.lower() for text in TEXTS],
    },
    "siglip2": {"model": transformers.Siglip2Model, "length": 64, "padding": "max_length", "mask": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: save_tiny(kind, root / re.sub(r"\W+", "-", kind)) for kind in TINY}


def test_every_family_has_a_tiny_model():
    assert {kind.partition(",")[0] for kind in TINY} == set(FAMILIES) - {"m2_encoder"} and set(TINY) == set(DIRECT)


@pytest.mark.parametrize("kind", TINY)
def test_equals_the_library(kind, folders, images):
    direct = DIRECT[kind]
    model = direct["model"].from_pretrained(folders[kind]).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders[kind])
    texts = direct.get("texts", TEXTS)
    limit = {"max_length": direct["length"], "truncation": True}
    inputs = processor.tokenizer(texts, padding=direct["padding"], return_tensors="pt", **limit)
    assert inputs["input_ids"].shape[1] == direct["length"]  # LONG is cut there
    if not direct.get("mask", True):
        inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        text_features = model.get_text_features(**inputs).pooler_output
        image_features = model.get_image_features(**processor.image_processor(images, return_tensors="pt"))
    image_features = image_features.pooler_output
    if direct.get("first"):
        text_features, image_features = text_features[:, 0], image_features[:, 0]
    adapter = load(folders[kind])
    assert (adapter.encode_texts(TEXTS) - text_features).abs().max() < 1e-6
    assert (adapter.encode_images(images) - image_features).abs().max() < 1e-6
    assert text_features.std(dim=0).max() > 1e-3 and image_features.std(dim=0).max() > 1e-3  # inputs make a difference


@pytest.mark.parametrize("kind", sorted(set(TINY) - {"flava"}))
def test_features_are_those_of_the_joint_forward(kind, folders, images):
    """Against what the model itself compares when it is given images and texts together (FLAVA: the next test)."""
    direct = DIRECT[kind]
    adapter = load(folders[kind])
    processor = adapter.processor
    texts = direct.get("texts", TEXTS)[:4]
    inputs = processor.tokenizer(texts, padding=direct["padding"], max_length=64, truncation=True, return_tensors="pt")
    if not direct.get("mask", True):
        inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        output = adapter.model(**inputs, **processor.image_processor(images, return_tensors="pt"))
    encoder = Encoder(adapter)
    assert (encoder.texts(TEXTS[:4]) - output.text_embeds).abs().max() < 1e-5
    features = torch.nn.functional.normalize(adapter.encode_images(images), dim=-1)
    assert (features - output.image_embeds).abs().max() < 1e-5


def test_flava_features_are_what_its_contrastive_loss_compares(folders, images):
    torch.manual_seed(0)
    whole = transformers.FlavaForPreTraining(transformers.FlavaConfig.from_pretrained(folders["flava"])).eval()
    adapter = load(folders["flava"])
    whole.flava.load_state_dict(adapter.model.state_dict())
    tokens = adapter.processor.tokenizer(TEXTS[:4], padding="max_length", max_length=77, return_tensors="pt")
    pixels = adapter.processor.image_processor(images[:4], return_tensors="pt")
    with torch.no_grad():
        output = whole(**tokens, **pixels, skip_unmasked_multimodal_encoder=True, return_loss=False)
    logits = output.contrastive_logits_per_image
    scale = whole.flava.logit_scale.exp()
    encoder = Encoder(adapter)
    own = torch.nn.functional.normalize(adapter.encode_images(images[:4]), dim=-1) @ encoder.texts(TEXTS[:4]).T
    assert (own * scale - logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", TINY)
def test_runs_a_task(kind, folders, write):
    """Images and captions of a file, to recalls: two images and texts, nothing tied."""
    table = open_table([write("a.parquet", ["red", "blue"])])
    encoder = Encoder(load(folders[kind]), batch_size=1)
    ranks = retrieval_ranks(encoder.images(table), encoder.texts(["a red photo", "a blue photo"]), torch.tensor([0, 1]))
    assert ranks.recall(2) == (1.0, 1.0) and ranks.num_tied_queries == 0


def test_images_of_every_mode(folders):
    """ALIGN's processor does not convert to RGB by itself."""
    images = [Image.new(mode, (20, 30), 3) for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA")]
    for kind in ("align", "clip", "flava"):
        assert load(folders[kind]).encode_images(images).isfinite().all()


def test_ours(checkpoint, model, processor, images, captions):
    adapter = load(checkpoint)
    batch = processor(text=captions, images=images, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch)
    encoder = Encoder(adapter)
    assert torch.allclose(encoder.texts(captions), output.text_embeds, atol=1e-6)
    assert torch.allclose(torch.nn.functional.normalize(adapter.encode_images(images)), output.image_embeds, atol=1e-6)
    about = adapter.describe()
    assert about["class"] == "M2EncoderModel" and about["model_type"] == "m2_encoder"
    assert about["parameters"] == sum(p.numel() for p in model.parameters())
    assert about["dtype"] == "float32" and about["max_text_length"] == 52 and about["name"] == str(checkpoint)
    assert json.loads(json.dumps(about)) == about


def test_text_rules(checkpoint):
    plain, official = load(checkpoint), load(checkpoint, text_rule="lower, straight quotes")
    assert official.encode_texts(["A “Red” Dog"]).equal(plain.encode_texts(['a "red" dog']))
    assert not official.encode_texts(["A “Red” Dog"]).equal(plain.encode_texts(["A “Red” Dog"]))


def test_dtype_and_autocast(checkpoint, captions):
    full, narrow = load(checkpoint), load(checkpoint, dtype="bfloat16")
    mixed = load(checkpoint, autocast="bfloat16")
    assert narrow.encode_texts(captions).dtype == torch.bfloat16
    assert next(mixed.model.parameters()).dtype == torch.float32
    for adapter in (narrow, mixed):
        difference = (Encoder(adapter).texts(captions) - Encoder(full).texts(captions)).abs().max()
        assert 1e-6 < difference < 0.1
    assert narrow.describe()["dtype"] == "bfloat16" and mixed.describe()["autocast"] == "bfloat16"


# ---- Fingerprints


def test_the_fingerprint_is_of_content(checkpoint, model, processor, tmp_path):
    """A copy is the same model; other weights, settings or preprocessing are another."""
    first = load(checkpoint).describe()["fingerprint"]
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert load(tmp_path / "copy").describe()["fingerprint"] == first
    assert adapt(model, processor).describe()["weights"] == load(checkpoint).describe()["weights"]
    others = [
        load(checkpoint, dtype="bfloat16"),
        load(checkpoint, autocast="bfloat16"),
        load(checkpoint, text_rule="lower"),
    ]
    with torch.no_grad():
        model.logit_scale += 1
        next(model.parameters())[0] += 1e-3
    others.append(adapt(model, processor))
    settings = json.loads((tmp_path / "copy" / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    (tmp_path / "copy" / "processor_config.json").write_text(json.dumps(settings))
    others.append(load(tmp_path / "copy"))
    fingerprints = [first, *(other.describe()["fingerprint"] for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)


# ---- What cannot be loaded


def test_raw_checkpoints_name_the_converter(tmp_path):
    (tmp_path / "m2_encoder_0.4B.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file.*python -m conversion.convert"):
        load(tmp_path / "m2_encoder_0.4B.ckpt")
    with pytest.raises(ValueError, match="it holds m2_encoder_0.4B.ckpt.*python -m conversion.convert"):
        load(tmp_path)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere \(no folder\)"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is empty"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a 'bert'; there are adapters for m2_encoder, clip,"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path)


def test_incomplete_and_damaged_weights(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    gone = next(name for name in weights if name.endswith("weight"))
    save_file({name: value for name, value in weights.items() if name != gone}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 of the weights of M2EncoderModel.*random numbers"):
        load(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(checkpoint)


def test_a_folder_without_a_processor(checkpoint):
    for path in checkpoint.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(checkpoint)


def test_an_unknown_hub_id_and_unknown_settings(checkpoint):
    with pytest.raises(ValueError, match="nobody/nothing cannot be loaded"):
        load("nobody/nothing")
    with pytest.raises(ValueError, match="dtype is one of.*not 'int8'"):
        load(checkpoint, dtype="int8")
    with pytest.raises(ValueError, match="autocast is one of.*not 'fp16'"):
        load(checkpoint, autocast="fp16")
    with pytest.raises(ValueError, match="text_rule is one of.*not 'upper'"):
        load(checkpoint, text_rule="upper")


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(tmp_path)


# ---- open_clip, which needs torchvision: a double of the three functions and two methods that are used of it


class ClipDouble(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean((2, 3)) @ self.weight

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return text[:, :3].to(self.weight.dtype) @ self.weight


@pytest.fixture
def open_clip(monkeypatch) -> SimpleNamespace:
    """`open_clip.create_model_from_pretrained` and `get_tokenizer` with the parameters of version 3.3."""
    asked = SimpleNamespace(calls=[])

    def create_model_from_pretrained(model_name, pretrained=None, precision="fp32", device="cpu", **kwargs):
        asked.calls.append((model_name, pretrained, precision, str(device)))
        if model_name == "ViT-Z":
            raise RuntimeError("Model config for ViT-Z not found.")
        dtype = {"fp32": torch.float32, "pure_bf16": torch.bfloat16}[precision]
        return ClipDouble().to(device, dtype), lambda image: torch.tensor(
            [[[channel / 255]] for channel in image.resize((1, 1)).getpixel((0, 0))]
        )

    def get_tokenizer(model_name="", context_length=None, **kwargs):
        return lambda texts: torch.tensor([[text.count(letter) for letter in "rgb"] + [0] * 74 for text in texts])

    module = ModuleType("open_clip")
    module.create_model_from_pretrained, module.get_tokenizer = create_model_from_pretrained, get_tokenizer
    monkeypatch.setitem(sys.modules, "open_clip", module)
    monkeypatch.setattr("eval.open_clip_adapter.versions", lambda *names: dict.fromkeys(names, "0"))
    return asked


def test_open_clip(open_clip):
    adapter = load("open_clip:ViT-g-14/laion2b_s34b_b88k", device="cpu")
    assert open_clip.calls == [("ViT-g-14", "laion2b_s34b_b88k", "fp32", "cpu")]
    red = adapter.encode_images([Image.new("L", (9, 9), 255), Image.new("RGB", (9, 9), (255, 0, 0))])
    assert red.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert adapter.encode_texts(["rrg", "b"]).tolist() == [[2, 1, 0], [0, 0, 1]]
    about = adapter.describe()
    assert about["name"] == "open_clip:ViT-g-14/laion2b_s34b_b88k" and about["parameters"] == 9
    narrow = load("open_clip:ViT-g-14/laion2b_s34b_b88k", dtype="bfloat16", device="cpu")
    assert narrow.encode_images([Image.new("L", (9, 9))]).dtype == torch.bfloat16
    assert narrow.describe()["fingerprint"] != about["fingerprint"]
    load("open_clip:hf-hub:laion/CLIP-ViT-B-32", device="cpu")
    assert open_clip.calls[-1] == ("hf-hub:laion/CLIP-ViT-B-32", None, "fp32", "cpu")


def test_open_clip_mistakes(open_clip, monkeypatch):
    with pytest.raises(ValueError, match="ARCHITECTURE/WEIGHTS"):
        load("open_clip:ViT-B-32", device="cpu")
    with pytest.raises(ValueError, match="ViT-Z/tag cannot be loaded: RuntimeError: Model config for ViT-Z"):
        load("open_clip:ViT-Z/tag", device="cpu")
    with pytest.raises(ValueError, match="no revision"):
        load("open_clip:ViT-B-32/openai", revision="main")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        load("open_clip:ViT-B-32/openai", device="cpu")
