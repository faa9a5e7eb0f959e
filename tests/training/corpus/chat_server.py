"""An OpenAI-compatible server on 127.0.0.1 for tests: chat completions over real HTTP, with a plan of faults.

    with ChatServer(answer=lambda question: "a red circle") as server:
        server.plan = lambda number, question: Status(503) if number < 3 else None
        client = ChatClient(ServerSettings(server.url, "tiny"))

It checks every request as a strict server does, and keeps what it was asked.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Question:
    """What a request asked."""

    text: str
    image: bytes | None
    payload: dict[str, Any]
    key: str | None
    """The bearer token."""


@dataclass(frozen=True)
class Status:
    """Answers with this status."""

    code: int
    body: str = "the plan says so"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hang:
    """Answers nothing for so many seconds, then hangs up."""

    seconds: float


@dataclass(frozen=True)
class Trickle:
    """Sends one byte every `seconds`, so that no read times out."""

    seconds: float


@dataclass(frozen=True)
class Drop:
    """Hangs up without an answer, or after so many bytes of it."""

    after: int = 0


@dataclass(frozen=True)
class Body:
    """Answers 200 with this, whatever was asked."""

    body: str


@dataclass(frozen=True)
class Die:
    """Closes the port and everything under way; nobody answers any more."""


Fault = Status | Hang | Trickle | Drop | Body | Die


class ChatServer:
    """A server until the end of the `with`, or until its plan lets it die.

    Args:
        answer: the content of the message that answers a question.
        plan: given the number of the request (from 0, in the order they came) and the question, a fault or None.
        port: 0 for any free one.
    """

    def __init__(
        self,
        answer: Callable[[Question], str | None] = lambda question: "a caption",
        plan: Callable[[int, Question], Fault | None] = lambda number, question: None,
        port: int = 0,
        finish: str = "stop",
    ):
        self.answer, self.plan, self.finish = answer, plan, finish
        self.asked: list[Question] = []
        self.answered: list[Question] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", port), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Closes the port, and hangs up on who waits for an answer. Again: nothing."""
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def begin(self, question: Question) -> Fault | None:
        """Notes a request and tells what becomes of it."""
        with self._lock:
            number = len(self.asked)
            self.asked.append(question)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return self.plan(number, question)

    def end(self, question: Question, answered: bool) -> None:
        with self._lock:
            self._at_once -= 1
            if answered:
                self.answered.append(question)

    def connected(self, connection: socket.socket, there: bool) -> None:
        with self._lock:
            (self._connections.add if there else self._connections.discard)(connection)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Who hangs up, or was hung up on, is part of the plan."""


def read_question(headers: Any, body: bytes) -> Question:
    """Raises ValueError for what a strict server refuses."""
    payload = json.loads(body)
    known = {"model", "messages", "temperature", "seed", "max_tokens", "chat_template_kwargs"}
    if unknown := {*payload} - known:
        raise ValueError(f"unknown fields {unknown}")
    if not payload["model"] or not isinstance(payload["seed"], int) or payload["max_tokens"] < 1:
        raise ValueError("model, seed or max_tokens")
    [message] = payload["messages"]
    content, image = message["content"], None
    if message["role"] != "user":
        raise ValueError("role")
    if not isinstance(content, str):
        [picture, text] = content
        if picture["type"] != "image_url" or text["type"] != "text":
            raise ValueError("content")
        head, _, data = picture["image_url"]["url"].partition(",")
        image, content = base64.b64decode(data, validate=True), text["text"]
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            if head != f"data:image/{opened.format.lower()};base64":
                raise ValueError(f"{head} is a {opened.format}")
    key = headers.get("Authorization")
    return Question(content, image, payload, key.removeprefix("Bearer ") if key else None)


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            server.connected(self.request, True)
            super().setup()

        def finish(self) -> None:
            super().finish()
            server.connected(self.request, False)

        def log_message(self, *_: Any) -> None:
            """Tests read `asked`."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                if self.path != "/v1/chat/completions":
                    return self._send(404, "no such path")
                question = read_question(self.headers, body)
            except (ValueError, LookupError, TypeError, OSError) as error:
                return self._send(400, json.dumps({"error": {"message": f"{type(error).__name__}: {error}"}}))
            fault, answered = server.begin(question), False
            try:
                answered = self._answer(question, fault)
            finally:
                server.end(question, answered)

        def _answer(self, question: Question, fault: Fault | None) -> bool:
            """Whether the question was answered."""
            if isinstance(fault, Status):
                self._send(fault.code, fault.body, fault.headers)
            elif isinstance(fault, Body):
                self._send(200, fault.body)
            elif isinstance(fault, Hang):
                threading.Event().wait(fault.seconds)
                self.close_connection = True
            elif isinstance(fault, Die):
                server.die()
                self.close_connection = True
            elif isinstance(fault, Drop):
                self._send(200, self._completion(question), cut=fault.after)
            elif isinstance(fault, Trickle):
                self._trickle(self._completion(question), fault.seconds)
            else:
                self._send(200, self._completion(question))
                return True
            return False

        def _completion(self, question: Question) -> str:
            message = {"role": "assistant", "content": server.answer(question)}
            choice = {"index": 0, "message": message, "finish_reason": server.finish}
            return json.dumps({"object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 3}})

        def _head(self, code: int, length: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def _send(self, code: int, body: str, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
            data = body.encode()
            if cut == 0:
                self.close_connection = True
                return
            self._head(code, len(data), headers)
            self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.close_connection = True

        def _trickle(self, body: str, seconds: float) -> None:
            data = body.encode()
            self._head(200, len(data))
            for place in range(len(data)):
                self.wfile.write(data[place : place + 1])
                self.wfile.flush()
                threading.Event().wait(seconds)

    return Handler
