"""Loading a model folder for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel

import modeling_m2encoder  # noqa: F401  registers the classes


def load_model(folder: str | Path) -> tuple[PreTrainedModel, Any]:
    """The model (in evaluation mode, on the accelerator if there is one) and processor of a checkpoint folder.

    Raises:
        ValueError: for a folder that holds no checkpoint; the message lists what it holds.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        seen = (
            f"it holds {', '.join(sorted(item.name for item in folder.iterdir()))}" if folder.is_dir() else "no folder"
        )
        raise ValueError(
            f"No checkpoint at {folder} ({seen or 'it is empty'}): config.json and the weights are needed."
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    # PIL even where torchvision is installed: published numbers must not depend on what else is on a machine.
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    return AutoModel.from_pretrained(folder).to(device).eval(), processor
