"""The stock transformers pipelines accept a saved folder, in both languages, and what they save is one again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline

from modeling_m2encoder.hub_folder import save_hub_folder


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


def test_feature_pipelines_in_batches(checkpoint: Path, model, processor, images, captions):
    """Many inputs, of different sizes and lengths, padded or not; texts longer than the model reads among them."""
    texts = [*captions, "red circle " * 80, "蓝色方块" * 80]
    with torch.no_grad():
        expected = model(**processor(text=texts, images=images, return_tensors="pt"))
    for batch_size in (1, 3):
        seen = pipeline("image-feature-extraction", model=str(checkpoint))(images, batch_size=batch_size)
        assert torch.tensor(seen).reshape(len(images), -1) == pytest.approx(expected.image_embeds, abs=1e-6)
        seen = pipeline("feature-extraction", model=str(checkpoint))(texts, batch_size=batch_size)
        assert torch.tensor(seen).reshape(len(texts), -1) == pytest.approx(expected.text_embeds, abs=1e-6)


def test_truncating_in_the_pipeline_changes_nothing(checkpoint: Path):
    """The tokenizer and the model cut long texts in the same way."""
    extract = pipeline("feature-extraction", model=str(checkpoint))
    long = "red circle " * 80 + "and a blue square"
    assert extract(long, truncation=True) == extract(long)


TASKS = {
    "zero-shot-image-classification": lambda pipe, image, text: [
        (answer["label"], answer["score"])
        for answer in pipe(image, candidate_labels=[text, "星星", "red circle " * 80], hypothesis_template="{}")
    ],
    "image-feature-extraction": lambda pipe, image, text: pipe(image),
    "feature-extraction": lambda pipe, image, text: pipe(text),
}


@pytest.mark.parametrize("task", list(TASKS))
def test_saving_from_a_pipeline_and_loading_again(task: str, model, processor, images, captions, tmp_path: Path):
    hub, saved = save_hub_folder(model, processor, tmp_path / "hub"), tmp_path / "saved"
    pipe = pipeline(task, model=str(hub))
    expected = TASKS[task](pipe, images[0], captions[0])
    pipe.save_pretrained(saved)
    assert TASKS[task](pipeline(task, model=str(saved)), images[0], captions[0]) == expected
    # The model is whole, and so is what the pipeline had of the processor.
    batch = processor(text=captions, images=images, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModel.from_pretrained(saved)(**batch).logits_per_image
        assert torch.equal(logits, model(**batch).logits_per_image)
    if task == "feature-extraction":
        tokenizer = AutoTokenizer.from_pretrained(saved)
        assert (tokenizer.model_max_length, tokenizer.truncation_side) == (52, "left")
        seen = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        assert all(torch.equal(seen[name], batch[name]) for name in ("input_ids", "attention_mask"))
    elif task == "zero-shot-image-classification":  # holds both parts of the processor
        seen = AutoProcessor.from_pretrained(saved, backend="pil")(text=captions, images=images, return_tensors="pt")
        assert all(torch.equal(seen[name], batch[name]) for name in batch)
