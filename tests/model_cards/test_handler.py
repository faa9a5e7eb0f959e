"""The endpoint's handler: every form of request gives the model's own numbers, by HTTP too."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from PIL import Image
from transformers import pipeline

from benchmarks.endpoint_server import HANDLER, load_handler, serving
from tests.model_cards.conftest import encoded

LABELS = ["红色的圆", "蓝色方块", "黄色星星"]


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def expected(tiny_model, processor, captions, images):
    with torch.no_grad():
        return tiny_model(**processor(text=captions, images=images, return_tensors="pt"))


def test_texts(handler, expected, captions):
    assert torch.tensor(handler({"inputs": captions})) == pytest.approx(expected.text_embeds, abs=1e-6)
    one_by_one = torch.tensor([handler({"inputs": text}) for text in captions])  # not padded
    assert one_by_one == pytest.approx(expected.text_embeds, abs=1e-6)
    assert handler({"inputs": {"text": captions[3]}}) == handler({"inputs": captions[3]})


def test_more_texts_than_one_pass_takes(handler, captions):
    many = torch.tensor(handler({"inputs": captions * 20}))
    assert many.view(20, len(captions), -1) == pytest.approx(many[: len(captions)].expand(20, -1, -1), abs=1e-6)


def test_every_form_of_an_image(handler, expected, images):
    png = encoded(images[0])
    text = in_base64(png)
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    forms = [
        images[0],
        png,
        bytearray(png),
        text,
        wrapped,
        f"\n{text}\n",
        f"data:image/png;base64,{text}",
        {"image": text},
    ]
    answers = [handler({"inputs": form}) for form in forms]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0] == pytest.approx(expected.image_embeds[0].tolist(), abs=1e-6)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PNG", "AVIF"])
def test_formats(handler, images, format):
    content = encoded(images[0], format)
    forms = [content, {"image": in_base64(content)}, in_base64(content)]
    answers = handler({"inputs": forms})
    reread = handler({"inputs": Image.open(io.BytesIO(content)).convert("RGB")})
    assert all(answer == pytest.approx(reread, abs=1e-6) for answer in answers)


def test_texts_and_images_in_their_order(handler, expected, captions, images):
    inputs = [images[1], captions[0], in_base64(encoded(images[2])), captions[4]]
    answers = torch.tensor(handler({"inputs": inputs}))
    rows = [expected.image_embeds[1], expected.text_embeds[0], expected.image_embeds[2], expected.text_embeds[4]]
    assert answers == pytest.approx(torch.stack(rows), abs=1e-6)


def test_normalize_and_dimensions(handler, tiny_model, processor, captions):
    with torch.no_grad():
        raw = tiny_model.get_text_features(**processor(text=captions[:1], return_tensors="pt")).pooler_output[0]
    assert handler({"inputs": captions[0], "parameters": {"normalize": False}}) == pytest.approx(raw.tolist(), abs=1e-5)
    cut = raw[:8] / raw[:8].norm()
    for request in ({"parameters": {"dimensions": 8}}, {"dimensions": 8, "normalize": None}):
        assert handler({"inputs": captions[0], **request}) == pytest.approx(cut.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "parameters",
    [
        {"candidate_labels": LABELS, "hypothesis_template": "一张{}的照片"},
        {"candidate_labels": ["a red circle", "star " * 80, "蓝色"]},
        {"candidate_labels": ["circle"], "hypothesis_template": "{}"},
    ],
)
def test_scores_are_the_pipelines(handler, hub_folder, images, parameters):
    classify = pipeline("zero-shot-image-classification", model=str(hub_folder))
    answers = handler({"inputs": images[:3], "parameters": parameters})
    for answer, image in zip(answers, images, strict=False):
        reference = {each["label"]: each["score"] for each in classify(image, **parameters)}
        assert {each["label"]: each["score"] for each in answer} == pytest.approx(reference, abs=1e-5)
        scores = [each["score"] for each in answer]
        assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-5)
        assert handler({"inputs": image, "parameters": parameters}) == [
            {"label": each["label"], "score": pytest.approx(each["score"], abs=1e-6)} for each in answer
        ]


def test_labels_in_one_text(handler, images):
    """As query strings have them; with the commas of both languages."""
    answers = [
        handler({"inputs": images[0], "parameters": {"candidate_labels": labels}})
        for labels in (LABELS, "红色的圆, 蓝色方块,黄色星星", "红色的圆\uff0c蓝色方块\u3001黄色星星")
    ]
    assert answers[0] == answers[1] == answers[2]


def test_templates_are_not_programs(handler, images):
    """str.format would take a gigabyte for one of these and read attributes for the other."""
    for template in ("{:>1000000000}", "{0.__class__}", "no place", "{} and {}"):
        with pytest.raises(ValueError, match="one place for the label"):
            handler({"inputs": images[0], "parameters": {"candidate_labels": LABELS, "hypothesis_template": template}})


def test_photos_are_turned_upright(handler, images):
    sideways = images[0].transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    content = encoded(sideways, "PNG", exif=exif)
    assert handler({"inputs": content}) == handler({"inputs": encoded(images[0])})
    assert handler({"inputs": content}) != handler({"inputs": encoded(sideways)})


def test_modes(handler, tiny_model, processor, images):
    """16 bits, CMYK, palettes and transparency are read as the model's own processor reads them."""
    deep = Image.fromarray(np.linspace(0, 65535, 40 * 40, dtype=np.uint16).reshape(40, 40))
    files = [
        encoded(deep),
        encoded(images[0].convert("CMYK"), "JPEG"),
        encoded(images[0].convert("P")),
        encoded(images[0].convert("RGBA")),
        encoded(images[0].convert("LA")),
        encoded(images[0].convert("1")),
    ]
    for content in files:
        pixels = processor(images=[Image.open(io.BytesIO(content))], return_tensors="pt")["pixel_values"]
        assert torch.equal(handler._pixels(content), pixels)  # resized beforehand, to save memory
        with torch.no_grad():
            reference = tiny_model(pixel_values=pixels).image_embeds[0]
        assert handler({"inputs": content}) == pytest.approx(reference.tolist(), abs=1e-6)


