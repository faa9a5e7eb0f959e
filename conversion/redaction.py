"""Keeps a token out of what is said."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def redacted(text: str, token: str | None) -> str:
    return text.replace(token, "[token]") if token else text


@contextmanager
def redacted_logs(token: str | None) -> Iterator[None]:
    """Takes a token out of every log record of this process, whoever writes it: the libraries log requests, and a
    server may answer with what it was sent."""
    if not token:
        yield
        return
    before = logging.getLogRecordFactory()

    def record_without(*args: Any, **options: Any) -> logging.LogRecord:
        record = before(*args, **options)
        text = record.getMessage()
        if token in text:
            record.msg, record.args = redacted(text, token), None
        if record.exc_info and record.exc_info[0]:  # handlers print this text where it is there
            record.exc_text = redacted("".join(traceback.format_exception(*record.exc_info)).rstrip(), token)
        return record

    logging.setLogRecordFactory(record_without)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)
