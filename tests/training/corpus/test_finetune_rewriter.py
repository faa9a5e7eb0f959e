"""Fine-tuning a rewriter: the loss is that of the new caption, it falls, and the saved model writes what it learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.training.corpus.pairs import row
from tests.training.corpus.tiny_generators import save_tiny
from training.corpus.chat import Reply
from training.corpus.finetune_rewriter import IGNORED, Batches, FinetuneSettings, Pair, finetune, main, read_pairs
from training.corpus.rewrite import RewriteSettings
from training.corpus.rewriters import CaptionModel, TransformersRewriter, load_captioner

PROMPTS = {"en": "caption: {raw}. new:"}
COLOURS = {"red": "a red circle", "blue": "two blue dogs"}


def write_pairs(folder: Path, repeats: int = 1) -> Path:
    """Pictures of one colour, whose new caption depends on the picture alone."""
    lines = []
    for colour, rewritten in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
        lines.append({"image": f"{colour}.png", "raw": "img 1", "rewritten": rewritten, "language": "en"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * repeats))
    return path


def picture_row(folder: Path, colour: str) -> dict:
    return row(0, image={"bytes": (folder / f"{colour}.png").read_bytes(), "path": None})


def captions(folder: Path, model: Path) -> dict[str, Reply]:
    rewriter = TransformersRewriter(CaptionModel(str(model), beams=1, max_new_tokens=20, device="cpu"))
    prompt = PROMPTS["en"].replace("{raw}", "img 1")
    replies = rewriter([picture_row(folder, colour) for colour in COLOURS], [prompt] * 2)
    return dict(zip(COLOURS, replies, strict=True))


@pytest.mark.parametrize("kind", ["blip-2 with opt", "blip-2 with t5", "blip"])
def test_the_model_learns_to_write_the_new_captions(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "model")
    settings = FinetuneSettings(
        write_pairs(tmp_path, repeats=4),
        tmp_path / "out",
        str(folder),
        prompts=PROMPTS,
        train="all",
        epochs=80,
        batch_size=8,
        learning_rate=3e-2,
        held_out=0.0,
        device="cpu",
    )
    before = captions(tmp_path, folder)
    finetune(settings)
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records]
    assert len(losses) == 80
    assert losses[-1] < 0.2 * losses[0]
    expected = {colour: Reply(text) for colour, text in COLOURS.items()}  # to the end, not cut short
    assert captions(tmp_path, tmp_path / "out") == expected != before


def test_the_bridge_alone_learns_and_the_rest_stays_as_it_was(tmp_path: Path) -> None:
    folder = save_tiny("blip-2 with opt", tmp_path / "model")
    before = load_captioner(CaptionModel(str(folder)), "cpu").model.state_dict()
    pairs = write_pairs(tmp_path, repeats=4)
    finetune(
        FinetuneSettings(pairs, tmp_path / "out", str(folder), prompts=PROMPTS, held_out=0.3, epochs=2, device="cpu")
    )
    after = load_captioner(CaptionModel(str(tmp_path / "out")), "cpu").model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("query_tokens", "qformer", "language_projection")) for name in changed)
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if "held_out_loss" in record] == [1, 2]
    prompts = yaml.safe_load((tmp_path / "out" / "prompts.yaml").read_text(encoding="utf-8"))
    assert RewriteSettings(**prompts).instructions() == PROMPTS


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    folder = save_tiny("blip-2 with opt", tmp_path / "model")
    pairs = write_pairs(tmp_path, repeats=3)
    weights = []
    for name in ("a", "b"):
        finetune(FinetuneSettings(pairs, tmp_path / name, str(folder), prompts=PROMPTS, epochs=1, device="cpu"))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("kind", ["blip-2 with opt", "blip-2 with t5", "blip"])
def test_the_loss_is_that_of_the_new_caption_alone(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "model")
    loaded = load_captioner(CaptionModel(str(folder)), "cpu")
    batches = Batches(loaded, 128)
    write_pairs(tmp_path)
    pairs = [Pair(tmp_path / "red.png", "caption: a", "a red circle"), Pair(tmp_path / "blue.png", "a", "two")]
    batch = batches(pairs)
    tokenizer = loaded.processor.tokenizer
    for labels, pair in zip(batch["labels"].tolist(), pairs, strict=True):
        own = [label for label in labels if label != IGNORED]
        assert tokenizer.decode(own, skip_special_tokens=True).strip() == pair.rewritten
        assert len(own) > len(tokenizer(pair.rewritten, add_special_tokens=False)["input_ids"])  # and an end
    # Padding changes no loss: the mean over all tokens is that of the pairs alone, weighted by their tokens.
    with torch.no_grad():
        together = float(loaded.model(**batch).loss)
        alone = [float(loaded.model(**batches([pair])).loss) for pair in pairs]
    tokens = [int((labels != IGNORED).sum()) for labels in batch["labels"]]
    mean = sum(loss * number for loss, number in zip(alone, tokens, strict=True)) / sum(tokens)
    assert together == pytest.approx(mean, abs=1e-5)


def test_data_that_is_none_is_refused_by_its_line(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    good = {"image": "red.png", "raw": "a", "rewritten": "b", "language": "en"}
    for bad, said in (
        ("{", "line 2"),
        ("[]", "line 2"),
        (json.dumps({"image": "red.png"}), "raw"),
        (json.dumps({**good, "language": "fr"}), "fr"),
        (json.dumps({**good, "rewritten": " "}), "empty"),
        (json.dumps({**good, "image": "none.png"}), "none.png"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=said):
            read_pairs(tmp_path / "bad.jsonl", PROMPTS)
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no pairs"):
        read_pairs(tmp_path / "bad.jsonl", PROMPTS)
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        read_pairs(tmp_path / "nowhere.jsonl", PROMPTS)


def test_a_broken_image_a_long_pair_and_a_folder_that_exists_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("blip-2 with opt", tmp_path / "model")
    pairs = write_pairs(tmp_path)
    with pytest.raises(ValueError, match="max_tokens"):
        finetune(FinetuneSettings(pairs, tmp_path / "out", str(folder), max_tokens=10, device="cpu"))
    (tmp_path / "red.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"red\.png"):
        finetune(FinetuneSettings(pairs, tmp_path / "out", str(folder), device="cpu"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists"):
        finetune(FinetuneSettings(pairs, tmp_path / "out", str(folder), device="cpu"))


def test_a_blip_has_no_bridge_to_train(tmp_path: Path) -> None:
    folder = save_tiny("blip", tmp_path / "model")
    with pytest.raises(ValueError, match="no bridge"):
        finetune(FinetuneSettings(write_pairs(tmp_path), tmp_path / "out", str(folder), device="cpu"))


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*nowhere\.jsonl"):
        main(FinetuneSettings(tmp_path / "nowhere.jsonl", tmp_path / "out"))
