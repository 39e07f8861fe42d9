"""A load of N callers, each with one request under way at a time, against a running server on the loopback.

    python -m tests.load.callers --port PORT --key KEY [--callers 64] [--inputs 1] [--words 8 200] [--seconds 10]

Texts are drawn with a fixed seed, their lengths log-uniform between the two numbers of words. Prints one line: vectors/s,
tokens/s, p50 and p99 in milliseconds, and the counts of replies by status. As a library: `load`, with requests made beforehand.

A client of bare streams: one that does more would take the time that it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ipaddress
import itertools
import math
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import orjson

from tests.load.workloads import VOCABULARY

_CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
# Beyond it a window that gathers no replies is given up.
PATIENCE_S = 120.0


class LoadFailed(RuntimeError):
    """A reply that is no 200, or none."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go, and the key that opens it. Raises ValueError for any host but this one."""

    port: int
    key: str = field(repr=False)
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if not ipaddress.ip_address(self.host).is_loopback:
            raise ValueError("only a loopback address is ever loaded")

    def request(self, inputs: Sequence[str], encoding: str = "base64") -> bytes:
        """The bytes of a request for the vectors of `inputs`."""
        body = orjson.dumps({"input": inputs, "encoding_format": encoding})
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAuthorization: Bearer {self.key}\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Reply:
    """A good one: when it was there, on the clock of time.perf_counter, and what it took."""

    at: float
    seconds: float
    vectors: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Window:
    """The replies of a steady load between two of them."""

    seconds: float
    replies: Sequence[Reply]

    @property
    def vectors_per_s(self) -> float:
        return sum(reply.vectors for reply in self.replies) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return sum(reply.tokens for reply in self.replies) / self.seconds

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(reply.seconds for reply in self.replies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000


@dataclass
class Tally:
    """What came back. `since` is when counting began; `busy` is the share of one core that the load took to make."""

    since: float = math.inf
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    replies: list[Reply] = field(default_factory=list)
    busy: float = 0.0

    def counted(self) -> int:
        """Replies since counting began."""
        return sum(reply.at > self.since for reply in self.replies)

    def window(self) -> Window:
        """From the last reply before counting began to the last of all. Raises LoadFailed where none was counted.

        Replies come in clumps, a batch at a time. Between two replies there are whole clumps; between two moments of the clock
        there would be up to one too few or too many.
        """
        start = max((reply.at for reply in self.replies if reply.at <= self.since), default=self.since)
        counted = [reply for reply in self.replies if reply.at > start]
        if not counted:
            raise LoadFailed(f"no reply was counted; statuses {dict(self.statuses)}")
        return Window(max(reply.at for reply in counted) - start, counted)


class Connection:
    """One connection, opened anew after a refusal, which may close it. Raises LoadFailed where it breaks."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None

    async def open(self) -> None:
        try:
            self._reader, self._writer = await asyncio.open_connection(self._server.host, self._server.port, limit=1 << 20)
        except OSError as error:
            raise LoadFailed(f"the server cannot be reached: {error}") from None

    def close(self) -> None:
        if self._writer:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def post(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the reply."""
        if not self._writer:
            await self.open()
        assert self._reader and self._writer
        try:
            self._writer.write(request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            status, length = int(head[9:12]), _CONTENT_LENGTH.search(head)
            body = await self._reader.readexactly(int(length[1]) if length else 0)
        except (OSError, EOFError) as error:
            raise LoadFailed(f"the server is gone: {error!r}") from None
        if status != 200:
            self.close()
        return status, body


async def load(
    server: Server, callers: Sequence[Iterable[bytes]], *, seconds: float, ramp: float = 0.0, least: int = 1, strict: bool = True
) -> Tally:
    """A caller for each of `callers`, the requests that it sends one after the other.

    After `ramp` seconds of it replies are counted, for `seconds` and until there are `least`; then what is under way is cut off.
    Where it is `strict`, a reply that is no 200 raises LoadFailed.
    """
    tally = Tally()
    connections = [Connection(server) for _ in callers]
    try:
        await asyncio.gather(*(connection.open() for connection in connections))
        started, spent = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            pairs = zip(connections, callers, strict=True)
            tasks = [group.create_task(_call(connection, requests, tally, strict)) for connection, requests in pairs]
            await asyncio.sleep(ramp)
            tally.since = time.perf_counter()
            await _gather(tally, seconds, least)
            tally.busy = (time.process_time() - spent) / (time.perf_counter() - started)
            for task in tasks:
                task.cancel()
    except* LoadFailed as failures:
        raise failures.exceptions[0] from None
    finally:
        for connection in connections:
            connection.close()
    return tally


async def _call(connection: Connection, requests: Iterable[bytes], tally: Tally, strict: bool) -> None:
    """One caller, until it is cancelled or has no more requests."""
    for request in requests:
        started = time.perf_counter()
        status, body = await connection.post(request)
        ended = time.perf_counter()
        tally.statuses[status] += 1
        if status == 200:
            tokens = orjson.loads(body[body.rindex(b'"usage":') + 8 : -1])["total_tokens"]
            tally.replies.append(Reply(ended, ended - started, body.count(b'"index":'), tokens))
        elif strict:
            raise LoadFailed(f"the server replied with {status}: {body[:300].decode(errors='replace')}")


async def _gather(tally: Tally, seconds: float, least: int) -> None:
    """Wait for `seconds`, and on until `least` replies are counted. Raises LoadFailed where they never come."""
    patience = time.perf_counter() + seconds + PATIENCE_S
    await asyncio.sleep(seconds)
    while tally.counted() < least:
        if time.perf_counter() > patience:
            raise LoadFailed(f"{tally.counted()} replies of {least} within {seconds + PATIENCE_S:.0f} s")
        await asyncio.sleep(seconds / 10)


def draw_text(rng: random.Random, fewest: int, most: int) -> str:
    """Words, their number log-uniform in [fewest, most]."""
    count = round(math.exp(rng.uniform(math.log(fewest), math.log(most))))
    return " ".join(rng.choices(VOCABULARY, k=count))


def drawn_requests(server: Server, seed: int, options: argparse.Namespace) -> Iterator[bytes]:
    """Without end."""
    rng = random.Random(seed)
    for _ in itertools.count():
        yield server.request([draw_text(rng, *options.words) for _ in range(options.inputs)], options.encoding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6008)
    parser.add_argument("--key", required=True)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--inputs", type=int, default=1)
    parser.add_argument("--words", type=int, nargs=2, default=(8, 200))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--encoding", choices=("float", "base64"), default="float")
    options = parser.parse_args()
    server = Server(options.port, options.key, options.host)
    callers = [drawn_requests(server, seed, options) for seed in range(options.callers)]
    tally = asyncio.run(load(server, callers, seconds=options.seconds, ramp=options.seconds / 10, strict=False, least=0))
    rates = "no vectors"
    if tally.replies:
        window = tally.window()
        rates = f"{window.vectors_per_s:.0f} vectors/s, {window.tokens_per_s:.0f} tokens/s"
        rates += f", p50 {window.percentile_ms(0.5):.1f} ms, p99 {window.percentile_ms(0.99):.1f} ms"
    print(f"{options.callers} callers x {options.inputs} inputs: {rates}, statuses {dict(tally.statuses)}")


if __name__ == "__main__":
    main()
