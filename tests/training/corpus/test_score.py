"""The stage `score`: equal to a direct computation with transformers, whatever the batch; each loss has its reason."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from eval.models import TransformersAdapter
from tests.eval.tiny_models import save_tiny
from tests.training.corpus.pairs import config, contents, finished, mixed, picture, row, stream
from training.corpus import score
from training.corpus.engine import KEPT
from training.corpus.pinned import CHINESE_CLIP, CLIP, PINNED
from training.corpus.score_histogram import EDGES, Histogram, draw
from training.corpus.scorer import Scorer, ScoreSettings, ScoringModel
from training.images import decode_image


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("clip", tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def chinese_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("chinese_clip", tmp_path_factory.mktemp("chinese_clip"))


@pytest.fixture(scope="module")
def section(clip: Path, chinese_clip: Path) -> dict:
    models = {"en": {"model": str(clip)}, "zh": {"model": str(chinese_clip)}}
    return {"models": models, "threshold": {"en": 0.1, "zh": 0.0}, "batch_size": 4, "device": "cpu"}


@torch.inference_mode()
def direct(folder: Path, item: dict) -> float:
    """The cosine of one pair, by transformers alone."""
    model, processor = (
        transformers.AutoModel.from_pretrained(folder),
        transformers.AutoProcessor.from_pretrained(folder),
    )
    inputs = processor(images=decode_image(item["image"]["bytes"]), text=item["text"], return_tensors="pt")
    output = model(**inputs)
    return float((output.image_embeds * output.text_embeds).sum())  # these are normalised


def test_scores_are_those_of_a_direct_computation(
    section: dict, clip: Path, chinese_clip: Path, tmp_path: Path
) -> None:
    rows = mixed(23)
    finished(tmp_path, "clean", {"kept": rows})
    report = score.run(config(tmp_path, {"score": section}))
    high, low = stream(tmp_path / "score" / "high"), stream(tmp_path / "score" / "low")
    found = {item["id"]: item["score"] for item in [*high, *low]}
    for item in rows:
        folder = chinese_clip if item["language"] == "zh" else clip
        assert found[item["id"]] == pytest.approx(direct(folder, item), abs=1e-5)
    limits = {"en": 0.1, "zh": 0.0}
    assert all(item["score"] >= limits[item["language"]] for item in high)
    assert all(item["score"] < limits[item["language"]] for item in low)
    assert 0 < len(high) < 23
    # Rows are as they were but for the score, in their order.
    assert [{**item, "score": None} for item in high] == [
        item for item in rows if item["id"] in {r["id"] for r in high}
    ]
    assert report.counts.outcomes() == {KEPT: len(high), "low": len(low)}
    assert report.tasks == 3


@pytest.mark.parametrize("kind", ["clip", "chinese_clip", "siglip"])
def test_any_model_of_the_adapters_scores(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "model")
    scorer = Scorer(ScoreSettings(model=str(folder), device="cpu"))
    assert all(-1 <= scored.score <= 1 for _, scored in scorer.scored(mixed(5)))


def test_our_own_checkpoint_scores(checkpoint: Path) -> None:
    scorer = Scorer(ScoreSettings(model=str(checkpoint), device="cpu"))
    assert all(-1 <= scored.score <= 1 for _, scored in scorer.scored(mixed(5)))


def test_the_batch_changes_no_score(section: dict) -> None:
    rows = mixed(13)
    settings = ScoreSettings(**{**section, "models": {k: ScoringModel(**v) for k, v in section["models"].items()}})
    scores = {}
    for size in (1, 5, 64):
        scorer = Scorer(dataclasses.replace(settings, batch_size=size))
        scores[size] = [scored.score for _, scored in scorer.scored(rows)]
    assert scores[1] == pytest.approx(scores[5], abs=1e-6)
    assert scores[1] == pytest.approx(scores[64], abs=1e-6)
    again = [scored.score for _, scored in Scorer(dataclasses.replace(settings, batch_size=5)).scored(rows)]
    assert again == scores[5]


def test_large_images_make_smaller_batches(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(place) for place in range(9)]
    settings = ScoreSettings(str(clip), device="cpu")
    whole = [scored.score for _, scored in Scorer(settings).scored(rows)]
    seen: list[int] = []
    encode = TransformersAdapter.encode_images
    monkeypatch.setattr(
        TransformersAdapter, "encode_images", lambda self, images: seen.append(len(images)) or encode(self, images)
    )
    monkeypatch.setattr("training.corpus.scorer._PIXELS_AT_ONCE", 2000)  # an image has 1,200 or more
    assert [scored.score for _, scored in Scorer(settings).scored(rows)] == pytest.approx(whole, abs=1e-6)
    assert seen == [2, 2, 2, 2, 1]


def test_captions_of_one_image_cost_one_image(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = TransformersAdapter.encode_images
    monkeypatch.setattr(
        TransformersAdapter, "encode_images", lambda self, images: seen.append(len(images)) or encode(self, images)
    )
    rows = [row(place // 5, text=f"a {place} dog") for place in range(20)]
    alone = [
        scored.score for item in rows for _, scored in Scorer(ScoreSettings(str(clip), device="cpu")).scored([item])
    ]
    seen.clear()
    together = [scored.score for _, scored in Scorer(ScoreSettings(str(clip), device="cpu")).scored(rows)]
    assert seen == [4]
    assert together == pytest.approx(alone, abs=1e-6)


def bad_rows() -> list[dict]:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    return [
        row(100, id="no image", image=None),
        row(101, id="empty", image={"bytes": b"", "path": None}),
        row(102, id="html", image={"bytes": b"<html>not found</html>", "path": None}),
        row(103, id="cut", image={"bytes": picture(103)[:-400], "path": None}),
        row(104, id="bomb", image={"bytes": buffer.getvalue(), "path": None}),
        row(105, id="no text", text=""),
        row(106, id="null text", text=None),
        row(107, id="french", language="fr"),
    ]


def test_a_row_that_cannot_be_scored_has_its_reason_and_hurts_no_other(section: dict, tmp_path: Path) -> None:
    good = mixed(7)
    mixed_in = [item for pair in zip(bad_rows(), [*good, None], strict=True) for item in pair if item is not None]
    finished(tmp_path / "a", "clean", {"kept": mixed_in})
    report = score.run(config(tmp_path / "a", {"score": section}))
    dropped = {item["id"]: item["reason"] for item in stream(tmp_path / "a" / "score" / "dropped")}
    assert dropped == {
        "no image": "no_image",
        "empty": "no_image",
        "html": "not_an_image",
        "cut": "broken_image",
        "bomb": "too_many_pixels",
        "no text": "no_text",
        "null text": "no_text",
        "french": "no_model",
    }
    assert report.counts.total() == len(mixed_in)
    finished(tmp_path / "b", "clean", {"kept": good})
    score.run(config(tmp_path / "b", {"score": section}))
    for name in ("high", "low"):
        ours, theirs = stream(tmp_path / "a" / "score" / name), stream(tmp_path / "b" / "score" / name)
        assert [item["id"] for item in ours] == [item["id"] for item in theirs]
        assert [item["score"] for item in ours] == pytest.approx([item["score"] for item in theirs], abs=1e-6)


def test_an_image_that_only_the_model_refuses_is_one_row(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = TransformersAdapter.encode_images

    def picky(self: TransformersAdapter, images: list) -> torch.Tensor:
        if any(image.size[1] == 33 for image in images):
            raise ValueError("33 is no height")
        return encode(self, images)

    monkeypatch.setattr(TransformersAdapter, "encode_images", picky)
    rows = [row(place) for place in range(6)]
    scored = [result for _, result in Scorer(ScoreSettings(str(clip), device="cpu")).scored(rows)]
    assert [result.reason for result in scored] == [None, None, None, "refused_image", None, None]
    assert [result.score is None for result in scored] == [False, False, False, True, False, False]


def broken_clip(clip: Path, folder: Path, every: bool) -> Path:
    """A copy whose weights give NaN, for every text or for those with a word that ends in "g"."""
    shutil.copytree(clip, folder)
    model = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        if every:
            model.text_projection.weight.fill_(float("nan"))
        else:
            tokens = transformers.AutoTokenizer.from_pretrained(folder)("dog", add_special_tokens=False)["input_ids"]
            model.text_model.embeddings.token_embedding.weight[tokens[-1]] = float("inf")
    model.save_pretrained(folder)
    return folder


def test_nan_is_counted_where_it_is_the_rows_and_refused_where_it_is_the_models(clip: Path, tmp_path: Path) -> None:
    finished(tmp_path, "clean", {"kept": [row(place) for place in range(10)]})
    some = {"model": str(broken_clip(clip, tmp_path / "some", every=False)), "device": "cpu"}
    report = score.run(config(tmp_path, {"score": some}))
    assert report.counts.total("not_finite") == 6  # three of five texts, each twice
    assert {item["reason"] for item in stream(tmp_path / "score" / "dropped")} == {"not_finite"}
    assert report.counts.total() == 10
    shutil.rmtree(tmp_path / "score")
    every = {"model": str(broken_clip(clip, tmp_path / "every", every=True)), "device": "cpu"}
    with pytest.raises(RuntimeError, match="NaN"):
        score.run(config(tmp_path, {"score": every}))
    finished(tmp_path / "short", "clean", {"kept": [row(0)]})  # one row must not stop a corpus for ever
    assert score.run(config(tmp_path / "short", {"score": every})).counts.total("not_finite") == 1


def test_the_histogram_counts_every_scored_row(section: dict, tmp_path: Path) -> None:
    finished(tmp_path, "clean", {"kept": mixed(23)})
    report = score.run(config(tmp_path, {"score": section}))
    drawn = report.extra["histogram"]
    assert drawn["edges"] == list(EDGES)
    rows = [*stream(tmp_path / "score" / "high"), *stream(tmp_path / "score" / "low")]
    for language in ("en", "zh"):
        numbers = drawn["counts"][f"drawn-{language}"][language]
        own = [item["score"] for item in rows if item["language"] == language]
        assert sum(numbers) == len(own)
        for low, high, number in zip(EDGES, EDGES[1:], numbers, strict=False):
            assert number == sum(low <= value < high for value in own)
    with Image.open(tmp_path / "score" / "histogram.png") as image:
        assert image.format == "PNG"
        assert image.size[0] > 1000
    saved = json.loads((tmp_path / "score" / "report.json").read_text())
    assert saved["extra"]["histogram"]["counts"] == drawn["counts"]


def test_edges_of_bins_belong_to_the_bin_above_and_rounding_beyond_one_to_the_last() -> None:
    histogram = Histogram()
    for value in (0.25, 0.2499, 1.0000001, -1.0000001, -1.0, 1.0):
        histogram.add("a", "en", value)
    numbers = histogram.counts["a", "en"]
    assert numbers[EDGES.index(0.25)] == numbers[EDGES.index(0.25) - 1] == 1
    assert numbers[0] == numbers[-1] == 2


def test_the_threshold_itself_is_kept_and_0_25_is_the_default() -> None:
    scorer = Scorer(ScoreSettings())
    assert scorer.passes("en", 0.25)
    assert not scorer.passes("zh", 0.2499999)


def test_the_defaults_are_named_by_hub_id_and_commit() -> None:
    settings = ScoreSettings()
    assert settings.model_of("en") == ScoringModel(CLIP)
    assert settings.model_of("zh") == ScoringModel(CHINESE_CLIP)
    described = settings.identity()["models"]
    assert described["en"]["revision"] == PINNED[CLIP]
    assert described["zh"]["revision"] == PINNED[CHINESE_CLIP]
    assert all(len(commit) == 40 and set(commit) <= set("0123456789abcdef") for commit in PINNED.values())


def test_two_runs_and_two_workers_give_the_same_bytes(section: dict, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("again", 1), ("two", 2)):
        finished(tmp_path / name, "clean", {"kept": mixed(23)})
        score.run(config(tmp_path / name, {"score": section}, workers))
    one = contents(tmp_path / "one" / "score")
    assert one == contents(tmp_path / "again" / "score") == contents(tmp_path / "two" / "score")


def test_another_model_in_the_same_folder_is_refused(section: dict, clip: Path, tmp_path: Path) -> None:
    finished(tmp_path, "clean", {"kept": mixed(4)})
    score.run(config(tmp_path, {"score": section}))
    # How fast it goes may change.
    score.run(config(tmp_path, {"score": {**section, "batch_size": 2}}))
    with pytest.raises(ValueError, match="threshold"):
        score.run(config(tmp_path, {"score": {**section, "threshold": 0.3}}))
    with pytest.raises(ValueError, match="other settings"):
        score.run(config(tmp_path, {"score": {"model": str(clip), "threshold": {"en": 0.1, "zh": 0.0}}}))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"model": "a", "models": {"en": {"model": "b"}}}, "not both"),
        ({"revision": "main"}, "revision"),
        ({"threshold": 25}, "between -1 and 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"models": {"en": {"model": "a"}, "zh": {"model": "b"}}, "threshold": {"en": 0.2}}, "zh"),
        ({"treshold": 0.2}, "treshold"),
    ],
)
def test_impossible_settings_are_refused(section: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        score.run(config(tmp_path, {"score": section}))


def test_a_model_that_is_none_is_said_by_name(tmp_path: Path) -> None:
    finished(tmp_path, "clean", {"kept": mixed(2)})
    with pytest.raises(RuntimeError, match="nowhere"):
        score.run(config(tmp_path, {"score": {"model": str(tmp_path / "nowhere"), "device": "cpu"}}))


def test_killed_and_run_again_gives_the_same_bytes(section: dict, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        finished(tmp_path / name, "clean", {"kept": mixed(60)}, part=2)
    score.run(config(tmp_path / "whole", {"score": section}))
    (tmp_path / "config.json").write_text(
        json.dumps({"output": str(tmp_path / "killed"), "executor": {"workers": 1}, "score": section})
    )
    command = [sys.executable, "-m", "training.corpus", "score", "--config", str(tmp_path / "config.json")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    counts = tmp_path / "killed" / "score" / "counts"
    while process.poll() is None and len(list(counts.glob("*.json"))) < 2:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(counts.glob("*.json")))
    assert 2 <= done < 30
    stamps = {path.name: path.stat().st_mtime_ns for path in counts.glob("*.json")}
    score.run(config(tmp_path / "killed", {"score": section}))
    left = {name: content for name, content in contents(tmp_path / "killed" / "score").items() if "/." not in name}
    assert left == contents(tmp_path / "whole" / "score")
    # At most the task that was not yet marked as complete was done again.
    assert sum(path.stat().st_mtime_ns != stamps.get(path.name) for path in counts.glob("*.json")) <= 30 - done + 1


def test_a_histogram_has_the_letters_of_its_sources(tmp_path: Path) -> None:
    histogram = Histogram()
    histogram.add("悟空", "zh", 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that it has not
        draw(histogram, ScoreSettings(), tmp_path / "histogram.png")
    assert Image.open(tmp_path / "histogram.png").size[0] > 100
