"""Callers of the checks: bare connections on the loopback, each with one request under way at a time.

A client that does more would take the time that it measures. What is asked and what comes back are bytes as they are.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np

from tests.support.fakes import FakeModel
from tests.support.hosts import Process, post

HOST = "127.0.0.1"
# Beyond it a reply is none.
PATIENCE_S = 60.0
_CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


def embedding(inputs: Any, *headers: str, **fields: Any) -> bytes:
    """The bytes of a request for the vectors of `inputs`."""
    return post(json.dumps({"input": inputs, **fields}).encode(), *headers)


def get(path: str) -> bytes:
    """The bytes of a request without a body, with the key."""
    return f"GET {path} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer sk-test\r\n\r\n".encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply. Header names are lower-case; times are on the monotonic clock."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    asked_at: float
    at: float

    @property
    def seconds(self) -> float:
        return self.at - self.asked_at

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"

    @property
    def code(self) -> str | None:
        """The code, or else the type, of an error in the JSON form; None where it has not that form, or an id."""
        try:
            error = json.loads(self.body)["error"]
            whole = set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
        except (ValueError, KeyError, TypeError):
            return None
        told = self.headers.get("content-type", "").startswith("application/json") and "x-request-id" in self.headers
        return str(error["code"] or error["type"]) if whole and told else None

    @property
    def retry_after(self) -> int:
        """Seconds; 0 where it is missing, or no whole number of 1 or more."""
        value = self.headers.get("retry-after", "")
        return int(value) if re.fullmatch(r"[1-9][0-9]*", value) else 0

    def vectors(self) -> list[Any]:
        return [row["embedding"] for row in json.loads(self.body)["data"]]

    def has_vectors_of(self, texts: Sequence[str]) -> bool:
        """Whether it is a 200 with the fake model's own vector of each text, in order."""
        return self.status == 200 and [is_vector_of(row, text) for row, text in zip(self.vectors(), texts, strict=True)] == [
            True
        ] * len(texts)


@cache
def fake_vector(text: str) -> Any:
    return FakeModel().vector(text)


def is_vector_of(row: Any, text: str) -> bool:
    return row is not None and bool(np.allclose(row, fake_vector(text), atol=1e-6))


class Wire(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._head_end = self._needed = 0
        self._waiter: asyncio.Future[tuple[bytes, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._needed and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _CONTENT_LENGTH.search(self._buffer, 0, end + 2)
            self._head_end, self._needed = end + 4, end + 4 + (int(length[1]) if length else 0)
        if self._needed and len(self._buffer) >= self._needed and self._waiter and not self._waiter.done():
            self._waiter.set_result((bytes(self._buffer[: self._head_end]), bytes(self._buffer[self._head_end : self._needed])))
            del self._buffer[: self._needed]
            self._head_end = self._needed = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._waiter and not self._waiter.done():
            self._waiter.set_exception(ConnectionResetError("closed without a whole reply"))

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, data: bytes) -> None:
        if self._transport is None:
            raise ConnectionResetError("closed before it was asked")
        self._transport.write(data)

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    async def ask(self, request: bytes, patience: float = PATIENCE_S) -> Answer:
        """Send a request and wait for its reply. Raises ConnectionError, TimeoutError."""
        self._waiter = asyncio.get_running_loop().create_future()
        asked_at = time.monotonic()
        self.send(request)
        async with asyncio.timeout(patience):
            head, body = await self._waiter
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        return Answer(int(status_line.split()[1]), headers, body, asked_at, time.monotonic())


class Callers:
    """As many connections to one server as are asked over at once, kept alive between requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Wire] = []
        self._all: set[Wire] = set()

    async def __aenter__(self) -> Callers:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for wire in self._all:
            wire.abort()
        # For the transports to close.
        await asyncio.sleep(0.01)

    async def connect(self) -> Wire:
        """A connection of its own. Raises OSError."""
        _, wire = await asyncio.get_running_loop().create_connection(Wire, HOST, self._port)
        self._all.add(wire)
        return wire

    async def ask(self, request: bytes, patience: float = PATIENCE_S, fresh: bool = False) -> Answer:
        """One request, over a connection that is free, or a new one. Raises OSError, TimeoutError."""
        wire = None if fresh else self._free()
        wire = wire or await self.connect()
        try:
            answer = await wire.ask(request, patience)
        except BaseException:
            self._end(wire)
            raise
        if fresh or answer.closes:
            self._end(wire)
        else:
            self._idle.append(wire)
        return answer

    async def status(self) -> str:
        """As /health says it."""
        return str(json.loads((await self.ask(get("/health"))).body)["status"])

    async def metric(self, name: str) -> float:
        """A sample of /metrics, summed over its labels; 0 where there is none yet."""
        text = (await self.ask(get("/metrics"))).body.decode()
        return sum(float(value) for value in re.findall(rf"(?m)^{name}(?:{{[^}}]*}})? (\S+)$", text))

    def _free(self) -> Wire | None:
        while self._idle:
            if (wire := self._idle.pop()).is_open:
                return wire
            self._all.discard(wire)
        return None

    def _end(self, wire: Wire) -> None:
        wire.abort()
        self._all.discard(wire)


async def ended(server: Process, seconds: float) -> int | None:
    """The exit code, or None where it is not there in so long."""
    until = time.monotonic() + seconds
    while server.popen.poll() is None and time.monotonic() < until:
        await asyncio.sleep(0.02)
    return server.popen.poll()