def test_an_animation_is_its_first_picture(handler, images):
    moving = encoded(images[0], "GIF", save_all=True, append_images=images[1:3])
    assert handler({"inputs": moving}) == handler({"inputs": encoded(images[0], "GIF")})


def test_threads_change_nothing(handler, captions, images):
    requests = [{"inputs": captions[i % 6]} for i in range(12)]
    requests += [{"inputs": [*captions[: 1 + i % 6], images[i % 6]]} for i in range(12)]
    requests += [{"inputs": images[i % 6], "parameters": {"candidate_labels": LABELS[: 1 + i % 3]}} for i in range(12)]
    alone = [handler(request) for request in requests]
    with ThreadPoolExecutor(16) as pool:
        for answers in (list(pool.map(handler, requests)) for _ in range(3)):
            assert answers == alone  # to the last bit


def test_the_official_client(handler, images, captions, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    png = encoded(images[0])
    with serving(handler) as address:
        client = InferenceClient(model=address)
        seen = client.zero_shot_image_classification(png, LABELS, hypothesis_template="一张{}的照片")
        parameters = {"candidate_labels": LABELS, "hypothesis_template": "一张{}的照片"}
        expected = handler({"inputs": png, "parameters": parameters})
        assert [{"label": each.label, "score": each.score} for each in seen] == expected
        seen = client.feature_extraction(captions, normalize=False, dimensions=8)
        expected = handler({"inputs": captions, "parameters": {"normalize": False, "dimensions": 8}})
        assert seen == pytest.approx(np.array(expected), abs=1e-6)
        assert client.feature_extraction("红色的圆").shape == (24,)


def test_an_image_as_the_body(handler, images):
    png = encoded(images[0])
    with serving(handler) as address:
        query = "candidate_labels=%E5%9C%86,star&hypothesis_template=%7B%7D"
        assert post(address, png, "image/png") == handler({"inputs": png})
        assert post(address + "?dimensions=4&normalize=false", png, "image/png") == handler(
            {"inputs": png, "parameters": {"dimensions": 4, "normalize": False}}
        )
        assert {each["label"] for each in post(f"{address}/?{query}", png, "image/jpeg")} == {"圆", "star"}


def post(address: str, body: bytes, kind: str):
    with urlopen(Request(address, body, {"Content-Type": kind}), timeout=30) as response:
        return json.loads(response.read())


# ---- The folder, the settings ----------------------------------------------------------------------------------------


def test_the_folder_alone_is_enough(hub_folder, handler, tmp_path):
    """A process that knows nothing of this repository, and a handler that finds the folder it lies in."""
    folder = tmp_path / "downloaded"
    shutil.copytree(hub_folder, folder)
    shutil.copy(HANDLER, folder)
    script = """
import json, sys
import handler
answer = handler.EndpointHandler()({"inputs": "红色的圆"})
assert "modeling_m2encoder" not in sys.modules
print(json.dumps(answer))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "code"), "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(handler({"inputs": "红色的圆"}), abs=1e-6)


def test_imports_are_what_an_endpoint_has():
    tree = ast.parse(HANDLER.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {name.split(".")[0] for name in names}
    assert tops - set(sys.stdlib_module_names) == {"torch", "transformers", "PIL"}


def test_settings_from_the_environment(hub_folder, captions, monkeypatch):
    monkeypatch.setenv("M2_ENCODER_MAX_TEXTS", "2")
    small = load_handler(hub_folder)
    assert len(small({"inputs": captions[:2]})) == 2
    with pytest.raises(ValueError, match="3 entries, at most 2") as refusal:
        small({"inputs": captions[:3]})
    assert refusal.value.status == 413
    monkeypatch.setenv("M2_ENCODER_MAX_TEXTS", "many")
    with pytest.raises(ValueError, match="M2_ENCODER_MAX_TEXTS must be a whole number"):
        load_handler(hub_folder)
    monkeypatch.setenv("M2_ENCODER_MAX_TEXTS", "0")
    with pytest.raises(ValueError, match="1 or more"):
        load_handler(hub_folder)


def test_the_published_numbers_are_the_measured_ones():
    root = HANDLER.parents[1]
    text = (root / "docs" / "serving.md").read_text(encoding="utf-8")
    measured = json.loads((root / "benchmarks" / "handler.json").read_text(encoding="utf-8"))
    load, one = measured["load"], measured["zero_shot_one_client"]
    assert (load["requests"], load["clients"], load["errors"]) == (2000, 16, 0)
    assert f"| {load['requests_per_second']:.0f} per second, no errors |" in text
    assert f"| {load['p50_ms']:.0f} ms, {load['p95_ms']:.0f} ms |" in text
    assert f"| {load['resident_before_mib']} MiB, {load['resident_after_mib']} MiB |" in text
    names = ("pipeline", "handler", "handler_over_http")
    milliseconds = ", ".join("{:.1f} ms".format(one[name + "_ms"]) for name in names)
    assert f"| {milliseconds} |" in text
    assert f"| {measured['large_picture']['peak_mib']} MiB more |" in text
