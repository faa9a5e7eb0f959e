"""The page of model_cards/static in a real Chromium: the numbers are torch's, and anybody can use it.

The site is built once, as `python -m conversion.static_demo` does it, from a tiny model; without npm, its registry or
Chromium the tests that need them are skipped and say so. Each test prints what it measured (`pytest -s`).
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime", reason="needs the packages of the export extra")
pytest.importorskip("onnxscript", reason="needs the packages of the export extra")

from conversion.static_demo import build_site, main  # noqa: E402
from modeling_m2encoder import M2EncoderModel, M2EncoderTextModel  # noqa: E402
from modeling_m2encoder.hub_folder import save_hub_folder  # noqa: E402
from tests.browser import PHONE, Visit, browser, visit  # noqa: E402

# What npm says when it is the network that fails, and not the packages.
NO_REGISTRY = re.compile(r"E(NOTFOUND|AI_AGAIN|CONNREFUSED|CONNRESET|TIMEDOUT|NETUNREACH|HOSTUNREACH|503)|ENOTCACHED")
TEXTS = ["a red circle", "红色的圆在蓝色方块的左边", "两个绿色三角形", "a yellow star " * 30]

# Asks the worker of the page, as the page does; pictures come from the site by name.
ASK = """
async ({ texts, pictures }) => {
  const worker = new Worker('encoder.js', { type: 'module' });
  const ask = (message) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => {
      if (data.error) reject(new Error(data.error));
      else if (data.id === 1) resolve(data.embeds);
    };
    worker.postMessage({ id: 1, ...message });
  });
  const answer = { texts: await ask({ texts }), pictures: {}, isolated: self.crossOriginIsolated };
  for (const name of pictures) {
    const blob = await (await fetch(name)).blob();
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none' });
    const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext('2d');
    context.drawImage(bitmap, 0, 0);
    const image = context.getImageData(0, 0, bitmap.width, bitmap.height);
    [answer.pictures[name]] = await ask({ image });
  }
  worker.terminate();
  return answer;
}
"""
# What transformers.js makes of a picture with its own resize.
OWN_RESIZE = """
async (name) => {
  const { env, CLIPImageProcessor, RawImage } = await import('./lib/transformers.min.js');
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: './' });
  const processor = await CLIPImageProcessor.from_pretrained('model');
  const image = await RawImage.fromBlob(await (await fetch(name)).blob());
  return (await processor(image)).pixel_values.tolist();
}
"""


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    """Pictures that shrink much, little, in one direction only, and grow."""
    generator = np.random.default_rng(0)
    waves = np.sin(np.arange(640)[None, :, None] / 9 + np.arange(480)[:, None, None] / 7 + np.arange(3))
    photo = np.clip(127 + 90 * waves + generator.normal(0, 25, waves.shape), 0, 255).astype(np.uint8)
    noise = generator.integers(0, 256, (41, 33, 3), dtype=np.uint8)
    sizes = {"photo": photo, "noise": noise, "tall": photo[:, :32], "small": noise[:9, :13], "fitting": photo[:32, :32]}
    return {f"{name}.png": Image.fromarray(np.ascontiguousarray(pixels)) for name, pixels in sizes.items()}


@pytest.fixture(scope="module")
def hub(tiny_model, processor, tmp_path_factory) -> Path:
    return save_hub_folder(tiny_model, processor, tmp_path_factory.mktemp("static") / "tiny")


@pytest.fixture(scope="module")
def site(hub: Path, pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "site"
    if shutil.which("npm") is None:
        pytest.skip("the page was not tried: no npm on this machine to fetch transformers.js with")
    try:
        build_site(hub, folder)
    except ValueError as error:
        if NO_REGISTRY.search(str(error)):
            pytest.skip(f"the page was not tried: no npm registry ({error})")
        raise
    for name, picture in pictures.items():
        picture.save(folder / name)
    pictures["photo.png"].save(folder / "photo.jpg", quality=90)
    return folder


class Files(SimpleHTTPRequestHandler):
    """A folder, optionally with the headers that allow WebAssembly threads."""

    isolated = False

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path, *, isolated: bool = False) -> Iterator[str]:
    handler = type("Handler", (Files,), {"isolated": isolated})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def chromium():
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    with served(site) as address:
        yield address


@contextmanager
def opened(chromium, url: str, *size: Any, **settings: Any) -> Iterator[Visit]:
    """The page with its model loaded."""
    with visit(chromium, *size, **settings) as seen:
        seen.page.goto(url)
        seen.page.get_by_text("tiny is ready.").wait_for()
        yield seen


@pytest.fixture(scope="module")
def expected(hub: Path, site: Path, processor, pictures) -> dict[str, torch.Tensor]:
    """What torch says of the texts, and of each picture."""
    model = M2EncoderModel.from_pretrained(hub).eval()
    with torch.no_grad():
        texts = model(**processor.tokenizer(TEXTS, padding=True, return_tensors="pt")).text_embeds
        found = {
            name: model(**processor(images=picture, return_tensors="pt")).image_embeds[0]
            for name, picture in {**pictures, "photo.jpg": Image.open(site / "photo.jpg")}.items()
        }
    return {"texts": texts, "logit_scale": model.logit_scale.detach().exp(), **found}


@pytest.mark.parametrize("isolated", [False, True], ids=["one thread", "threads"])
def test_the_embeddings_are_torchs(chromium, site, pictures, expected, isolated):
    with served(site, isolated=isolated) as url, opened(chromium, url) as seen:
        answer = seen.page.evaluate(ASK, {"texts": TEXTS, "pictures": [*pictures, "photo.jpg"]})
        seen.check()
    assert answer["isolated"] == isolated
    texts = (torch.tensor(answer["texts"]) - expected["texts"]).abs().max()
    images = {name: (torch.tensor(answer["pictures"][name]) - expected[name]).abs().max() for name in pictures}
    jpeg = (torch.tensor(answer["pictures"]["photo.jpg"]) - expected["photo.jpg"]).abs().max()
    print(f"\ntexts {texts:.1e}", *(f"{name} {error:.1e}" for name, error in images.items()), f"JPEG {jpeg:.1e}")
    assert texts < 5e-6
    assert max(images.values()) < 5e-6  # resize.js is PIL's arithmetic
    assert jpeg < 1e-2  # JPEG leaves the last bits to whoever decodes


def test_why_the_page_resizes_itself(chromium, url, pictures, processor, expected, hub):
    """transformers.js leaves it to the canvas, which skips most pixels. When this fails, resize.js can go."""
    with opened(chromium, url) as seen:
        pixels = torch.tensor(seen.page.evaluate(OWN_RESIZE, "photo.png"))
    grey_levels = (pixels - processor(images=pictures["photo.png"], return_tensors="pt")["pixel_values"]).abs() * 127.5
    with torch.no_grad():
        embeds = M2EncoderModel.from_pretrained(hub).eval()(pixel_values=pixels).image_embeds[0]
    apart = (embeds - expected["photo.png"]).abs().max()
    print(f"\ngrey levels: mean {grey_levels.mean():.1f}, largest {grey_levels.max():.0f}; embedding {apart:.1e}")
    assert grey_levels.mean() > 2 and apart > 1e-3


def test_pictures_are_compared_with_texts(chromium, url, pictures, expected):
    """By file button and typed Chinese, what the page shows is torch's softmax."""
    with opened(chromium, url) as seen:
        page = seen.page
        page.get_by_label("Add pictures").set_input_files(
            {"name": "photo.png", "mimeType": "image/png", "buffer": png(pictures["photo.png"])}
        )
        page.get_by_role("button", name="photo.png", pressed=True).wait_for()
        page.get_by_label("Texts to choose from").fill("\n".join([*TEXTS[:3], "", TEXTS[0]]))
        page.get_by_role("button", name="Compare").click()
        page.locator("#probabilities li").first.wait_for()
        shown = [row.inner_text().split("\n") for row in page.locator("#probabilities li").all()]
        seen.check()
    cosines = expected["texts"][:3] @ expected["photo.png"]
    probabilities = (expected["logit_scale"] * cosines).softmax(-1)
    order = probabilities.argsort(descending=True)
    assert [text for text, _ in shown] == [TEXTS[index] for index in order]
    for (_, share), index in zip(shown, order, strict=True):
        assert abs(float(share.removesuffix(" %")) - 100 * probabilities[index]) < 0.06


