"""Writing what a run produces: the Hub-format folder, whole or not at all. (Saving and resuming the run come here.)"""

from __future__ import annotations

from pathlib import Path

from modeling_m2encoder import M2EncoderModel, M2EncoderProcessor
from modeling_m2encoder.hub_folder import save_hub_folder


def export(model: M2EncoderModel, processor: M2EncoderProcessor, folder: str | Path) -> Path:
    """Writes a folder that `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` load; replaces an older one.

    Call on one process, with the model out of its wrappers.
    """
    return save_hub_folder(model, processor, folder, replace=True)
