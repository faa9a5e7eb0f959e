"""A client of OpenAI-compatible servers (vLLM, SGLang, llama.cpp, the makers' own): chat completions with images.

    client = ChatClient(ServerSettings("http://127.0.0.1:8000/v1", "Qwen/Qwen3-VL-8B-Instruct"), seed=0)
    with Journal(path) as journal:
        replies = client.ask([Question("row-1", "Describe the picture.", image)], journal, probe)

Why not datatrove's InferenceRunner, which runs everything else here: version 0.10.1 waits 5 to 160 s between six tries
whatever the server says (no Retry-After), writes rows in the order of the answers, goes on with a warning when a row
cannot be written, and deletes the answers it has saved while the row that came out of them may yet be lost.

Nothing is lost: a row is given up only if its question failed twice after all retries, or was refused, and the server
still answers another question (the probe). If not, the server is at fault, and the stage stops with an error; what was
answered stands in the journal, and the next run goes on from there. Nothing is asked twice: an answer is in the journal
before it is used. One caption a request: servers batch requests themselves, and an answer cannot go to another row.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .journal import Journal

MAX_ANSWER_BYTES = 4 << 20
"""A chat answer is some kilobytes; a server that sends without end must not fill the memory."""


@dataclass(frozen=True)
class ServerSettings:
    """A server, and how it is asked. Where it is, and how patiently it is asked, may change between two runs."""

    url: str
    """The root of the API, e.g. http://127.0.0.1:8000/v1."""
    model: str
    """As the server calls it."""
    api_key_env: str | None = None
    """The name of the environment variable that holds the key. The key itself is never written anywhere."""
    temperature: float = 0.0
    max_tokens: int = 200
    options: dict[str, Any] = field(default_factory=dict)
    """More fields of every request, e.g. {chat_template_kwargs: {enable_thinking: false}}."""
    concurrency: int = 8
    """Questions under way at once, for each worker of the executor; the server batches them."""
    timeout: float = 120.0
    """Seconds for one answer, from connecting to its last byte."""
    retries: int = 5
    """Tries after the first."""
    first_wait: float = 1.0
    """Seconds before the first retry; twice as many before each next one, or what the server asks for."""
    longest_wait: float = 60.0

    def __post_init__(self) -> None:
        parsed = urllib.parse.urlsplit(self.url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ValueError(f"url is {self.url!r}; expected http(s)://HOST[:PORT]/v1.")
        if parsed.username or parsed.password or parsed.query:
            raise ValueError("url holds credentials or a query, which would be written to disk; use `api_key_env`.")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0 or self.max_tokens < 1:
            raise ValueError(
                f"concurrency {self.concurrency} and max_tokens {self.max_tokens} are at least 1, "
                f"retries {self.retries} at least 0, timeout {self.timeout} more than 0."
            )
        if self.first_wait < 0 or self.longest_wait < 0 or self.temperature < 0:
            raise ValueError("first_wait, longest_wait and temperature are at least 0.")
        if reserved := sorted({"model", "messages", "n", "stream", "temperature", "seed"} & {*self.options}):
            raise ValueError(f"options may not hold {reserved}.")

    def identity(self) -> dict[str, Any]:
        """What decides the answers, for the fingerprint of a stage."""
        return {name: getattr(self, name) for name in ("model", "temperature", "max_tokens", "options")}


@dataclass(frozen=True)
class Question:
    """What is asked about a row."""

    id: str
    """Of the row."""
    text: str
    image: bytes | None = None
    """JPEG, PNG, WebP or GIF."""


class Reply(NamedTuple):
    """An answer as the server gave it, or the reason why there is none: "server_refused" (it will not take this
    question), "server_failed" (it breaks at it), "cut_short" (at `max_tokens`) or "filtered"."""

    text: str | None
    reason: str | None = None


class ServerError(RuntimeError):
    """The server cannot be worked with now. What it answered is kept; running the stage again goes on."""


class _Failure(Exception):
    """One try failed. `fatal`: every question would fail; `final`: this one will fail again; `wait`: as asked for."""

    def __init__(self, message: str, *, fatal: bool = False, final: bool = False, busy: bool = False, wait: float = 0):
        super().__init__(message)
        self.fatal, self.final, self.busy, self.wait = fatal, final, busy, wait


@dataclass
class _Asked:
    """A question, and how far it got."""

    question: Question
    payload: bytes
    reply: Reply | None = None
    failure: _Failure | None = None
    failures: int = 0

    @property
    def key(self) -> str:
        """Names the request in the journal."""
        return hashlib.sha256(self.payload).hexdigest()[:32]


class ChatClient:
    """Asks one server."""

    def __init__(self, settings: ServerSettings, seed: int = 0):
        self.settings, self.seed = settings, seed
        self._key = _key_of(settings.api_key_env) if settings.api_key_env else None
        self._url = settings.url.rstrip("/") + "/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ask(self, questions: Sequence[Question], journal: Journal, probe: Question) -> list[Reply]:
        """One reply for each question, in their order.

        Args:
            journal: answers that it holds are not asked for again; new ones are added to it.
            probe: a question that a working server answers, asked before a question is given up.

        Raises:
            ServerError: if the server is away, overloaded or wrongly set up.
        """
        asked = [_Asked(question, self._payload(question)) for question in questions]
        for one in asked:
            one.reply = _reply(journal.find(one.question.id, one.key))
        while waiting := [one for one in asked if one.reply is None]:
            self._round(waiting, journal)
            failed = [one for one in waiting if one.reply is None and one.failure]
            if failed:
                self._check(probe, failed[0].failure)
            for one in failed:
                if one.failure.final or one.failures == 2:
                    one.reply = Reply(None, "server_refused" if one.failure.final else "server_failed")
        return [one.reply for one in asked]

    def _round(self, waiting: Sequence[_Asked], journal: Journal) -> None:
        """Asks these questions. Once one has failed after all its tries, no further ones are asked: a dead server
        should not be asked a thousand times."""
        stopped = threading.Event()

        def ask(one: _Asked) -> None:
            if stopped.is_set():
                return
            try:
                answer = self._tried(one.payload)
            except _Failure as failure:
                one.failure, one.failures = failure, one.failures + 1
                if not failure.final:
                    stopped.set()
                return
            journal.add(one.question.id, one.key, answer)
            one.reply = _reply(answer)

        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            list(pool.map(ask, waiting))
        for one in waiting:
            # A busy server says nothing against the question, however often.
            if one.reply is None and one.failure and (one.failure.fatal or (one.failure.busy and one.failures == 2)):
                raise self._error(one.failure)

    def _check(self, probe: Question, failure: _Failure) -> None:
        """Raises ServerError, unless the server answers the probe after this failure."""
        try:
            self._tried(self._payload(probe))
        except _Failure as error:
            message = f" (asked after a question of a row failed with: {failure})"
            # Not `from error`: its traceback has the headers, which a log that shows variables would show.
            raise self._error(error, message) from None

    def _error(self, failure: _Failure, more: str = "") -> ServerError:
        return ServerError(
            f"{self._hidden(f'{self._url}: {failure}{more}')}. Answers so far are kept; run the stage again when the "
            "server works."
        )

    def _tried(self, payload: bytes) -> dict[str, Any]:
        """The answer to one question, after as many tries as allowed."""
        for attempt in range(self.settings.retries + 1):
            try:
                return self._once(payload)
            except _Failure as failure:
                if failure.fatal or failure.final or attempt == self.settings.retries:
                    raise
                pause = max(failure.wait, self.settings.first_wait * 2**attempt)
                time.sleep(min(pause, self.settings.longest_wait))
        raise AssertionError("unreachable")

    def _once(self, payload: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, payload, headers, method="POST")
        deadline = time.monotonic() + self.settings.timeout
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                body = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise _status_failure(error, self._hidden(_excerpt(error))) from error
        # URLError and timeouts are OSErrors; HTTPException: a connection that ended in the middle.
        except (OSError, http.client.HTTPException) as error:
            gone = isinstance(getattr(error, "reason", error), ConnectionRefusedError)
            raise _Failure(f"{type(error).__name__}: {self._hidden(str(error))}", busy=gone) from error
        return _answer(body)

    def _payload(self, question: Question) -> bytes:
        content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
        if question.image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(question.image)}})
        settings = self.settings
        return json.dumps(
            {
                "model": settings.model,
                "messages": [{"role": "user", "content": content if question.image is not None else question.text}],
                "temperature": settings.temperature,
                "seed": self.seed,
                "max_tokens": settings.max_tokens,
                **settings.options,
            },
            ensure_ascii=False,
            sort_keys=True,
        ).encode()

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _key_of(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"The environment variable {variable} (api_key_env) is not set.")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"The environment variable {variable} (api_key_env) holds what no key has, e.g. a line break.")
    return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes to no other host than the one in the settings."""

    def redirect_request(self, *_: Any) -> None:
        return None


def data_url(image: bytes) -> str:
    """An encoded image as the URL that chat requests carry."""
    kinds = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}
    kind = next((name for start, name in kinds.items() if image.startswith(start)), None)
    if kind is None:
        raise ValueError("The image is no JPEG, PNG, GIF or WebP, which servers take.")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _read(response: Any, deadline: float) -> bytes:
    """The body, within the deadline: a timeout of a socket starts anew with every byte."""
    pieces, size = [], 0
    while piece := response.read1(1 << 16):
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise _Failure(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer was not complete in time")
        pieces.append(piece)
    if response.length:  # read1 does not raise for a body that ends before its Content-Length
        raise http.client.IncompleteRead(b"".join(pieces), response.length)
    return b"".join(pieces)


def _answer(body: bytes) -> dict[str, Any]:
    """What goes into the journal: `text` and `finish`."""
    try:
        choices = json.loads(body)["choices"]
        if len(choices) != 1:
            raise _Failure(f"{len(choices)} answers to one question")
        message, finish = choices[0]["message"], choices[0].get("finish_reason")
        text = message.get("content")
        if text is None and message.get("refusal"):
            text, finish = "", "content_filter"
        if text is None and finish == "length":
            text = ""
        if not isinstance(text, str):
            raise _Failure(f"an answer that is no text: {str(text)[:80]!r}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Failure(f"no chat completion ({type(error).__name__}): {body[:120]!r}") from error
    # JSON can hold half of a surrogate pair, which no file of ours can.
    return {"text": text.encode("utf-8", "replace").decode(), "finish": finish}


def _reply(answer: dict[str, Any] | None) -> Reply | None:
    if answer is None:
        return None
    reason = {"length": "cut_short", "content_filter": "filtered"}.get(answer["finish"])
    return Reply(answer["text"], reason)


# 409, 425: too early; 408, 429: again later. 502 to 504: what a proxy says of a server that is away or overloaded.
_BUSY = {408, 409, 425, 429, 502, 503, 504}
# The key, the model's name or the URL is wrong.
_FATAL = {401, 402, 403, 404, 405, 407, 410}


def _status_failure(error: urllib.error.HTTPError, excerpt: str) -> _Failure:
    message = f"HTTP {error.code}{f': {excerpt}' if excerpt else ''}"
    if error.code in _FATAL or 300 <= error.code < 400:
        place = error.headers.get("Location")
        return _Failure(f"{message}{f' (moved to {place})' if place else ''}", fatal=True)
    if error.code in _BUSY:
        return _Failure(message, busy=True, wait=_retry_after(error.headers.get("Retry-After")))
    return _Failure(message, final=400 <= error.code < 500)


def _retry_after(value: str | None) -> float:
    """Seconds, from a number or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        return ""