def test_search_by_keyboard_on_a_phone(chromium, url):
    """Nothing is wider than the window, everything can be reached without a mouse, and axe-core has no objections."""
    with opened(chromium, url, PHONE, touch=True) as seen:
        page = seen.page
        assert seen.overflow() == 0
        page.get_by_role("button", name="a green triangle").focus()
        page.keyboard.press("Enter")
        page.get_by_role("button", name="a green triangle", pressed=True).wait_for()
        page.get_by_label("Describe a picture").fill("红色的圆形")
        page.keyboard.press("Enter")
        page.locator("#found li").first.wait_for()
        scores = [float(score) for score in page.locator("#found").inner_text().split()]
        assert len(scores) == 6 and scores == sorted(scores, reverse=True)
        page.get_by_role("button", name="Compare").click()
        page.locator("#probabilities li").first.wait_for()
        assert seen.overflow() == 0
        assert not seen.violations()
        seen.check()


def test_what_cannot_be_done_is_said_and_the_page_lives_on(chromium, url):
    with opened(chromium, url) as seen:
        page = seen.page
        page.get_by_label("Describe a picture").fill("  ")
        page.get_by_role("button", name="Search").click()
        page.get_by_text("Type a description of the picture first.").wait_for()
        page.get_by_label("Texts to choose from").fill("\n \n")
        page.get_by_role("button", name="Compare").click()
        page.get_by_text("Type at least one text").wait_for()
        page.get_by_label("Add pictures").set_input_files(
            [{"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG no picture"}]
        )
        page.get_by_text("broken.png cannot be read as a picture").wait_for()
        page.get_by_label("Describe a picture").fill("<img src=x onerror=alert(1)>")
        page.get_by_role("button", name="Search").click()
        page.locator("#found li").first.wait_for()
        seen.check()


