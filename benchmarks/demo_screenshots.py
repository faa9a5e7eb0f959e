"""Pictures of the page of `make demo`, as it is: a real browser types the queries and clicks.

    make demo PORT=7860 &
    python -m benchmarks.demo_screenshots --address http://127.0.0.1:7860

Writes demo.png (desktop: search), demo_classify.png, demo_compare.png and demo_phone.png to docs/images. Needs Chromium
and a font with Chinese characters (Debian: chromium, fonts-noto-cjk), and playwright (the dev extra).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def search(page: Page, query: str) -> None:
    page.get_by_label("Query, in Chinese or English").fill(query)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("p[role=status]").first).to_contain_text(query)


def classify(page: Page) -> None:
    page.get_by_role("tab", name="Classify").click()
    page.locator("tbody tr").nth(1).click()  # an example
    expect(page.get_by_role("table").filter(has_text="Cosine")).to_be_visible()


def compare(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("images are in both results")).to_be_visible()


def picture(page: Page, file: Path) -> None:
    expect(page.locator(".pending:visible")).to_have_count(0)
    page.mouse.move(0, 0)
    page.wait_for_timeout(700)  # transitions
    page.screenshot(path=file, full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="http://127.0.0.1:7860")
    parser.add_argument("--output", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 700})
        page.goto(arguments.address)
        search(page, "红色的圆形")
        picture(page, arguments.output / "demo.png")
        classify(page)
        picture(page, arguments.output / "demo_classify.png")
        compare(page)
        picture(page, arguments.output / "demo_compare.png")
        phone = chromium.new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
        phone.goto(arguments.address)
        search(phone, "a red circle")
        expect(phone.locator(".pending:visible")).to_have_count(0)
        phone.wait_for_timeout(700)
        first_rows = {"x": 0, "y": 0, "width": 390, "height": 1210}
        phone.screenshot(path=arguments.output / "demo_phone.png", full_page=True, clip=first_rows)
        chromium.close()


if __name__ == "__main__":
    main()
