"""A real headless Chromium for the tests of pages, which records what a page says and what it asks the network for.

    with browser() as chromium, visit(chromium) as seen:
        seen.page.goto(url)
        ...
        seen.check()                  # no console errors, and no request to another machine than this one
        assert not seen.violations()  # axe-core: what stops people who use a keyboard or a screen reader

The playwright package drives the Chromium of the system; without either of them the tests are skipped and say why.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright", reason="pages are tested in a browser: pip install playwright (the dev extra)")

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, sync_playwright  # noqa: E402

DESKTOP, PHONE = (1280, 900), (390, 844)
FLAGS = [
    "--no-sandbox",  # root in a container has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# Nothing leaves this machine even when a page tries to; what it tried is in the record.
NO_OUTSIDE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
# Resolves when no transition runs any more; what spins for ever is not waited for.
SETTLED = """() => Promise.all(document.getAnimations()
    .filter((each) => each.effect.getComputedTiming().endTime !== Infinity)
    .map((each) => each.finished.catch(() => null)))"""
HERE = {"127.0.0.1", "localhost", "::1"}


@contextmanager
def browser(net_log: Path | None = None) -> Iterator[Browser]:
    """Chromium with an empty profile of its own.

    Args:
        net_log: where Chromium writes its own log of the network when it closes, read by `asked_hosts`.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("pages are tested in a browser, and there is no chromium here (Debian: apt install chromium)")
    log = [f"--log-net-log={net_log}"] if net_log else []
    with tempfile.TemporaryDirectory(prefix="chromium-") as home, sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium, args=[*FLAGS, NO_OUTSIDE, *log], env={"HOME": home, "PATH": "/usr/bin:/bin"}
        )
        try:
            yield launched
        finally:
            launched.close()


def asked_hosts(net_log: Path) -> set[str]:
    """The hosts that pages asked for anything, by Chromium's own `net_log`: workers and prefetches are in it too.

    Chromium's own business (accounts, updates) has no initiator and is left out; `NO_OUTSIDE` stops it.
    """
    log = json.loads(net_log.read_text(encoding="utf-8"))
    asked = [event.get("params", {}) for event in log["events"]]
    pages = [each for each in asked if each.get("initiator", "").startswith("http")]
    return {urlsplit(each["url"]).hostname or "" for each in pages if "url" in each}


@dataclass
class Visit:
    """A page and its record."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """Console messages of level error and exceptions that nothing caught."""
    requests: list[str] = field(default_factory=list)
    """The URL of each request, data: and blob: URLs left out."""
    failed: list[str] = field(default_factory=list)
    """Answers of 400 and above, and requests without an answer."""

    @property
    def outside(self) -> list[str]:
        """Requests to another machine than this one."""
        return [url for url in self.requests if urlsplit(url).hostname not in HERE]

    def check(self) -> None:
        """Fails the test when the page complained, asked another machine, or missed a file."""
        assert self.requests, "nothing was asked for: was a page opened?"
        assert not self.errors, f"errors in the console: {self.errors}"
        assert not self.outside, f"requests to other machines: {self.outside}"
        assert not self.failed, f"requests that failed: {self.failed}"

    def violations(self, impacts: tuple[str, ...] = ("serious", "critical")) -> list[dict[str, Any]]:
        """What axe-core finds on the page as it is now (labels, contrast, roles, languages, ...): rule, impact and
        the elements."""
        pytest.importorskip("axe_playwright_python", reason="needs axe-core: pip install axe-playwright-python (dev)")
        from axe_playwright_python.sync_playwright import Axe

        self.page.evaluate(SETTLED)  # half-transparent text has no contrast
        found = Axe().run(self.page).response["violations"]
        return [
            {"rule": each["id"], "impact": each["impact"], "elements": [node["html"][:200] for node in each["nodes"]]}
            for each in found
            if each["impact"] in impacts
        ]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window: 0 where nobody has to scroll sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextmanager
def visit(chromium: Browser, size: tuple[int, int] = DESKTOP, *, touch: bool = False) -> Iterator[Visit]:
    """A new page, with no cookies and no cache, in a window of `size` (width, height) pixels."""
    context = chromium.new_context(
        viewport={"width": size[0], "height": size[1]}, has_touch=touch, is_mobile=touch, locale="en-GB"
    )
    context.set_default_timeout(30_000)
    seen = Visit(context.new_page())

    def told(message: ConsoleMessage) -> None:
        if message.type == "error":
            seen.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def asked(request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")):
            seen.requests.append(request.url)

    def answered(response: Response) -> None:
        if response.status >= 400:
            seen.failed.append(f"{response.status} {response.url}")

    def unanswered(request: Request) -> None:
        # Requests that end because the page goes away, or drops what it no longer needs, are no failures.
        if "ERR_ABORTED" not in (request.failure or ""):
            seen.failed.append(f"{request.failure} {request.url}")

    page = seen.page
    page.on("console", told)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("request", asked)
    page.on("websocket", lambda socket: seen.requests.append(socket.url))
    page.on("response", answered)
    page.on("requestfailed", unanswered)
    try:
        yield seen
    finally:
        context.close()
