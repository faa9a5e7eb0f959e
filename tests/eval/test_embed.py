"""Embedding: order, duplicates, batches, padding, processes and caches change nothing; bad images are named."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from eval.cache import Cache
from eval.data import open_table
from eval.embed import BadImages, Encoder
from eval.models import adapt
from tests.distributed import run_distributed
from tests.eval.conftest import ColourModel, ColourProcessor, png

TEXTS = [
    "three small stars on a grey background",
    "a",
    "灰色背景上有三颗小星星",
    "a",
    "",
    "a red circle " * 40,
    "红色的圆",
]


class MeanColour:
    """The smallest adapter: the mean of each channel; a text's numbers of r, g and b. Counts, and may fail."""

    def __init__(self, *, fails_at: int | None = None, error: BaseException | None = None, name: str = "mean") -> None:
        self.images_seen, self.texts_seen, self.calls, self.name = 0, 0, [], name
        self.fails_at, self.error = fails_at, error or KeyboardInterrupt()

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        self.images_seen += len(images)
        self._called(len(images))
        if any(image.size == (1, 1) for image in images):
            raise ValueError("one pixel is too small")
        pixels = [torch.tensor(image.resize((1, 1)).getpixel((0, 0)), dtype=torch.float64) for image in images]
        return torch.stack(pixels) + 1

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        self.texts_seen += len(texts)
        self._called(len(texts))
        return torch.tensor([[1 + text.count(letter) for letter in "rgb"] for text in texts], dtype=torch.float64)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "fingerprint": f"{self.name:x<20}"}

    def _called(self, size: int) -> None:
        self.calls.append(size)
        if len(self.calls) == self.fails_at:
            raise self.error


def shade(i: int) -> bytes:
    return png((7 * i % 256, 3 * i % 256, 200))


@pytest.fixture
def encoder(model, processor) -> Encoder:
    return Encoder(adapt(model, processor), batch_size=3)


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


def test_a_repeated_text_is_encoded_once_and_short_ones_together():
    adapter = MeanColour()
    texts = ["rrrr", "b", "rrrr", "gg", "b", "rrrr"]
    embeds = Encoder(adapter, batch_size=2).texts(texts)
    assert adapter.calls == [2, 1] and adapter.texts_seen == 3
    assert embeds.equal(torch.stack([Encoder(MeanColour()).texts([text])[0] for text in texts]))


def test_a_repeated_image_file_is_encoded_once(write):
    adapter = MeanColour()
    table = open_table([write("a.parquet", ["red", "blue", "red", "red", "blue"])])
    embeds = Encoder(adapter, batch_size=2).images(table)
    assert adapter.images_seen == 2
    assert embeds[0].equal(embeds[2]) and embeds[0].equal(embeds[3]) and embeds[1].equal(embeds[4])
    assert not embeds[0].equal(embeds[1])


def test_images_come_back_in_order_whatever_the_batches(encoder, model, processor, images, write):
    table = open_table([write("a.parquet", [_bytes(image, "png") for image in images])])
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


def test_features_of_low_precision_are_normalised_in_fp32(model, processor):
    embeds = Encoder(adapt(model.bfloat16(), processor)).texts(TEXTS)
    assert embeds.dtype == torch.float32
    assert torch.allclose(embeds.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6)


# ---- Two processes


def _in_group(good: str, bad: str, cache: str) -> dict[str, Any]:
    """What one of the processes sees; in one function, since starting processes takes longer than all the rest."""
    seen: dict[str, Any] = {}
    for name, kept in (("plain", None), ("first", Cache(cache)), ("second", Cache(cache))):
        adapter = MeanColour()
        encoder = Encoder(adapter, 2, cache=kept, group=dist.group.WORLD)
        embeds = encoder.images(open_table([good])), encoder.texts(LETTERS)
        seen[name] = (*embeds, list(adapter.calls))
    with pytest.raises(BadImages, match="row 3 of .*cannot be decoded") as caught:
        encoder.images(open_table([bad]))
    seen["bad"] = caught.value.rows
    # One process fails, and both hear of it and can go on.
    broken = MeanColour(fails_at=2 if dist.get_rank() else None, error=RuntimeError("no memory"))
    encoder = Encoder(broken, 2, group=dist.group.WORLD)
    with pytest.raises((ValueError, RuntimeError)) as failed:
        encoder.images(open_table([good]))
    seen["failed"] = str(failed.value)
    seen["after"] = encoder.texts(LETTERS)
    return seen


LETTERS = [*("r" * i for i in range(9)), "r"]


def test_two_processes_share_the_work_and_equal_one(write, tmp_path):
    good = write("a.parquet", [shade(i) for i in range(7)])
    bad = write("b.parquet", [*(shade(i) for i in range(3)), b"not an image", shade(4)])
    alone = Encoder(MeanColour())
    images, texts = alone.images(open_table([good])), alone.texts(LETTERS)
    results = run_distributed(_in_group, 2, str(good), str(bad), str(tmp_path / "cache"), timeout=240)
    for seen in results:
        for name in ("plain", "first", "second"):
            assert seen[name][0].equal(images) and seen[name][1].equal(texts)
        assert seen["bad"] == (3,) and seen["after"].equal(texts)
    assert [seen["failed"] for seen in results] == ["Process 1 of 2 failed: RuntimeError: no memory", "no memory"]
    # 7 images are 4 batches of 2, 2, 2 and 1, two for each; 9 distinct texts are 5: the second process repeats the
    # last, so that both make as many forward passes.
    for name in ("plain", "first"):
        assert [seen[name][2] for seen in results] == [[2, 2, 2, 2, 1], [2, 1, 2, 2, 1]]
    assert [seen["second"][2] for seen in results] == [[], []]


