"""Logs: one line an event on standard error, each with the id of the request that it belongs to, as text or as JSON."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime

import orjson

# The id of the request that is worked on; "" outside of one. A thread that works for a request runs in a copy of its context.
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="")

# Their INFO is about every download and every file.
NOISY = ("httpx", "httpcore", "urllib3", "filelock", "PIL")


class RequestIdFilter(logging.Filter):
    """Puts the request's id into every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        vars(record)["request_id"] = REQUEST_ID.get()
        return True


class TextFormatter(logging.Formatter):
    """Writes a line for people: time with its offset, level, logger, the request's id if there is one, message."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", "")
        vars(record)["request"] = f"{request_id} " if request_id else ""
        return super().format(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _time(record)


class JsonFormatter(logging.Formatter):
    """Writes a JSON object on a line; `request_id` and `exception` are there if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": _time(record), "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if request_id := getattr(record, "request_id", ""):
            entry["request_id"] = request_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry).decode()


FORMATTERS: dict[str, Callable[[], logging.Formatter]] = {
    "text": lambda: TextFormatter("%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s"),
    "json": JsonFormatter,
}


def configure_logging(level: str, form: str = "text") -> None:
    """Sets up logging for the process. `form` is "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(FORMATTERS[form]())
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))


def _time(record: logging.LogRecord) -> str:
    """Writes a record's time: ISO 8601 in local time, to the millisecond, with its offset from UTC."""
    return datetime.fromtimestamp(record.created, UTC).astimezone().isoformat(timespec="milliseconds")
