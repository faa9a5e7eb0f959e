"""sentence-transformers takes a Hub folder as it is, fine-tunes it, and what it saves is a Hub folder again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from conversion.convert import convert
from modeling_m2encoder import M2EncoderModel
from modeling_m2encoder.hub_folder import save_hub_folder, write_hub_extras

LONG = ["a red circle, " * 40 + "and a blue square", "红色的圆在蓝色方块的左边，" * 20 + "灰色背景"]


@pytest.fixture
def hub(model, processor, tmp_path) -> Path:
    return save_hub_folder(model, processor, tmp_path / "hub")


def load(folder: Path, **kwargs) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", processor_kwargs={"backend": "pil"}, **kwargs)


def by_hand(folder: Path, texts: list[str], images: list) -> tuple[np.ndarray, np.ndarray]:
    """The normalised features of a folder, through transformers only."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        text = model.get_text_features(**processor(text=texts, return_tensors="pt")).pooler_output
        image = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    return normalize(text, dim=-1).numpy(), normalize(image, dim=-1).numpy()


# ---- Encoding ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["as training writes it", "as conversion writes it"])
def folder(request, hub, tiny_state, tiny_config, tokenizer, tmp_path) -> Path:
    if request.param == "as training writes it":
        return hub
    torch.save(tiny_state, tmp_path / "official.ckpt")
    convert(tmp_path / "official.ckpt", tmp_path / "converted", tokenizer, official_config=tiny_config)
    return tmp_path / "converted"


def test_texts_and_images_are_the_models_features(folder, images, captions, tmp_path):
    loaded = load(folder)
    assert type(loaded[0].model) is M2EncoderModel  # the installed class: no trust_remote_code was given
    assert loaded.modalities == ["text", "image"] and loaded.max_seq_length == 52
    texts = [*captions, *LONG, ""]
    expected_texts, expected_images = by_hand(folder, texts, images)
    seen = loaded.encode(texts)
    assert seen.shape == (len(texts), loaded.get_embedding_dimension()) and seen.dtype == np.float32
    # in batches of another make-up, so with other padding
    assert np.abs(seen - expected_texts).max() <= 1e-6
    assert np.abs(loaded.encode(texts, batch_size=2) - expected_texts).max() <= 1e-6
    assert np.abs(loaded.encode(images) - expected_images).max() <= 1e-6
    # A string that is the path of an image is read as that image.
    for place, image in enumerate(images):
        image.save(tmp_path / f"{place}.png")
    paths = [str(tmp_path / f"{place}.png") for place in range(len(images))]
    assert np.abs(loaded.encode(paths) - expected_images).max() <= 1e-6


def test_long_texts_lose_their_beginning(hub):
    loaded = load(hub)
    ends = ["a blue square on a grey background", "灰色背景上有三颗小星星"]
    for end, filler in zip(ends, ("red circle ", "红色的圆"), strict=True):
        one, other, begun = loaded.encode([filler * 60 + end, filler * 90 + end, end + filler * 60])
        assert np.abs(one - other).max() <= 1e-6 < np.abs(one - begun).max()


def test_both_modalities_in_one_call_are_refused(hub, images):
    with pytest.raises(ValueError, match="[Ee]ncode each modality separately"):
        load(hub).encode(["a red circle", images[0]])


def test_truncate_dim(hub, images, captions):
    """Cut after normalising: shorter than 1 unless asked; cosine similarity does not care."""
    whole = load(hub).encode(captions)
    short = load(hub, truncate_dim=8)
    assert short.get_embedding_dimension() == 8
    cut, renormalised = short.encode(captions), short.encode(captions, normalize_embeddings=True)
    assert np.array_equal(cut, whole[:, :8]) and (np.linalg.norm(cut, axis=1) < 0.99).all()
    assert np.abs(renormalised - cut / np.linalg.norm(cut, axis=1, keepdims=True)).max() <= 1e-6
    pictures = short.encode(images)
    similarity = short.similarity(pictures, cut)
    expected = normalize(torch.tensor(pictures), dim=-1) @ torch.tensor(renormalised).T
    assert (similarity - expected).abs().max() <= 1e-6


def test_similarity_is_the_cosine_of_the_logits(hub, images, captions):
    loaded, model, processor = load(hub), AutoModel.from_pretrained(hub), AutoProcessor.from_pretrained(hub)
    similarity = loaded.similarity(loaded.encode(images), loaded.encode(captions))
    with torch.no_grad():
        logits = model(**processor(text=captions, images=images, return_tensors="pt", backend="pil")).logits_per_image
    assert (similarity - logits / model.logit_scale.exp()).abs().max() <= 1e-6


# ---- Fine-tuning ---------------------------------------------------------------------------------------------------