# ---- Cache


def test_a_second_run_encodes_nothing_and_equals_the_first(write, tmp_path):
    table = open_table([write("a.parquet", ["red", "green", "blue"])])
    for seen in ((3, 2), (0, 0)):
        adapter = MeanColour()
        encoder = Encoder(adapter, 2, cache=Cache(tmp_path / "cache"))
        images, texts = encoder.images(table), encoder.texts(["r", "gg", "r"])
        assert images.equal(Encoder(MeanColour()).images(table))
        assert texts.equal(Encoder(MeanColour()).texts(["r", "gg", "r"]))
        assert (adapter.images_seen, adapter.texts_seen) == seen


def test_tasks_share_images_and_texts_and_models_do_not(write, tmp_path):
    first = open_table([write("a.parquet", ["red", "green"])])
    second = open_table([write("b.parquet", ["blue", "green"], other=[1, 2])])
    adapter, other = MeanColour(), MeanColour(name="other")
    encoder = Encoder(adapter, cache=Cache(tmp_path / "cache"))
    encoder.images(first), encoder.texts(["r", "g"])
    adapter.images_seen = adapter.texts_seen = 0
    encoder.images(second), encoder.texts(["g", "b"])
    assert (adapter.images_seen, adapter.texts_seen) == (1, 1)
    Encoder(other, cache=Cache(tmp_path / "cache")).images(first)
    assert other.images_seen == 2


def test_an_interrupted_run_goes_on_where_it_stopped(write, tmp_path):
    table = open_table([write("a.parquet", [shade(i) for i in range(10)])])
    killed, resumed = MeanColour(fails_at=4), MeanColour()
    with pytest.raises(KeyboardInterrupt):
        Encoder(killed, 2, cache=Cache(tmp_path / "cache")).images(table)
    embeds = Encoder(resumed, 2, cache=Cache(tmp_path / "cache")).images(table)
    assert resumed.images_seen == 10 - 3 * 2
    assert embeds.equal(Encoder(MeanColour()).images(table))


# ---- What is wrong with the data


def test_bad_images_are_named_after_the_others_are_done(write, tmp_path):
    good = [shade(i) for i in range(4)]
    bad = [b"not an image", good[0][:-30], png("red", (1, 1))]
    path = write("a.parquet", [good[0], bad[0], good[1], bad[1], good[2], bad[2], good[3], bad[0]])
    table = open_table([path])
    with pytest.raises(BadImages) as caught:
        Encoder(MeanColour(), 3, cache=Cache(tmp_path / "cache")).images(table)
    assert caught.value.rows == (1, 3, 5, 7)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("4 images cannot be used")
    assert f"row 1 of {path} holds an image that cannot be decoded" in lines[1]
    assert f"row 3 of {path} holds an image that cannot be decoded" in lines[2]
    assert f"row 5 of {path} holds an image that cannot be processed: one pixel is too small" in lines[3]
    again = MeanColour()
    Encoder(again, 3, cache=Cache(tmp_path / "cache")).images(table, rows=[0, 2, 4, 6])
    assert again.images_seen == 0


def test_an_image_without_a_defined_range_is_named(encoder, write):
    path = write("a.parquet", ["red", "red", "red", "red", _bytes(Image.new("F", (4, 4), 1e6), "tiff")])
    with pytest.raises(ValueError, match=f"row 4 of {path} holds an image that cannot be processed.*no defined range"):
        encoder.images(open_table([path]))


def test_an_image_file_that_is_missing_is_named(write, tmp_path):
    Path(tmp_path / "there.png").write_bytes(png("red"))
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("there.png", "gone.png")]
    pq.write_table(pa.table({"image": cells}), tmp_path / "paths.parquet")
    with pytest.raises(BadImages, match="row 1 of .*gone.png"):
        Encoder(MeanColour()).images(open_table([tmp_path / "paths.parquet"]))


def test_output_that_is_not_finite_is_an_error():
    model = ColourModel()
    model.scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="model gives NaN or infinity for 2 of 2 items, e.g. 'red'"):
        Encoder(adapt(model, ColourProcessor())).texts(["red", "green"])


def test_nothing_to_encode_is_an_error(write):
    encoder, table = Encoder(MeanColour()), open_table([write("a.parquet", ["red"])])
    with pytest.raises(ValueError, match="no texts"):
        encoder.texts([])
    with pytest.raises(ValueError, match="no images"):
        encoder.images(table, rows=[])
    with pytest.raises(ValueError, match="No column 'photo'"):
        encoder.images(table, "photo")
    with pytest.raises(ValueError, match="batch_size"):
        Encoder(MeanColour(), batch_size=0)


def _bytes(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_what_is_no_text_is_named(colour_encoder):
    assert colour_encoder.texts(["", " red\x00", "红色 😀"]).shape == (3, 3)
    for texts, message in (
        ("red", "not a list"),
        ([1], "1 is not a text"),
        ([None], "None is not"),
        (["a", "b\ud800"], "not a text"),
        ([], "no texts"),
    ):
        with pytest.raises(ValueError, match=message):
            colour_encoder.texts(texts)
