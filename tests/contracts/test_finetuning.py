"""The two ways of docs/finetuning.md run, learn, keep what they promise to keep, and write a complete Hub folder."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
import tyro
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from eval.__main__ import main as evaluate
from modeling_m2encoder.hub_folder import save_hub_folder
from training.pretrain import parse, pretrain
from training.tokenizer import TokenizerArguments

DOCS = Path(__file__).parents[2] / "docs"
COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "white": "白色", "black": "黑色"}
SHAPES = {"circle": ("圆形", "ellipse"), "square": ("方块", "rectangle")}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = DOCS / "finetune_sentence_transformers.py"
    spec = importlib.util.spec_from_file_location("finetune_sentence_transformers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(model, processor, tmp_path) -> Path:
    return save_hub_folder(model, processor, tmp_path / "hub")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve drawings with two English captions and one Chinese, and one drawing without any."""
    rows = {"image": [], "caption_en": [], "caption_zh": []}
    for colour, chinese_colour in COLOURS.items():
        for shape, (chinese_shape, draw) in SHAPES.items():
            image = PILImage.new("RGB", (48, 40), "grey")
            getattr(ImageDraw.Draw(image), draw)((10, 6, 36, 32), fill=colour)
            rows["image"].append(image)
            rows["caption_en"].append([f"a {colour} {shape}", f"one {shape}, {colour}"])
            rows["caption_zh"].append([f"{chinese_colour}的{chinese_shape}"])
    rows["image"].append(rows["image"][0])
    rows["caption_en"].append([" "])
    rows["caption_zh"].append([])
    texts = List(Value("string"))
    features = Features({"image": Image(), "caption_en": texts, "caption_zh": texts})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "photos.parquet")
    return tmp_path / "photos.parquet"


def features_of(folder: Path, images, captions) -> tuple[torch.Tensor, torch.Tensor]:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        output = model(**processor(text=captions, images=images, return_tensors="pt"))
    return output.text_embeds, output.image_embeds


@pytest.mark.parametrize("train", ["both", "text", "image"])
def test_the_script(train, script, hub, photos, images, captions, tmp_path, capsys):
    out = tmp_path / "tuned"
    cached = ["--mini-batch-size", "3"] if train == "both" else []
    script.main(
        [str(hub), str(out), "--data", str(photos), "--steps", "2", "--batch-size", "6", "--learning-rate", "1e-3"]
        + ["--train", train, *cached]
    )
    assert "1 of 13 images have no caption" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in hub.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "photos.parquet", "tuned"]
    (texts, pictures), (old_texts, old_pictures) = (features_of(place, images, captions) for place in (out, hub))
    # The side that was not to change gives the same vectors, so that an index of them stays valid.
    assert torch.equal(texts, old_texts) == (train == "image")
    assert torch.equal(pictures, old_pictures) == (train == "text")
    encoded = SentenceTransformer(str(out), device="cpu", processor_kwargs={"backend": "pil"}).encode(images)
    assert abs(encoded - pictures.numpy()).max() <= 1e-6


def test_the_script_starts_with_the_models_own_loss(script, hub, photos, tmp_path, monkeypatch):
    """What its loss says of a batch is the contrastive loss of the model's forward pass."""
    made = []
    kind = script.MultipleNegativesRankingLoss
    monkeypatch.setattr(script, "MultipleNegativesRankingLoss", lambda *a, **k: made.append(kind(*a, **k)) or made[0])
    script.main([str(hub), str(tmp_path / "tuned"), "--data", str(photos), "--steps", "1", "--batch-size", "6"])
    loss = made[0]
    rows = script.load_pairs([str(photos)], "image", ["caption_en"])[:6]
    columns = [loss.model.preprocess(rows["image"]), loss.model.preprocess(rows["text"])]
    processor, encoder = loss.model[0].processor, loss.model[0].model
    with torch.no_grad():
        seen = loss(columns, None)
        batch = processor(images=rows["image"], text=rows["text"], return_tensors="pt")
        expected = encoder(**batch, return_loss=True).loss
    assert abs(seen - expected) <= 1e-5


def test_captions_are_drawn_anew_and_each_image_comes_once(script, photos):
    pairs = script.load_pairs([str(photos)], "image", ["caption_en", "caption_zh"])
    assert len(pairs) == 12
    drawn = {pairs[0]["text"] for _ in range(60)}
    assert drawn == {"a red circle", "one circle, red", "红色的圆形"}


def test_the_script_refuses_a_folder_that_exists(script, hub, photos):
    with pytest.raises(ValueError, match="exists already"):
        script.main([str(hub), str(hub), "--data", str(photos), "--steps", "1"])


def test_our_own_loop(hub, photos, images, captions, tmp_path):
    arguments = ["nano_smoke", "--init-from", str(hub), "--output-dir", str(tmp_path / "run"), "--data.files"]
    arguments += [str(photos), "--data.captions", "en", "caption_en", "zh", "caption_zh", "--batch-size", "6"]
    folder = pretrain(parse([*arguments, "--steps", "2", "--optimizer.warmup-steps", "0"]))
    assert {path.name for path in folder.iterdir()} == {path.name for path in hub.iterdir()}
    for seen, old in zip(features_of(folder, images, captions), features_of(hub, images, captions), strict=True):
        assert not torch.equal(seen, old)


def test_the_commands_of_the_guide_name_options_that_exist(script, monkeypatch, tmp_path):
    text = (DOCS / "finetuning.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python .*$", text.replace("\\\n", " "), re.MULTILINE)
    kinds = {"docs/finetune_sentence_transformers.py": 0, "training.pretrain": 0, "training.tokenizer": 0, "eval": 0}
    monkeypatch.setattr(script, "SentenceTransformer", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError))
    for command in commands:
        words = [word for word in shlex.split(command.split(" #")[0])[1:] if word != "-m"]
        kinds[words[0]] += 1
        if words[0] == "training.pretrain":
            parse(words[1:])
        elif words[0] == "training.tokenizer":
            tyro.cli(TokenizerArguments, args=words[1:])
        elif words[0] == "eval":  # the options are understood, and then there is no such folder
            words[words.index("--output") + 1] = str(tmp_path / "scores")
            with pytest.raises(SystemExit, match="No checkpoint at|cannot be loaded"):
                evaluate(words[1:])
        else:
            with pytest.raises(FileNotFoundError):
                script.main(words[1:])
    assert min(kinds.values()) >= 1, kinds
