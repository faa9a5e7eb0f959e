"""The stock transformers pipelines accept a saved folder, in both languages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import pipeline


@pytest.mark.parametrize(
    ("labels", "template"),
    [
        (["a red circle", "a blue square", "a yellow star"], "a picture of {}"),
        (["红色的圆", "蓝色方块", "黄色星星"], "一张{}的图片"),
    ],
)
def test_zero_shot_image_classification(checkpoint: Path, model, processor, images, labels, template):
    classify = pipeline("zero-shot-image-classification", model=str(checkpoint))
    answers = classify(images[:2], candidate_labels=labels, hypothesis_template=template, batch_size=2)
    texts = [template.format(label) for label in labels]
    with torch.no_grad():
        batch = processor(text=texts, images=images[:2], return_tensors="pt")
        expected = model(**batch).logits_per_image.softmax(-1)
    for answer, scores in zip(answers, expected, strict=True):
        by_label = {item["label"]: item["score"] for item in answer}
        assert [by_label[label] for label in labels] == pytest.approx(scores.tolist(), abs=1e-6)


def test_zero_shot_with_labels_longer_than_the_model_reads(checkpoint: Path, model, processor, images):
    """The stock pipeline never truncates; the model cuts as the tokenizer would."""
    labels = ["red circle " * 80, "蓝色方块" * 80, "star"]
    classify = pipeline("zero-shot-image-classification", model=str(checkpoint))
    answers = classify(images[0], candidate_labels=labels, hypothesis_template="{}")
    with torch.no_grad():
        batch = processor(text=labels, images=images[:1], return_tensors="pt")
        expected = model(**batch).logits_per_image.softmax(-1)[0]
    by_label = {item["label"]: item["score"] for item in answers}
    assert [by_label[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-6)


def test_feature_pipelines(checkpoint: Path, model, processor, images, captions):
    with torch.no_grad():
        expected = model(**processor(text=captions[:1], images=images[:1], return_tensors="pt"))
    image = pipeline("image-feature-extraction", model=str(checkpoint))(images[0])
    text = pipeline("feature-extraction", model=str(checkpoint))(captions[0])
    assert torch.tensor(image).squeeze() == pytest.approx(expected.image_embeds[0], abs=1e-6)
    assert torch.tensor(text).squeeze() == pytest.approx(expected.text_embeds[0], abs=1e-6)
