"""Writing what a run produces: the Hub-format folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from modeling_m2encoder import M2EncoderModel, M2EncoderProcessor


def export(model: M2EncoderModel, processor: M2EncoderProcessor, folder: str | Path) -> Path:
    """Writes a folder that `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` load.

    It is written beside and renamed, so that `folder` is never half there; an older one is replaced at the end.
    Call on one process, with the model out of its wrappers.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder
