"""Embedding: order, duplicates, batches and padding change nothing; bad images are named."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from eval.data import open_table
from eval.embed import Encoder

TEXTS = [
    "three small stars on a grey background",
    "a",
    "灰色背景上有三颗小星星",
    "a",
    "",
    "a red circle " * 40,
    "红色的圆",
]


@pytest.fixture
def encoder(model, processor) -> Encoder:
    return Encoder(model, processor, batch_size=3)


def test_texts_come_back_in_order_whatever_the_batches(encoder, model, processor):
    """Against one text at a time, padded to the full 52 tokens: neither batching nor sorting nor padding may matter."""
    embeds = encoder.texts(TEXTS)
    assert embeds.dtype == torch.float32 and embeds.shape == (len(TEXTS), 24)
    assert torch.allclose(embeds.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6)
    for text, embed in zip(TEXTS, embeds, strict=True):
        batch = processor(text=[text], return_tensors="pt", padding="max_length", truncation=True)
        assert batch["input_ids"].shape == (1, 52)
        with torch.no_grad():
            alone = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).text_embeds[0]
        assert torch.allclose(embed, alone, atol=1e-6)


def test_a_repeated_text_is_encoded_once(colour_encoder):
    embeds = colour_encoder.texts(["red", "blue", "red", "red"])
    assert embeds.tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert colour_encoder.model.texts_seen == 2


def test_images_come_back_in_order_whatever_the_batches(encoder, model, processor, images, write):
    def png(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    table = open_table([write("a.parquet", [png(image) for image in images])])
    embeds = encoder.images(table)
    with torch.no_grad():
        whole = model(pixel_values=processor(images=images, return_tensors="pt")["pixel_values"]).image_embeds
    assert torch.allclose(embeds, whole, atol=1e-6)
    assert torch.allclose(encoder.images(table, rows=[4, 1]), embeds[[4, 1]], atol=1e-6)


def test_a_model_in_training_is_evaluated_without_dropout_and_left_in_training(encoder, model):
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(module.training))
    seen: list[bool] = []
    for training in (True, False):
        model.train(training)
        embeds = encoder.texts(["a"])
        assert model.training == training and not embeds.requires_grad
    assert seen == [False, False]


def test_an_image_that_the_processor_refuses_is_named(encoder, write):
    buffer = io.BytesIO()
    Image.new("F", (4, 4), 1e6).save(buffer, "tiff")
    path = write("a.parquet", ["red", "red", "red", "red", buffer.getvalue()])
    with pytest.raises(ValueError, match=f"row 4 of {path} holds an image that cannot be processed.*no defined range"):
        encoder.images(open_table([path]))


def test_nothing_to_encode_is_an_error(encoder):
    with pytest.raises(ValueError, match="no texts"):
        encoder.texts([])
    with pytest.raises(ValueError, match="batch_size"):
        Encoder(encoder.model, encoder.processor, batch_size=0)
