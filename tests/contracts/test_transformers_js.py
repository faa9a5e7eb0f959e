"""transformers.js loads both towers and the tokenizer from an exported folder, and gives torch's embeddings.

Installs the packages below from the npm registry into a folder that is removed again (0.5 GB, 10 s and more); without
node, npm or the registry the tests are skipped and say why. Nothing is compiled or fetched beside the packages.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

pytest.importorskip("onnxruntime", reason="needs the packages of the export extra")
pytest.importorskip("onnxscript", reason="needs the packages of the export extra")

from conversion.export import export  # noqa: E402
from modeling_m2encoder.hub_folder import save_hub_folder  # noqa: E402

# The library and everything of it that computes, to the last digit.
PACKAGES = {
    "@huggingface/transformers": "4.3.1",
    "@huggingface/tokenizers": "0.2.0",
    "onnxruntime-node": "1.30.0",
    "onnxruntime-common": "1.30.0",
    "sharp": "0.35.5",
}
# What npm says when it is the network that fails, and not the packages.
NO_REGISTRY = re.compile(r"E(NOTFOUND|AI_AGAIN|CONNREFUSED|CONNRESET|TIMEDOUT|NETUNREACH|HOSTUNREACH|503)|ENOTCACHED")

SCRIPT = """
import { readFileSync } from 'node:fs';
import {
    env, AutoModel, AutoTokenizer, AutoImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection,
    RawImage,
} from '@huggingface/transformers';

const [folder, inputs] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = '/';
const { captions, images, side } = JSON.parse(readFileSync(inputs));
const answer = {};

const tokenizer = await AutoTokenizer.from_pretrained(folder);
tokenizer.config.model_max_length = Infinity;
const tokens = tokenizer(captions, { padding: true });
answer.input_ids = tokens.input_ids.tolist().map((row) => row.map(Number));
const processor = await AutoImageProcessor.from_pretrained(folder);
const pixels = await processor(images.map((bytes) => new RawImage(new Uint8ClampedArray(bytes), side, side, 3)));
answer.pixel_values = pixels.pixel_values.tolist();

for (const dtype of ['fp32', 'q8']) {
    const text = await AutoModel.from_pretrained(folder, { model_file_name: 'text_model', dtype });
    const vision = await AutoModel.from_pretrained(folder, { model_file_name: 'vision_model', dtype });
    answer[dtype] = {
        text_embeds: (await text(tokens)).text_embeds.tolist(),
        image_embeds: (await vision(pixels)).image_embeds.tolist(),
    };
}
const text = await CLIPTextModelWithProjection.from_pretrained(folder, { dtype: 'fp32' });
const vision = await CLIPVisionModelWithProjection.from_pretrained(folder, { dtype: 'fp32' });
answer.clip = {
    text_embeds: (await text(tokens)).text_embeds.tolist(),
    image_embeds: (await vision(pixels)).image_embeds.tolist(),
};
console.log(JSON.stringify(answer));
"""


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """A node project with the packages and the script."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"transformers.js was not tried: no {' and no '.join(missing)} on this machine")
    with tempfile.TemporaryDirectory(prefix="transformers-js-") as name:
        folder = Path(name)
        settings = {"private": True, "type": "module", "dependencies": PACKAGES}
        (folder / "package.json").write_text(json.dumps(settings))
        (folder / "embed.js").write_text(SCRIPT, encoding="utf-8")
        # onnxruntime-node's install script fetches CUDA libraries; the CPU's are in the package.
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        command += ["--fetch-retries=1", "--fetch-timeout=20000"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode and NO_REGISTRY.search(done.stderr):
            pytest.skip(f"transformers.js was not tried: no npm registry ({done.stderr.splitlines()[-1]})")
        assert done.returncode == 0, done.stderr
        yield folder


@pytest.fixture(scope="module")
def inputs(captions, images, config) -> dict[str, Any]:
    """Captions in both languages, one beyond 52 tokens, and images that need no resizing: that is another matter."""
    side = config.image_size
    resized = [image.crop((0, 0, side, side)) for image in images[:3]]
    return {"captions": [captions[0], captions[3], "蓝色方块 red circle " * 12], "images": resized, "side": side}


@pytest.fixture(scope="module")
def answer(project, tiny_model, processor, inputs, tmp_path_factory) -> dict[str, Any]:
    """What transformers.js makes of the inputs."""
    folder = tmp_path_factory.mktemp("transformers_js")
    hub = save_hub_folder(tiny_model, processor, folder / "hub")
    export(hub, folder / "js", largest_file=120_000)  # so that the fp32 weights lie beside the graphs
    assert (folder / "js" / "onnx" / "text_model.onnx_data").is_file()
    (folder / "inputs.json").write_text(
        json.dumps(inputs | {"images": [list(image.tobytes()) for image in inputs["images"]]}), encoding="utf-8"
    )
    command = ["node", "embed.js", str(folder / "js"), str(folder / "inputs.json")]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def expected(tiny_model, processor, inputs) -> Any:
    batch = processor(images=inputs["images"], return_tensors="pt")
    batch |= processor.tokenizer(inputs["captions"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] > 52
    with torch.no_grad():
        return batch, tiny_model(**batch)


def test_the_same_tokens_and_pixels(answer, expected):
    batch, _ = expected
    assert answer["input_ids"] == batch["input_ids"].tolist()
    assert (torch.tensor(answer["pixel_values"]) - batch["pixel_values"]).abs().max() < 1e-6


@pytest.mark.parametrize("loaded_with", ["fp32", "clip"])
@pytest.mark.parametrize("modality", ["text_embeds", "image_embeds"])
def test_the_same_embeddings(loaded_with, modality, answer, expected):
    seen, torch_embeds = torch.tensor(answer[loaded_with][modality]), expected[1][modality]
    assert seen.shape == torch_embeds.shape
    assert (seen - torch_embeds).abs().max() < 2e-6


@pytest.mark.parametrize("modality", ["text_embeds", "image_embeds"])
def test_int8_is_near(modality, answer, expected):
    assert cosine_similarity(torch.tensor(answer["q8"][modality]), expected[1][modality]).min() > 0.99
