"""Many clients at once: every answer is the one that a single client gets, and memory stays bounded."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from PIL import Image

from benchmarks.endpoint_server import load_handler, serving
from benchmarks.handler import Client, mixed_requests, resident_mib
from tests.model_cards.conftest import encoded


def test_sixteen_clients(handler, images):
    requests = mixed_requests([encoded(image) for image in images], count=240)
    expected = [handler(request) for request in requests]
    with serving(handler) as address:
        before = resident_mib()

        def work(number: int) -> list[object]:
            with Client(address) as client:
                return [client.post(request) for request in requests[number::16]]

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(work, range(16)))
        assert resident_mib() - before < 150
    for number, seen in enumerate(answers):
        assert seen == expected[number::16]


def test_images_wait_for_each_other(hub_folder):
    """Sixteen pictures of 16 MP: 64 MiB each when decoded, of which only one may be in memory here."""
    limits = replace(load_handler(hub_folder).limits, concurrency=1)
    handler = load_handler(hub_folder, limits=limits)
    picture = base64.b64encode(encoded(Image.new("RGB", (4096, 4096), "red"), "JPEG")).decode()
    handler({"inputs": picture})
    peak = []
    before = resident_mib()

    def work(_: int) -> object:
        answer = handler({"inputs": picture})
        peak.append(resident_mib())
        return answer

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(work, range(16)))
    assert all(answer == answers[0] for answer in answers)
    assert max(peak) - before < 300  # 16 at once would be 1,024
