"""A small HTTP server around `model_cards/handler.py`, as the Inference Endpoints toolkit is one.

    python -m benchmarks.endpoint_server runs/quickstart/nano/model --port 8080
    curl -s localhost:8080 -H "Content-Type: application/json" -d '{"inputs": "红色的圆形"}'

The toolkit (huggingface/huggingface-inference-toolkit, webservice_starlette.py) takes the same requests: JSON, or an
image with its content type and the parameters in the query string. It differs in three ways: it computes one request
at a time, it decodes images before the handler sees them, and it answers every exception with 400. This server has a
thread per connection, so that the handler is really used by many clients at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

HANDLER = Path(__file__).parents[1] / "model_cards" / "handler.py"
MAX_BODY = 64 * 2**20
SECONDS = 30  # how long a client may take for the next bytes


def load_handler(folder: str | Path, **settings: Any) -> Any:
    """The `EndpointHandler` of a folder as the toolkit makes it, or this repository's own where the folder has none."""
    file = Path(folder) / "handler.py"
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", file if file.is_file() else HANDLER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder), **settings)


class Endpoint(BaseHTTPRequestHandler):
    """One connection; `handler` is set by `serving`."""

    protocol_version = "HTTP/1.1"
    timeout = SECONDS
    disable_nagle_algorithm = True  # otherwise a second small packet waits 40 ms for the first one's receipt
    handler: Callable[[dict[str, Any]], Any]

    def do_GET(self) -> None:
        self._answer(200, {"status": "ok"}) if self.path in ("/", "/health") else self._answer(
            404, {"error": "no page"}
        )

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self._refuse(411, "Content-Length is missing.")
        if int(length) > MAX_BODY:
            return self._refuse(413, f"The request has {length} bytes, at most {MAX_BODY} are read.")
        body = self.rfile.read(int(length))
        try:
            self._answer(200, self.handler(self._request(body)))
        except ValueError as error:
            self._answer(getattr(error, "status", 400), {"error": str(error)})
        except Exception:  # whatever one request does, the next one is answered
            traceback.print_exc()
            self._answer(500, {"error": "The server failed; the request may have been right."})

    def _request(self, body: bytes) -> Any:
        """Raises ValueError for what is neither JSON nor an image."""
        kind = self.headers.get_content_type()
        if kind.startswith("image/"):
            query = dict(parse_qsl(urlsplit(self.path).query))
            return {"inputs": body, "parameters": {name: _value(text) for name, text in query.items()}}
        if kind != "application/json":
            error = ValueError(f"The content type must be application/json or an image's, not {kind}.")
            error.status = 415
            raise error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The body is not valid JSON: {error}.") from error

    def _refuse(self, status: int, message: str) -> None:
        """Without reading the body, after which the connection cannot be used."""
        self.close_connection = True
        self._answer(status, {"error": message})

    def _answer(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _value(text: str) -> Any:
    """As the toolkit reads query strings."""
    return {"true": True, "false": False}.get(text, int(text) if text.isdecimal() else text)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serving(handler: Callable[[dict[str, Any]], Any], port: int = 0) -> Iterator[str]:
    """The address of a server around `handler`; `port` 0 takes a free one."""
    server = _Server(("127.0.0.1", port), type("Bound", (Endpoint,), {"handler": staticmethod(handler)}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    with serving(load_handler(arguments.model), arguments.port) as address:
        print(f"{arguments.model} answers at {address}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
