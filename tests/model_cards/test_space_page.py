"""The Space in a real browser: what a person types and clicks, and what is then on the page."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("gradio", reason="the Space needs gradio (the demo extra)")
pytest.importorskip("playwright", reason="pages are tested in a browser: pip install playwright (the dev extra)")

from playwright.sync_api import expect  # noqa: E402

from tests.browser import DESKTOP, PHONE, Visit, asked_hosts, browser, visit  # noqa: E402

SPACE = Path(__file__).parents[2] / "model_cards" / "space"
COLOURS = {"red": (220, 20, 30), "green": (20, 160, 40), "blue": (30, 60, 210)}
PAIRS = "红色的圆形|a red circle;蓝色的方块|a blue square"


def drawing(colour: str, shape: str, size: int, left: int) -> Image.Image:
    image = Image.new("RGB", (96, 96), "white")
    draw, box = ImageDraw.Draw(image), (left, 90 - size, left + size, 90)
    if shape == "circle":
        draw.ellipse(box, COLOURS[colour])
    elif shape == "square":
        draw.rectangle(box, COLOURS[colour])
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], COLOURS[colour])
    return image


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for colour in COLOURS:
        for shape in ("circle", "square", "triangle"):
            (folder / colour).mkdir(exist_ok=True)
            for number in range(4):
                drawing(colour, shape, 30 + 8 * number, 5 * number).save(folder / colour / f"{shape}-{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    return folder


@pytest.fixture(scope="module")
def address(photos, tmp_path_factory) -> Iterator[str]:
    """The program of the Space in a process of its own, as `make demo` starts it, on a free port."""
    with socket.socket() as free:  # gradio takes no port 0
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(SPACE), "EXAMPLES": PAIRS, "PORT": str(port)}
    command = [sys.executable, str(Path(__file__).with_name("page_with_oracle.py"))]
    command += ["--model", "oracle", "--data", str(photos), "--index", str(tmp_path_factory.mktemp("index"))]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                # Keep reading: a full pipe would stop the program.
                threading.Thread(target=lambda: said.extend(process.stdout), daemon=True).start()
                assert any("Passed over broken.jpg" in line for line in said)
                yield found[0]
                break
        else:
            pytest.fail("the page did not start:\n" + "".join(said))
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    log = tmp_path_factory.mktemp("chromium") / "net.json"
    with browser(log) as launched:
        yield launched
    assert asked_hosts(log) <= {"127.0.0.1"}


def is_a(page, place: int, colour: str, shape: str) -> bool:
    """Looks at the pixels of a result as it is shown: `place` counts the pictures from 0."""
    picture = page.locator(".pictures:visible .thumbnail-item img").nth(place)
    expect(picture).to_be_visible()
    image = Image.open(io.BytesIO(picture.screenshot())).convert("RGB")
    pixels = np.asarray(image).astype(int)[3:-3, 3:-3]  # without the frame
    drawn = pixels.min(axis=2) < 128
    rows, columns = np.nonzero(drawn)
    filled = drawn.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    expected = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}[shape]
    distance = np.abs(pixels[drawn].mean(axis=0) - COLOURS[colour]).max()
    return abs(filled - expected) < 0.09 and distance < 40


def violations(seen: Visit) -> list[dict[str, Any]]:
    """When the answer is there: gradio fades what waits for one."""
    expect(seen.page.locator(".pending:visible")).to_have_count(0)
    return seen.violations()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_typed_query_finds_the_right_pictures(chromium, address, size):
    with visit(chromium, size, touch=size is PHONE) as seen:
        page = seen.page
        page.goto(address)
        expect(page.locator(".pictures .thumbnail-item img").first).to_be_visible()  # there is a first result already
        query = page.get_by_label("Query, in Chinese or English")
        query.fill("绿色的三角形")
        page.get_by_role("button", name="Search", exact=True).click()
        expect(page.locator("p[role=status]").first).to_contain_text("绿色的三角形")
        assert all(is_a(page, place, "green", "triangle") for place in range(4))
        assert not is_a(page, 4, "green", "triangle")
        query.fill("红色的圆形")
        query.press("Enter")
        expect(page.locator("p[role=status]").first).to_contain_text("红色的圆形")
        assert all(is_a(page, place, "red", "circle") for place in range(4))
        caption = page.locator(".pictures .caption-label").first.inner_text()
        assert re.fullmatch(r"1\.000\nred/circle-\d\.png", caption)
        assert page.locator(".pictures img").first.get_attribute("alt") == caption
        page.get_by_role("button", name="a blue square", exact=True).click()  # an example
        expect(page.locator("p[role=status]").first).to_contain_text("a blue square")
        assert is_a(page, 0, "blue", "square")
        assert not violations(seen)
        assert seen.overflow() == 0
        seen.check()


def test_images_that_cannot_be_read_are_named(chromium, address):
    with visit(chromium) as seen:
        seen.page.goto(address)
        summary = seen.page.get_by_text("1 image could not be read")
        summary.click()
        expect(seen.page.get_by_text("broken.jpg: ")).to_be_visible()
        expect(seen.page.get_by_text("36 images of")).to_be_visible()


def test_a_blank_query_is_told_so(chromium, address):
    with visit(chromium) as seen:
        seen.page.goto(address)
        seen.page.get_by_label("Query, in Chinese or English").fill("  ")
        seen.page.get_by_role("button", name="Search", exact=True).click()
        expect(seen.page.locator("p[role=alert]")).to_contain_text("Type what you are looking for")
        seen.check()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_classification(chromium, address, photos, size):
    with visit(chromium, size, touch=size is PHONE) as seen:
        page = seen.page
        page.goto(address)
        page.get_by_role("tab", name="Classify").click()
        page.locator("input[type=file]").first.set_input_files(str(photos / "blue" / "circle-2.png"))
        page.get_by_label("Labels, in either language").fill(
            "红色的圆形\u3001蓝色的方块,a blue circle\uff0c<b>green</b>"
        )
        page.get_by_role("button", name="Classify", exact=True).click()
        table = page.get_by_role("table").filter(has_text="Cosine")
        expect(table).to_be_visible()
        rows = [row.inner_text().split("\t") for row in table.locator("tbody tr").all()]
        assert [row[0].strip() for row in rows][0] == "a blue circle"
        assert {row[0].strip() for row in rows} == {"a blue circle", "红色的圆形", "蓝色的方块", "<b>green</b>"}
        shares = [float(row[-2].removesuffix("%")) for row in rows]
        assert sum(shares) == pytest.approx(100, abs=0.3) and shares == sorted(shares, reverse=True)
        assert [float(row[-1]) for row in rows][0] == pytest.approx(1, abs=1e-3)
        assert table.locator("[lang=zh-Hans]").count() == 2
        bars = [bar.bounding_box()["width"] for bar in table.locator(".bar").all()]
        assert bars == sorted(bars, reverse=True) and bars[0] > 2 * bars[1]
        page.locator("tbody tr").filter(has_text="红色的圆形，蓝色的方块").click()  # an example: a red circle
        expect(table.locator("tbody tr")).to_have_count(2)
        expect(table.locator("tbody tr").first).to_contain_text("红色的圆形")
        page.get_by_label("Template for Chinese").fill("没有位置")
        page.get_by_role("button", name="Classify", exact=True).click()
        expect(page.locator("p[role=alert]")).to_contain_text("A template needs one place")
        assert not violations(seen)
        assert seen.overflow() == 0
        seen.check()


def test_files_that_are_no_pictures(chromium, address, tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    words = {
        "damaged.png": "not a picture",
        "drawing.svg": "not a picture",
        "large.png": "10000 x 10000 pixels are more",
    }
    for name, expected in words.items():
        with visit(chromium) as seen:
            seen.page.goto(address)
            seen.page.get_by_role("tab", name="Classify").click()
            seen.page.locator("input[type=file]").first.set_input_files(str(tmp_path / name))
            expect(seen.page.get_by_test_id("image").locator("img").first).to_be_attached()
            seen.page.get_by_role("button", name="Classify", exact=True).click()
            expect(seen.page.locator("p[role=alert]")).to_contain_text(expected)


@pytest.mark.parametrize("marks", [{}, {"meta": {}}, {"meta": {"_type": "gradio.FileData"}}, {"url": "data:,"}])
def test_nobody_can_name_a_file_of_the_server(address, photos, marks):
    """Through the API, an image is a file that was uploaded and no other, with gradio's mark of a file or without."""
    image = {"path": str(photos / "red" / "circle-0.png"), **marks}
    body = json.dumps({"data": [image, "a circle", "a {}", "{}"]}).encode()
    call = f"{address}/gradio_api/call/classify"
    with urlopen(Request(call, body, {"Content-Type": "application/json"}), timeout=30) as response:
        event = json.load(response)["event_id"]
    with urlopen(f"{call}/{event}", timeout=30) as response:
        answer = response.read().decode()
    assert "event: error" in answer and "table" not in answer


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_comparison_of_the_languages(chromium, address, size):
    with visit(chromium, size, touch=size is PHONE) as seen:
        page = seen.page
        page.goto(address)
        page.get_by_role("tab", name="Compare").click()
        assert page.get_by_label("Query in Chinese").get_attribute("lang") == "zh"
        page.get_by_label("Query in Chinese").fill("红色的圆形")
        page.get_by_label("Query in English").fill("a red square")
        page.get_by_label("Images to show").last.fill("8")
        page.get_by_role("button", name="Compare", exact=True).click()
        # Four circles and four squares: what is only red or only of the shape comes after them.
        expect(page.get_by_text("images are in both results")).to_contain_text(re.compile(r"\d of 8"))
        assert is_a(page, 0, "red", "circle") and is_a(page, 8, "red", "square")
        page.get_by_label("Query in English").fill("a red circle")
        page.get_by_label("Query in English").press("Enter")
        note = page.get_by_text("images are in both results")
        expect(note).to_contain_text("8 of 8")
        expect(note).to_contain_text("the first ones are the same")
        assert page.locator(".pictures:visible .caption-label").nth(8).inner_text().startswith("1.000, zh #1")
        assert not violations(seen)
        assert seen.overflow() == 0
        seen.check()


