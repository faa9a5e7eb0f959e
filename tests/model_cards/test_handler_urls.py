"""URLs: never fetched unless that is switched on, and then from public addresses only."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.endpoint_server import load_handler
from tests.model_cards.conftest import encoded

PRIVATE = [
    "127.0.0.1",
    "127.1",
    "2130706433",  # 127.0.0.1 as one number
    "0x7f000001",
    "0.0.0.0",
    "localhost",
    "10.0.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "100.64.0.1",
    "169.254.169.254",
    "224.0.0.1",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[fe80::1]",
    "[fc00::1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
]


@pytest.fixture(scope="module")
def fetching(hub_folder):
    handler = load_handler(hub_folder)
    handler.limits = replace(handler.limits, allow_urls=1, max_image_bytes=100_000, url_seconds=1)
    return handler


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize("form", [lambda url: url, lambda url: {"image": url}, lambda url: [url]])
def test_off_by_default(handler, no_network, form):
    with pytest.raises(ValueError, match="nothing is fetched here"):
        handler({"inputs": form("http://example.org/cat.png")})


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_not_asked(fetching, host, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(ValueError, match="not a public address|cannot be fetched"):
        fetching({"inputs": f"http://{host}/cat.png"})


def test_a_name_with_a_private_address_among_its_addresses(fetching, monkeypatch):
    def resolve(host, port, **keywords):
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("93.184.216.34", "10.0.0.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ValueError, match="not a public address"):
        fetching({"inputs": "https://example.org/cat.png"})


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.org/a.png", "http://", "http://a:b/", "gopher://x"]
)
def test_other_urls(fetching, no_network, url):
    with pytest.raises(ValueError, match="cannot be fetched"):
        fetching({"inputs": url})


class Pages(BaseHTTPRequestHandler):
    png = b""

    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "/cat.png")
            return self.end_headers()
        self.send_response(200)
        self.end_headers()
        if self.path == "/cat.png?size=1":
            self.wfile.write(self.png)
        elif self.path == "/endless":
            for _ in range(40):
                self.wfile.write(b"\0" * 10_000)
        elif self.path == "/slow":
            for _ in range(40):  # each byte comes in time, all of them do not
                self.wfile.write(b"\0")
                time.sleep(0.1)
        elif self.path == "/silent":
            time.sleep(3)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            pass  # the other side has gone

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def public(images, monkeypatch) -> Iterator[str]:
    """A server on this machine, which is taken for public."""
    monkeypatch.setattr(sys.modules["handler.EndpointHandler"], "_is_public", lambda address: True)
    monkeypatch.setattr(Pages, "png", encoded(images[0]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_switched_on(fetching, public, images):
    assert fetching({"inputs": f"{public}/cat.png?size=1"}) == fetching({"inputs": encoded(images[0])})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/away", "status 302; redirects are not followed"),
        ("/endless", "more than 100000 bytes"),
        ("/slow", "too slowly|cannot be fetched"),
        ("/silent", "cannot be fetched"),
        ("/nothing", "The image is empty|cannot be fetched|known format"),
    ],
)
def test_answers_that_are_no_image(fetching, public, path, words):
    started = time.monotonic()
    with pytest.raises(ValueError, match=words):
        fetching({"inputs": public + path})
    assert time.monotonic() - started < 10  # the limit is one second; this only says that it ends
