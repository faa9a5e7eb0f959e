"""MTEB: its tasks, built here from local data, run on our model and give the scores that ours give."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from PIL import Image

from eval.embed import Encoder
from eval.models import adapt
from eval.ranks import retrieval_ranks
from tests.eval.conftest import COLOURS, ColourModel, ColourProcessor

mteb = pytest.importorskip("mteb", reason='needs the extra "mteb"')

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.model_implementations import MODEL_REGISTRY  # noqa: E402

from eval.mteb_model import MtebModel, main, mteb_model, register, run_tasks  # noqa: E402


def task(name: str, category: str, corpus: datasets.Dataset, queries: datasets.Dataset, right: dict[str, str]):
    """A retrieval task with local data; `right`: query id -> id of the one right answer."""

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="local data",
            reference=None,
            dataset={"path": "local/data", "revision": "1"},
            type="Any2AnyRetrieval" if "i" in category else "Retrieval",
            category=category,
            modalities=["text", "image"] if "i" in category else ["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
        )

        def load_data(self, **kwargs) -> None:
            relevant = {query: {answer: 1} for query, answer in right.items()}
            split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return LocalTask()


def image_table(images: dict[str, Image.Image]) -> datasets.Dataset:
    table = datasets.Dataset.from_dict({"id": list(images), "image": list(images.values())})
    return table.cast_column("image", datasets.Image())


def text_table(texts: dict[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"id": list(texts), "text": list(texts.values())})


def colour_images() -> dict[str, Image.Image]:
    return {name: Image.new("RGB", (8, 8), COLOURS[name]) for name in ("red", "green", "blue")}


@pytest.fixture
def colours() -> MtebModel:
    return mteb_model(adapt(ColourModel(), ColourProcessor(), name="colours"))


def test_image_text_tasks_by_hand(colours, tmp_path):
    """Three of four captions find their image; the fourth says the wrong colour."""
    captions = {"1": "a red one", "2": "绿色", "3": "blue blue", "4": "red"}
    right = {"1": "red", "2": "green", "3": "blue", "4": "green"}
    t2i = task("LocalT2I", "t2i", image_table(colour_images()), text_table(captions), right)
    i2t = task(
        "LocalI2T",
        "i2t",
        text_table({"a": "red", "b": "green", "c": "blue"}),
        image_table(colour_images()),
        {"red": "a", "green": "b", "blue": "c"},
    )
    assert run_tasks(colours, [t2i, i2t], tmp_path, batch_size=2) == {"LocalT2I": 0.75, "LocalI2T": 1.0}
    written = json.loads((tmp_path / "LocalT2I.json").read_text())
    assert written["model"]["name"] == "colours" and written["scores"]["test"][0]["hit_rate_at_1"] == 0.75


def test_text_task_by_hand(colours, tmp_path):
    corpus, queries = text_table({"a": "red", "b": "green"}), text_table({"1": "红色", "2": "绿色"})
    assert run_tasks(colours, [task("LocalT2T", "t2t", corpus, queries, {"1": "a", "2": "b"})], tmp_path) == {
        "LocalT2T": 1.0
    }


def test_hit_rate_is_our_recall(model, processor, images, captions, tmp_path):
    """On a random model, where few queries hit: MTEB's hit rate is the text-to-image recall of eval.ranks."""
    adapter = adapt(model, processor)
    gallery = {str(i): image for i, image in enumerate(images)}
    texts = {f"q{i}": text for i, text in enumerate(captions)}
    t2i = task("LocalRandom", "t2i", image_table(gallery), text_table(texts), {f"q{i}": str(i) for i in range(6)})
    run_tasks(mteb_model(adapter), [t2i], tmp_path)
    scores = json.loads((tmp_path / "LocalRandom.json").read_text())["scores"]["test"][0]
    image_embeds = torch.nn.functional.normalize(adapter.encode_images(images), dim=-1)
    ranks = retrieval_ranks(image_embeds, Encoder(adapter).texts(captions), torch.arange(6))
    for k in (1, 3, 5):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(ranks.recall(k).text_to_image, abs=1e-4)


def test_what_mteb_is_told(checkpoint):
    meta = register(checkpoint, name="test/registered", license="apache-2.0")
    try:
        assert mteb.get_model_meta("test/registered") is meta
        assert meta.modalities == ["image", "text"] and meta.languages == ["eng-Latn", "zho-Hans"]
        assert meta.embed_dim == 24 and meta.max_tokens == 52 and meta.license == "apache-2.0"
        loaded = meta.loader(meta.name, revision=meta.revision, device="cpu")  # as ModelMeta.load_model calls it
        assert loaded.adapter.describe()["fingerprint"].startswith(meta.revision)
        with pytest.raises(ValueError, match="knows a model called test/registered already"):
            register(checkpoint, name="test/registered")
    finally:
        MODEL_REGISTRY.pop("test/registered", None)


def test_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    """MTEB's own tasks need the network; here the name leads to a local one."""
    with pytest.raises(SystemExit, match="error: .*LocalNothing"):
        main(["--model", str(checkpoint), "--task", "LocalNothing", "--output", str(tmp_path / "out")])
    texts = text_table({"a": "red", "b": "green"})
    local = task("LocalT2T", "t2t", texts, texts, {"a": "a", "b": "b"})
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [local] if tasks == ["LocalT2T"] else [])
    main(["--model", str(checkpoint), "--task", "LocalT2T", "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "LocalT2T.json").read_text())["model"]["class"] == "M2EncoderModel"
    assert "LocalT2T: 1.0000 (hit_rate_at_1)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: No checkpoint at"):
        main(["--model", str(tmp_path / "none"), "--task", "LocalT2T", "--output", str(tmp_path / "out")])