def test_the_keyboard_is_enough(chromium, address):
    """Tab reaches the tabs, the query, the slider, the button and the pictures in this order, and focus can be seen."""
    with visit(chromium) as seen:
        page = seen.page
        page.goto(address)
        expect(page.locator(".pictures .thumbnail-item").first).to_be_visible()
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            element = page.evaluate(
                """() => { const e = document.activeElement; const s = getComputedStyle(e);
                return [e.tagName, e.getAttribute('role') || e.type || '', (e.innerText || '').trim().slice(0, 30),
                        e.matches(':focus-visible'), s.outlineStyle + s.boxShadow + s.borderColor] }"""
            )
            reached.append(element)
        names = [f"{tag} {kind} {text}" for tag, kind, text, *_ in reached]
        order = ["BUTTON tab Search", "TEXTAREA", "INPUT", "BUTTON submit Search", "BUTTON"]
        places = [next((i for i, name in enumerate(names) if name.startswith(wanted)), None) for wanted in order[:4]]
        assert None not in places and places == sorted(places), names
        assert all(visible for *_, visible, _ in reached[: places[3] + 1])
        page.get_by_label("Query, in Chinese or English").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("blue triangle")
        page.keyboard.press("Enter")
        expect(page.locator("p[role=status]").first).to_contain_text("blue triangle")
        assert is_a(page, 0, "blue", "triangle")


def test_dark_colours_have_contrast(chromium, address):
    with visit(chromium) as seen:
        seen.page.emulate_media(color_scheme="dark")
        seen.page.goto(address)
        expect(seen.page.locator(".pictures .thumbnail-item").first).to_be_visible()
        assert not violations(seen)


def test_programs_may_ask_too(address, photos):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, analytics_enabled=False)
    pictures, note = client.predict("a red circle", 4, api_name="/search")
    assert len(pictures) == 4 and all("red/circle" in each["caption"] for each in pictures)
    assert "a red circle" in note
    table = client.predict(
        handle_file(photos / "red" / "square-1.png"), "方块, 圆形", "a {}", "{}", api_name="/classify"
    )
    assert table.index("方块") < table.index("圆形")
