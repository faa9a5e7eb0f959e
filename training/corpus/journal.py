"""Answers of a model on disk as they come, so that a run that was killed does not ask again and gives the same bytes.

JSON lines, appended; a line that a kill cut off is skipped. When the task is done its lines are sorted, since answers
come in any order, and equal runs should leave equal files.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from eval.files import replaced


class Journal:
    """The answers of one task. Its methods may be called from several threads."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.is_file() else b""
        for line in content.split(b"\n"):
            self._remember(line)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if content and not content.endswith(b"\n"):
            os.write(self._file, b"\n")
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        os.close(self._file)
        if failure is None:
            with replaced(self.path) as beside:
                beside.write_bytes(b"".join(_line(*key, self._known[key]) for key in sorted(self._known)))

    def find(self, row: str, key: str) -> dict[str, Any] | None:
        """The answer to the question `key` about a row, if it is known."""
        return self._known.get((row, key))

    def add(self, row: str, key: str, answer: dict[str, Any]) -> None:
        """Keeps an answer. When this returns, a kill of the process does not lose it."""
        data = _line(row, key, answer)
        with self._lock:
            if os.write(self._file, data) != len(data):
                raise OSError(f"{self.path} could not be written to its end: is the disk full?")
            self._remember(data)

    def _remember(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            key, answer = (entry["row"], entry["key"]), entry["answer"]
            if isinstance(answer["text"], str):
                self._known.setdefault(key, {"text": answer["text"], "finish": answer["finish"]})
        except (ValueError, LookupError, TypeError):
            return  # cut off by a kill, or no line at all


def _line(row: str, key: str, answer: dict[str, Any]) -> bytes:
    return json.dumps({"row": row, "key": key, "answer": answer}, ensure_ascii=False).encode() + b"\n"
