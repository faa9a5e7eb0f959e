"""Two hundred hostile requests: each is refused in words or answered rightly, and the server lives on."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.endpoint_server import serving
from tests.model_cards.hostile_requests import HOSTILE, Hostile


def post(address: str, request: Hostile) -> tuple[int, object]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        try:
            connection.request("POST", "/", request.body, {"Content-Type": request.kind})
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all of it was sent
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.fixture(scope="module")
def address(handler):
    with serving(handler) as address:
        yield address


def test_there_are_two_hundred():
    assert len(HOSTILE) >= 200
    assert len({request.name for request in HOSTILE}) == len(HOSTILE)
    assert len({(request.kind, request.body) for request in HOSTILE}) == len(HOSTILE)


def test_each_is_refused_in_words_or_answered(address, handler):
    expected = handler({"inputs": "a red circle"})
    healthy = Hostile("healthy", "application/json", b'{"inputs": "a red circle"}')
    wrong, before = [], resident()
    for request in HOSTILE:
        status, answer = post(address, request)
        if status not in request.statuses:
            wrong.append(f"{request.name}: {status} {str(answer)[:200]}")
        elif status != 200 and not (isinstance(answer["error"], str) and 10 < len(answer["error"]) < 500):
            wrong.append(f"{request.name}: no clear words, {str(answer)[:200]}")
        elif status == 200 and not (len(answer) == 24 and all(abs(value) <= 1 for value in answer)):
            wrong.append(f"{request.name}: not an embedding, {str(answer)[:200]}")
        if post(address, healthy) != (200, expected):
            wrong.append(f"{request.name}: the server answers differently after it")
    assert not wrong, "\n".join(wrong)
    assert resident() - before < 400 * 2**20


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Length": "-5"}, {"Content-Length": "many"}, {"Content-Length": "9" * 30}]
)
def test_lengths_that_lie(address, headers):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.putrequest("POST", "/")
    for name, value in {"Content-Type": "application/json", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status in (411, 413)
    connection.close()
