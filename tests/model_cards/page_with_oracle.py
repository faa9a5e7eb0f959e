"""The Space's own program with a model that can be checked by hand: colours and shapes are read off the pixels.

Run by `test_space_page.py`, with the Space's folder on PYTHONPATH and app.py's arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import app
import numpy as np
import torch
from encoder import open_image

# Where each word stands in the embedding: three colours, then three shapes.
WORDS = {"red": 0, "红": 0, "green": 1, "绿": 1, "blue": 2, "蓝": 2}
WORDS |= {"circle": 3, "圆": 3, "square": 4, "方": 4, "triangle": 5, "三角": 5}


class Oracle(app.Encoder):
    """Only the model is replaced; scores, locks and everything else are the Space's."""

    fingerprint = "oracle"

    def __init__(self, name: str):
        self.name = name
        self.model = SimpleNamespace(logit_scale=torch.tensor([2.5]))

    def texts(self, texts: list[str]) -> np.ndarray:
        found = np.full((len(texts), 6), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word, place in WORDS.items():
                if word in text:
                    found[row, place] = 1
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def pixels(self, source: str | Path | bytes) -> torch.Tensor:
        return torch.from_numpy(np.asarray(open_image(source)).copy())

    def images(self, pixels: list[torch.Tensor]) -> np.ndarray:
        return np.stack([_features(each.numpy().astype(int)) for each in pixels])


def _features(image: np.ndarray) -> np.ndarray:
    """A drawing on white: its colour, and its shape by how much of its bounding box it fills."""
    drawn = image.min(axis=2) < 128
    rows, columns = np.nonzero(drawn)
    box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    filled = drawn.sum() / box
    shape = np.abs(np.array([np.pi / 4, 1.0, 0.5]) - filled).argmin()
    found = np.full(6, 1e-3, np.float32)
    found[image[drawn].mean(axis=0).argmax()] = found[3 + shape] = 1
    return found / np.linalg.norm(found)


if __name__ == "__main__":
    app.Encoder = Oracle
    app.main(sys.argv[1:])
