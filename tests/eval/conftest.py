"""A model that can be checked by hand: images and texts are embedded as the amounts of red, green and blue in them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from eval.embed import Encoder
from eval.models import adapt

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
WORDS = {"red": 0, "green": 1, "blue": 2, "红色": 0, "绿色": 1, "蓝色": 2}


class ColourProcessor:
    """Pixels in [0, 1]; the token ids of a text are the channels of its colour words."""

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        if images is not None:
            pixels = [np.asarray(image.convert("RGB").resize((4, 4)), dtype=np.float32) / 255 for image in images]
            return {"pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)}
        ids = [[channel for word, channel in WORDS.items() for _ in range(line.count(word))] for line in text]
        longest = max(1, *map(len, ids))
        return {
            "input_ids": torch.tensor([own + [0] * (longest - len(own)) for own in ids]),
            "attention_mask": torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in ids]),
        }


class ColourModel(torch.nn.Module):
    """pooler_output [B, 3]: mean of each channel, or number of words of each colour. Counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.images_seen = self.texts_seen = 0

    def get_image_features(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        self.images_seen += len(pixel_values)
        return SimpleNamespace(pooler_output=self.scale * pixel_values.mean((2, 3)))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.texts_seen += len(input_ids)
        words = torch.nn.functional.one_hot(input_ids, 3) * attention_mask[..., None]
        return SimpleNamespace(pooler_output=self.scale * words.sum(1).float())


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` keeps of a test's files goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def colour_encoder() -> Encoder:
    return Encoder(adapt(ColourModel(), ColourProcessor(), name="colours"), batch_size=2)


def png(colour: str | tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS.get(colour, colour)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("a.parquet", images=["red", b"not an image"], label=[0, 1])`: images by colour name or as bytes."""

    def write(name: str, images: Sequence[str | bytes], /, **columns: list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = [
            {"bytes": value if isinstance(value, bytes) else png(value), "path": f"{i}.png"}
            for i, value in enumerate(images)
        ]
        pq.write_table(pa.table({"image": cells, **columns}), path)
        return path

    return write
