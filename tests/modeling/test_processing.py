"""The processor: texts and images together, saved and loaded, awkward texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from modeling_m2encoder import M2EncoderImageProcessorPil, M2EncoderProcessor


def test_texts_and_images(processor, captions, images):
    batch = processor(text=captions, images=images, return_tensors="pt")
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"][:, 0] == processor.tokenizer.cls_token_id).all()
    last = batch["attention_mask"].sum(1) - 1
    ends = batch["input_ids"].gather(1, last[:, None])
    assert (ends == processor.tokenizer.eos_token_id).all()


def test_save_and_load(processor, captions, images, tmp_path: Path, config):
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(loaded) is M2EncoderProcessor and type(loaded.image_processor) is M2EncoderImageProcessorPil
    expected = processor(text=captions, images=images, return_tensors="pt")
    for name, value in loaded(text=captions, images=images, return_tensors="pt").items():
        assert torch.equal(value, expected[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(captions)["input_ids"] == processor.tokenizer(captions)["input_ids"]
    assert (tokenizer.model_max_length, tokenizer.truncation_side, tokenizer.padding_side) == (52, "left", "right")
    image_processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert image_processor.size == processor.image_processor.size


@pytest.mark.parametrize("text", ["", " ", "   \t\n", "a" * 10_000, "猫" * 10_000, "🙂🙂", "\u200b", "e\u0301", "\x00"])
def test_awkward_texts_give_an_embedding(text: str, processor, model):
    batch = processor(text=[text], return_tensors="pt")
    assert 2 <= batch["input_ids"].shape[1] <= 52
    with torch.no_grad():
        embedding = model(**batch).text_embeds
    assert torch.isfinite(embedding).all() and embedding.norm().item() == pytest.approx(1, abs=1e-5)


def test_truncation_keeps_the_end(processor):
    text = "blue " * 60 + "red"
    ids = processor(text=[text])["input_ids"][0]
    whole = processor.tokenizer(text)["input_ids"]
    assert len(ids) == 52 and ids[0] == whole[0] and ids[1:] == whole[-51:]


@pytest.mark.parametrize("text", [None, 3, [3], [None]])
def test_no_text_is_refused(text, processor):
    with pytest.raises((ValueError, TypeError)):
        processor(text=text)
