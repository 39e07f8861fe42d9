"""A host on loopback that is slow, endless, compressed, redirecting or asked too often, and counts what it could do."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.tools.hardening.background import background, listening

# A host gives up by itself, so that a server without its guard ends too.
DRIBBLES_S = 12.0
ENDLESS_BYTES = 256 << 20
BOMB_BYTES = 128 << 20
HOLDS_S = 0.5


@dataclass
class SlowHost:
    """`sent` are the bytes of the endless body that it got rid of, `most` the requests that it held at once."""

    image: bytes
    port: int = 0
    sent: int = 0
    held: int = 0
    most: int = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].decode("latin-1")
            what, _, rest = path.strip("/").partition("/")
            await getattr(self, f"_{what}")(writer, rest)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the server has had enough, or the check is over
        finally:
            writer.close()

    async def _silent(self, writer: asyncio.StreamWriter, _: str) -> None:
        await asyncio.sleep(DRIBBLES_S)

    async def _head(self, writer: asyncio.StreamWriter, _: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        await self._dribble(writer, b"X: x\r\n")

    async def _body(self, writer: asyncio.StreamWriter, _: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        await self._dribble(writer, b"x")

    async def _dribble(self, writer: asyncio.StreamWriter, piece: bytes) -> None:
        for _ in range(int(DRIBBLES_S / 0.05)):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)

    async def _endless(self, writer: asyncio.StreamWriter, _: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        piece = bytes(1 << 16)
        while self.sent < ENDLESS_BYTES:
            writer.write(piece)
            await writer.drain()
            self.sent += len(piece)

    async def _bomb(self, writer: asyncio.StreamWriter, _: str) -> None:
        self._answer(writer, gzip.compress(bytes(BOMB_BYTES), 6), "Content-Encoding: gzip\r\n")

    async def _compressed(self, writer: asyncio.StreamWriter, _: str) -> None:
        self._answer(writer, gzip.compress(self.image), "Content-Encoding: gzip\r\n")

    async def _redirects(self, writer: asyncio.StreamWriter, left: str) -> None:
        if int(left):
            location = f"Location: /redirects/{int(left) - 1}\r\n"
            writer.write(f"HTTP/1.1 302 Found\r\n{location}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
        else:
            self._answer(writer, self.image)

    async def _hold(self, writer: asyncio.StreamWriter, _: str) -> None:
        self.held += 1
        self.most = max(self.most, self.held)
        await asyncio.sleep(HOLDS_S)
        self.held -= 1
        self._answer(writer, self.image)

    def _answer(self, writer: asyncio.StreamWriter, body: bytes, header: str = "") -> None:
        writer.write(f"HTTP/1.1 200 OK\r\n{header}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


@contextmanager
def slow_host(image: bytes) -> Iterator[SlowHost]:
    """On a thread, on a free port."""
    host = SlowHost(image)
    with background(lambda: listening(host.speak, "127.0.0.1", 0)) as host.port:
        yield host