def train(model: SentenceTransformer, data: Dataset, place: Path, **loss_settings) -> list[float]:
    """Three steps; the losses."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(place),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model, **loss_settings)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def pairs(images, captions) -> Dataset:
    """Twelve images with a caption each."""
    pictures = [image.rotate(angle) for angle in (0, 180) for image in images]
    texts = [f"{caption}{end}" for end in ("", "。") for caption in captions]
    return Dataset.from_dict(
        {"image": pictures, "text": texts}, features=Features({"image": Image(), "text": Value("string")})
    )


@pytest.fixture
def translations(captions) -> Dataset:
    english = [f"{end}{caption}" for end in ("", "look: ", "see ") for caption in captions[:3]]
    chinese = [f"{end}{caption}" for end in ("", "请看", "看") for caption in captions[3:]]
    return Dataset.from_dict({"anchor": english, "positive": chinese})


def moved(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def part(name: str) -> str:
    if ".vision" in name or name.startswith(("encoder.vision_", "image_projection")):
        return "vision"
    if ".text" in name or name.startswith(("encoder.text_", "text_projection")):
        return "text"
    return "logit_scale" if name == "logit_scale" else "shared"


@pytest.mark.parametrize("what", ["translations", "pairs"])
def test_three_steps_move_the_towers_that_are_used(what, request, hub, tmp_path):
    loaded = load(hub)
    before = {name: tensor.clone() for name, tensor in loaded[0].model.state_dict().items()}
    symmetric = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    losses = train(loaded, request.getfixturevalue(what), tmp_path / "run", **symmetric)
    assert len(losses) == 3 and np.isfinite(losses).all()
    changed = moved(before, loaded[0].model)
    # The scale is the loss's own number there, not the model's parameter.
    parts = {"text", "shared"} if what == "translations" else {"text", "shared", "vision"}
    # Row 0 and 1 of the position tables, and a bias added to every key, change nothing: their gradient is zero. The
    # optimizer moves the key bias by rounding errors at most.
    for name in before:
        if part(name) not in parts:
            assert name not in changed, name
        elif "k_proj.bias" not in name:
            assert name in changed, name


# ---- Saving --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(hub, pairs, tmp_path) -> tuple[SentenceTransformer, Path]:
    loaded = load(hub)
    train(loaded, pairs, tmp_path / "run")
    loaded.save_pretrained(str(tmp_path / "tuned"), create_model_card=False)  # the card copies training images
    return loaded, tmp_path / "tuned"


def test_what_was_tuned_loads_everywhere(tuned, hub, images, captions):
    loaded, folder = tuned
    texts = [*captions, *LONG]
    seen_texts, seen_images = loaded.encode(texts), loaded.encode(images)
    assert np.abs(seen_texts - load(hub).encode(texts)).max() > 1e-3  # it learned something
    again = load(folder)
    assert np.array_equal(again.encode(texts), seen_texts) and np.array_equal(again.encode(images), seen_images)
    plain_texts, plain_images = by_hand(folder, texts, images)
    assert np.abs(plain_texts - seen_texts).max() <= 1e-6 and np.abs(plain_images - seen_images).max() <= 1e-6


def test_what_saving_keeps(tuned, hub):
    """All but preprocessor_config.json, which no library writes any more, and the code of the pretraining heads, which
    the saved model does not have; `write_hub_extras` adds both."""
    _, folder = tuned
    names = {path.name for path in hub.iterdir()}
    lost = {"preprocessor_config.json", "modeling_m2encoder_pretraining.py"}
    assert {path.name for path in folder.iterdir()} == names - lost
    for name in [path.name for path in folder.glob("*.py")] + ["tokenizer.json"]:
        assert (folder / name).read_bytes() == (hub / name).read_bytes(), name
    config = json.loads((folder / "config.json").read_text())
    config.pop("use_cache", None)  # sentence-transformers sets it for every model; it means nothing to an encoder
    assert config == json.loads((hub / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.model_max_length, tokenizer.truncation_side, tokenizer.padding_side) == (52, "left", "right")
    write_hub_extras(folder)
    assert {path.name for path in folder.iterdir()} == names
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((hub / name).read_text()), name


def test_the_max_length_of_the_last_call_is_not_saved(hub, tmp_path):
    """The tokenizer's library writes it into tokenizer.json, from where it would become the processor's default."""
    processor, long = AutoProcessor.from_pretrained(hub), ["red circle " * 60]
    assert len(processor(text=long, max_length=20)["input_ids"][0]) == 20
    processor.save_pretrained(tmp_path / "saved")
    assert len(AutoProcessor.from_pretrained(tmp_path / "saved")(text=long)["input_ids"][0]) == 52


def test_completing_a_folder_keeps_what_sentence_transformers_wrote(hub, captions, tmp_path):
    loaded = load(hub, prompts={"query": "a picture of "}, default_prompt_name="query", truncate_dim=8)
    loaded.save_pretrained(str(tmp_path / "saved"))
    write_hub_extras(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.prompts["query"] == "a picture of " and again.truncate_dim == 8
    assert np.array_equal(again.encode(captions), loaded.encode(captions))


REMOTE = """
import sys
sys.modules["modeling_m2encoder"] = None  # not installed
import json
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor
folder, trust = sys.argv[1], dict(trust_remote_code=True)
loaded = SentenceTransformer(folder, device="cpu", processor_kwargs={"backend": "pil"}, **trust)
AutoModel.from_pretrained(folder, **trust), AutoModelForZeroShotImageClassification.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust, backend="pil")
print(json.dumps({"module": type(loaded[0].model).__module__, "texts": loaded.encode(["red circle"]).tolist(),
                  "images": loaded.encode(["picture.png"]).tolist(),
                  "ids": processor(text=["red circle " * 60])["input_ids"]}))
"""


def test_what_was_tuned_loads_where_the_package_is_not_installed(tuned, images, tmp_path):
    loaded, folder = tuned
    images[0].save(tmp_path / "picture.png")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["module"].startswith("transformers_modules.")
    assert np.abs(np.array(seen["texts"]) - loaded.encode(["red circle"])).max() <= 1e-6
    assert np.abs(np.array(seen["images"]) - loaded.encode(images[:1])).max() <= 1e-6
    assert seen["ids"] == loaded[0].processor(text=["red circle " * 60])["input_ids"]
