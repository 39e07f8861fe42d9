"""A load of N callers, each with one request under way at a time, against a running server on the loopback.

    python -m tests.tools.load.callers --port PORT --key KEY [--callers 64] [--inputs 1] [--words 8 200] [--seconds 10]

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import orjson

from tests.tools.load.workloads import VOCABULARY

_CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_TOTAL_TOKENS = re.compile(rb'"total_tokens": *(\d+)')
# Beyond it what was under way at the end of a window is given up.
PATIENCE_S = 120.0
ANSWERED_POLL_S = 0.02


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
    """A good one, to which caller, and from when to when it was waited for, on the clock of time.perf_counter."""

    caller: int
    asked_at: float
    at: float
    vectors: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Window:
    """A span of a steady load, and every request that was under way in it.

    Replies come in clumps, a batch or a whole turn of the callers at a time, and how many fall between two moments is chance: a
    clump more or less. So a reply counts evenly over the time that it was waited for, and here with the part of it in the window.
    """

    since: float
    until: float
    replies: Sequence[Reply]

    @property
    def vectors_per_s(self) -> float:
        return sum(reply.vectors * self._part(reply) for reply in self.replies) / (self.until - self.since)

    @property
    def tokens_per_s(self) -> float:
        return sum(reply.tokens * self._part(reply) for reply in self.replies) / (self.until - self.since)

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(reply.at - reply.asked_at for reply in self.replies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000

    def _part(self, reply: Reply) -> float:
        return (min(self.until, reply.at) - max(self.since, reply.asked_at)) / (reply.at - reply.asked_at)


@dataclass
class Tally:
    """What came back. Counted is what was under way between `since` and `until`; `busy` is the share of one core that the load
    took to make."""

    since: float = -math.inf
    until: float = math.inf
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    replies: list[Reply] = field(default_factory=list)
    busy: float = 0.0

    def started(self) -> int:
        """Callers who have had a reply."""
        return len({reply.caller for reply in self.replies})

    def answered(self) -> int:
        """Callers whose request under way at the end of the window has its reply."""
        return len({reply.caller for reply in self.replies if reply.at > self.until})

    def window(self) -> Window:
        """Raises LoadFailed where nothing was counted."""
        counted = [reply for reply in self.replies if reply.at > self.since and reply.asked_at < self.until]
        if not counted:
            raise LoadFailed(f"no reply was counted; statuses {dict(self.statuses)}")
        return Window(self.since, self.until, counted)


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
    server: Server,
    callers: Sequence[Iterable[bytes]],
    *,
    seconds: float,
    ramp: float = 0.0,
    steady: bool = False,
    strict: bool = True,
) -> Tally:
    """A caller for each of `callers`, the requests that it sends one after the other.

    After `ramp` seconds of it comes the window, of `seconds`: where it is to be `steady`, not before each caller has a reply, for
    the first of all that are asked at once are waited for too short. The load goes on until all that was under way at its end is
    answered, and the rest is cut off. Where it is `strict`, a reply that is no 200 raises LoadFailed; else its caller goes on.
    """
    tally = Tally()
    connections = [Connection(server) for _ in callers]
    try:
        await asyncio.gather(*(connection.open() for connection in connections))
        started, spent = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            numbered = enumerate(zip(connections, callers, strict=True))
            tasks = [group.create_task(_call(number, *pair, tally, strict)) for number, pair in numbered]
            tally.since = tally.until = time.perf_counter() + ramp
            await asyncio.sleep(ramp)
            if steady:
                await _all_answered(tally.started, len(callers))
                tally.since = time.perf_counter()
            tally.until = tally.since + seconds
            await asyncio.sleep(tally.until - time.perf_counter())
            await _all_answered(tally.answered, len(callers) if strict else 0)
            tally.busy = (time.process_time() - spent) / (time.perf_counter() - started)
            for task in tasks:
                task.cancel()
    except* LoadFailed as failures:
        raise failures.exceptions[0] from None
    finally:
        for connection in connections:
            connection.close()
    return tally


async def _call(number: int, connection: Connection, requests: Iterable[bytes], tally: Tally, strict: bool) -> None:
    """One caller, until it is cancelled or has no more requests."""
    for request in requests:
        started = time.perf_counter()
        status, body = await connection.post(request)
        ended = time.perf_counter()
        tally.statuses[status] += 1
        if status == 200:
            found = _TOTAL_TOKENS.search(body, body.rindex(b'"usage":'))
            assert found, "a usage without its total"
            tally.replies.append(Reply(number, started, ended, body.count(b'"index":'), int(found[1])))
        elif strict:
            raise LoadFailed(f"the server replied with {status}: {body[:300].decode(errors='replace')}")


async def _all_answered(count: Callable[[], int], callers: int) -> None:
    """Wait until so many callers have the reply that is counted. Raises LoadFailed."""
    patience = time.perf_counter() + PATIENCE_S
    while (answered := count()) < callers:
        if time.perf_counter() > patience:
            raise LoadFailed(f"{callers - answered} of {callers} callers have no reply within {PATIENCE_S:.0f} s")
        await asyncio.sleep(ANSWERED_POLL_S)


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
    tally = asyncio.run(load(server, callers, seconds=options.seconds, ramp=options.seconds / 10, strict=False))
    rates = "no vectors"
    if tally.replies:
        window = tally.window()
        rates = f"{window.vectors_per_s:.0f} vectors/s, {window.tokens_per_s:.0f} tokens/s"
        rates += f", p50 {window.percentile_ms(0.5):.1f} ms, p99 {window.percentile_ms(0.99):.1f} ms"
    print(f"{options.callers} callers x {options.inputs} inputs: {rates}, statuses {dict(tally.statuses)}")


if __name__ == "__main__":
    main()
