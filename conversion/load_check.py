"""Loads a model folder as its users will: in another process, with the folder's own code, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Runs with the folder as its argument, and imports nothing of this project.
LOAD_CHECK = """
import sys

sys.modules["modeling_m2encoder"] = None  # installed or not: the folder's own code has to do
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

folder = sys.argv[1]
options = {"trust_remote_code": True, "local_files_only": True}
model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
processor = AutoProcessor.from_pretrained(folder, **options)
AutoTokenizer.from_pretrained(folder, **options), AutoImageProcessor.from_pretrained(folder, **options)
for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
    if report.get(kind):
        sys.exit(f"error: its weights do not fit its config.json, {kind}: {list(report[kind])[:5]}")
if not type(model).__module__.startswith("transformers_modules."):
    sys.exit("error: its code is not the folder's own")
images = [Image.new("RGB", (80, 60), "red"), Image.new("RGB", (7, 90), "blue")]
inputs = processor(text=["a red circle", "红色的圆形"], images=images, return_tensors="pt", padding=True)
inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
with torch.no_grad():
    output = model(**inputs)
for name in ("text_embeds", "image_embeds"):
    norms = output[name].float().norm(dim=-1)
    if not torch.isfinite(output[name]).all() or (norms - 1).abs().max() > 1e-2:
        sys.exit(f"error: {name} are not finite vectors of length 1: lengths {norms.tolist()}")
"""


def check_loads(folder: str | Path) -> None:
    """Loads a folder as its users will: in a process of its own, with the folder's own code, without a network and
    without this project.

    Raises:
        ValueError: if it does not load, or gives no finite embeddings of length 1.
    """
    folder = Path(folder).resolve()
    with tempfile.TemporaryDirectory(prefix="m2-encoder-check.") as empty:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTHON"))}
        environment = {**kept, "HF_HOME": empty, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-I", "-c", LOAD_CHECK, str(folder)]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode < 0:
        raise ValueError(
            f"The process that loads the folder was killed by signal {-done.returncode}, most likely for its memory. "
            "Push from a larger machine, or without this check (--no-load-check)."
        )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise ValueError(f"The folder does not load in a process of its own: {last[0].removeprefix('error: ')}")
