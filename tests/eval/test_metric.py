"""The metric as `evaluate` loads it: offline, from its folder, the very numbers of eval.ranks."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import datasets
import evaluate
import pytest
import torch

from eval.ranks import RECALL_AT, retrieval_ranks

FOLDER = Path(__file__).parents[2] / "eval" / "metrics" / "image_text_recall"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`evaluate.load` without a network; its caches, and what it makes of them in `sys`, are gone after the test."""

    def no_network(*args: object) -> None:
        raise AssertionError(f"the metric wants to connect: {args}")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return lambda path=FOLDER: evaluate.load(str(path), cache_dir=str(tmp_path / "data"))


def features(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator))
    owner = torch.randint(0, 38, (150,), generator=generator)
    texts = torch.nn.functional.normalize(images[owner] + 0.4 * torch.randn(150, 16, generator=generator))
    texts[3], images[5] = texts[2], images[4]  # ties
    return images, texts, owner


def test_equals_the_scorer(load):
    images, texts, owner = features()
    recall = load()
    ranks = retrieval_ranks(images, texts, owner)
    expected = {f"text_to_image_R@{k}": ranks.recall(k).text_to_image for k in RECALL_AT}
    expected |= {f"image_to_text_R@{k}": ranks.recall(k).image_to_text for k in RECALL_AT}
    expected["mean_recall"] = ranks.mean_recall()
    assert 0.3 < expected["mean_recall"] < 0.95
    found = recall.compute(image_embeds=images, text_embeds=texts, text_to_image=owner)
    assert found == expected and all(type(value) is float for value in found.values())
    # A second call on the same object, in the other forms that people hold embeddings in.
    assert recall.compute(image_embeds=images.numpy(), text_embeds=texts.numpy(), text_to_image=owner.numpy()) == found
    assert (
        recall.compute(image_embeds=images.tolist(), text_embeds=texts.tolist(), text_to_image=owner.tolist()) == found
    )
    recall.add_batch(text_to_image=owner[:100])
    recall.add_batch(text_to_image=owner[100:])
    assert recall.compute(image_embeds=images.double(), text_embeds=texts.double()) == found


def test_the_example_of_its_documentation(load):
    found = load(FOLDER / "image_text_recall.py").compute(
        image_embeds=[[1.0, 0.0], [0.0, 1.0]], text_embeds=[[1.0, 0.1], [0.9, 0.1]], text_to_image=[0, 1]
    )
    # Both texts find image 0 first; image 0 finds its text; for image 1 both texts score 0.1.
    assert found["text_to_image_R@1"] == 0.5 and found["image_to_text_R@1"] == 0.75
    assert found["text_to_image_R@5"] == 1 and found["mean_recall"] == pytest.approx(5.25 / 6)
    assert found["mean_recall"] == 0.875


def test_what_is_wrong_is_named(load):
    images, texts, owner = features()
    for arguments in ({}, {"image_embeds": images}, {"text_embeds": texts}):
        with pytest.raises(ValueError, match="needs image_embeds=.*and text_embeds="):
            load().compute(text_to_image=owner, **arguments)
    with pytest.raises(ValueError, match="one integer for each of the 150 texts"):
        load().compute(image_embeds=images, text_embeds=texts, text_to_image=owner[:10])
    with pytest.raises(ValueError, match="there are 3 images"):
        load().compute(image_embeds=images[:3], text_embeds=texts, text_to_image=owner)
    with pytest.raises(ValueError, match="add"):
        load().compute(image_embeds=images, text_embeds=texts)


def test_outside_a_clone_nobody_is_told_to_pip_install_eval(load, monkeypatch: pytest.MonkeyPatch):
    import eval as package

    monkeypatch.setitem(sys.modules, "eval.ranks", None)
    monkeypatch.delattr(package, "ranks")
    with pytest.raises(ImportError, match="PYTHONPATH") as error:
        load()
    assert "pip install eval" not in str(error.value)


def test_describes_itself(load):
    recall = load()
    assert recall.name == "image_text_recall"
    assert recall.features == datasets.Features({"text_to_image": datasets.Value("int64")})
    for name in ("image_embeds", "text_embeds", "text_to_image", "mean_recall"):
        assert name in recall.inputs_description and name in (FOLDER / "README.md").read_text("utf-8")
