"""Bytes to a server as they are, and what comes back: for the checks of what no HTTP library would send."""

from __future__ import annotations

import collections
import contextlib
import http.client
import io
import json
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.support.hosts import Process

ERROR_KEYS = {"message", "type", "param", "code"}
KEY = b"Authorization: Bearer sk-test"


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> dict[str, Any] | None:
        """The error object, where the reply is one in the documented form."""
        if self.headers.get_content_type() != "application/json" or not self.headers.get("X-Request-Id"):
            return None
        return error_object(self.body)

    def __str__(self) -> str:
        return f"{self.status}{' JSON' if self.error else ''}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """All that came over a connection, whether the server has closed it, and the seconds until it did or was given up."""

    answers: tuple[Answer, ...]
    closed: bool
    seconds: float

    def __str__(self) -> str:
        said = " + ".join(map(str, self.answers)) or "nothing"
        return f"{said}{', closed' if self.closed else ', left open'}"


def tally(seen: Iterable[object]) -> str:
    """What was seen and how often, as "3 x 200, 1 x 400 JSON"."""
    return ", ".join(f"{count} x {what}" for what, count in sorted(collections.Counter(map(str, seen)).items()))


def error_object(body: bytes) -> dict[str, Any] | None:
    """The error object of a body in the documented form, and nothing of another form."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return None
    return error if isinstance(error, dict) and set(error) == ERROR_KEYS and error["message"] else None


def request(*fields: bytes, body: bytes = b"", method: bytes = b"POST", path: bytes = b"/v1/embeddings") -> bytes:
    """A request's bytes. What says how long its body is, and who sends it, is among the fields."""
    return b"\r\n".join([b"%b %b HTTP/1.1" % (method, path), b"Host: test", *fields, b"", b""]) + body


def exchange(server: Process, sent: bytes, timeout: float = 5.0) -> Exchange:
    """Send over a connection of its own, and read until the server closes it or `timeout` seconds are over."""
    started = time.monotonic()
    with connection(server) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
        received, closed = b"", False
        while not closed and (left := started + timeout - time.monotonic()) > 0:
            piece = receive(sock, left)
            closed = piece == b""
            received += piece or b""
    return Exchange(tuple(answers(received)), closed, time.monotonic() - started)


def ask(server: Process, sent: bytes, timeout: float = 5.0) -> Answer | None:
    """Send over a connection of its own, and read the first reply; None where none comes in time."""
    until = time.monotonic() + timeout
    with connection(server) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
        received = b""
        while (left := until - time.monotonic()) > 0 and (piece := receive(sock, left)):
            received += piece
            if answer := next(answers(received), None):
                return answer
    return None


@contextlib.contextmanager
def connection(server: Process) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port()), 10.0) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield sock


def receive(sock: socket.socket, timeout: float) -> bytes | None:
    """What is there; nothing where the server has closed the connection, None where it is silent for so many seconds."""
    sock.settimeout(timeout)
    try:
        return sock.recv(1 << 16)
    except TimeoutError:
        return None
    except ConnectionError:
        return b""


def answers(received: bytes) -> Iterator[Answer]:
    """The replies in a stream, as far as they are whole."""
    while b"\r\n\r\n" in received:
        head, _, received = received.partition(b"\r\n\r\n")
        status_line, _, fields = head.partition(b"\r\n")
        headers = http.client.parse_headers(io.BytesIO(fields + b"\r\n\r\n"))
        length = int(headers.get("Content-Length", "0"))
        if len(received) < length:
            return
        yield Answer(int(status_line.split()[1]), headers, received[:length])
        received = received[length:]