def test_a_model_on_the_hub(chromium, site, tmp_path):
    """With `--hub` the weights come from there; here the browser's requests to it are answered from a folder."""
    folder = tmp_path / "site"
    shutil.copytree(site, folder, ignore=shutil.ignore_patterns("model"))
    settings = json.loads((folder / "site.json").read_text("utf-8"))
    (folder / "site.json").write_text(json.dumps(settings | {"hub": "you/tiny"}), encoding="utf-8")
    prefix = "https://huggingface.co/you/tiny/resolve/main/"
    with served(folder) as url, visit(chromium) as seen:

        def answer(route) -> None:
            path = site / "model" / route.request.url.removeprefix(prefix)
            route.fulfill(path=path) if path.is_file() else route.fulfill(status=404)

        seen.page.context.route("https://huggingface.co/**", answer)
        seen.page.goto(url)
        seen.page.get_by_text("tiny is ready.").wait_for()
        assert seen.outside and all(address.startswith(prefix) for address in seen.outside)


# ---- Building ------------------------------------------------------------------------------------------------------


def test_int8_only(hub, tmp_path, monkeypatch):
    def export(_: Path, output: Path) -> None:
        (output / "onnx").mkdir(parents=True)
        for tower, form in itertools.product(("text", "vision"), ("", "_quantized")):
            for ending in ("onnx", "onnx_data"):
                (output / "onnx" / f"{tower}_model{form}.{ending}").touch()

    monkeypatch.setattr("conversion.static_demo.export", export)
    monkeypatch.setattr("conversion.static_demo.fetch_libraries", lambda lib: lib.mkdir())
    main([str(hub), str(tmp_path / "site"), "--dtype", "q8", "--name", "small"])
    assert {path.name for path in (tmp_path / "site" / "model" / "onnx").iterdir()} == {
        f"{tower}_model_quantized.onnx{data}" for tower in ("text", "vision") for data in ("", "_data")
    }
    settings = json.loads((tmp_path / "site" / "site.json").read_text("utf-8"))
    assert (settings["dtype"], settings["name"], settings["hub"]) == ("q8", "small", None)


def test_only_the_page_where_the_hub_has_the_model(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.static_demo.fetch_libraries", lambda lib: lib.mkdir())
    main([str(hub), str(tmp_path / "site"), "--hub", "you/tiny"])
    settings = json.loads((tmp_path / "site" / "site.json").read_text("utf-8"))
    assert settings["hub"] == settings["name"] == "you/tiny"
    assert settings["logit_scale"] == pytest.approx(M2EncoderModel.from_pretrained(hub).logit_scale.exp().item())
    assert not (tmp_path / "site" / "model").exists()


@pytest.mark.parametrize("fault", ["no folder", "half", "exists", "npm"])
def test_refusals_leave_nothing_behind(fault, hub, tmp_path, monkeypatch):
    model, site, message = hub, tmp_path / "site", "exists already"
    if fault == "no folder":
        model, message = tmp_path / "nothing", "No Hub folder"
    elif fault == "half":
        model, message = tmp_path / "half", "does not hold both halves"
        M2EncoderTextModel.from_pretrained(hub).save_pretrained(model)
    elif fault == "exists":
        site.mkdir()
    else:
        npm = tmp_path / "bin" / "npm"
        npm.parent.mkdir()
        npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
        npm.chmod(0o755)
        monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
        message = "npm does not give @huggingface/transformers@.*E404"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message):
        main([str(model), str(site)])
    assert sorted(tmp_path.rglob("*")) == before


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()
