"""A load of N callers, each with one request under way at a time, against a running server on the loopback.

    python -m tests.load.callers --key KEY [--callers 64] [--inputs 1] [--words 8 200] [--seconds 10]

Texts are drawn with a fixed seed, their lengths log-uniform between the two numbers of words. Prints one line: vectors/s,
tokens/s, p50 and p99 in milliseconds, and the counts of replies by status.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ipaddress
import math
import random
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import orjson

from tests.load.workloads import VOCABULARY


@dataclass
class Tally:
    """What came back."""

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)
    vectors: int = 0
    tokens: int = 0

    def line(self, elapsed: float) -> str:
        ordered = sorted(self.seconds) or [math.nan]
        p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000 for share in (0.5, 0.99))
        rates = f"{self.vectors / elapsed:.0f} vectors/s, {self.tokens / elapsed:.0f} tokens/s"
        return f"{rates}, p50 {p50:.1f} ms, p99 {p99:.1f} ms, statuses {dict(self.statuses)}"


def draw_text(rng: random.Random, fewest: int, most: int) -> str:
    """Words, their number log-uniform in [fewest, most]."""
    count = round(math.exp(rng.uniform(math.log(fewest), math.log(most))))
    return " ".join(rng.choices(VOCABULARY, k=count))


async def call(
    session: aiohttp.ClientSession, rng: random.Random, options: argparse.Namespace, tally: Tally, until: float
) -> None:
    """One caller."""
    while time.perf_counter() < until:
        texts = [draw_text(rng, *options.words) for _ in range(options.inputs)]
        body = orjson.dumps({"input": texts, "encoding_format": options.encoding})
        started = time.perf_counter()
        async with session.post("/v1/embeddings", data=body) as reply:
            answer = await reply.read()
        tally.statuses[reply.status] += 1
        if reply.status == 200:
            tally.seconds.append(time.perf_counter() - started)
            tally.vectors += options.inputs
            tally.tokens += orjson.loads(answer[answer.rindex(b'"usage":') + 8 : -1])["total_tokens"]


async def run(options: argparse.Namespace) -> Tally:
    """All callers, for the time that is set; refuses to load any host but this one."""
    if not ipaddress.ip_address(urlsplit(options.url).hostname or "").is_loopback:
        raise SystemExit("only a loopback address is ever loaded")
    tally = Tally()
    headers = {"Authorization": f"Bearer {options.key}", "Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(options.url, headers=headers, connector=connector) as session:
        started = time.perf_counter()
        until = started + options.seconds
        await asyncio.gather(*(call(session, random.Random(n), options, tally, until) for n in range(options.callers)))
        print(f"{options.callers} callers x {options.inputs} inputs: {tally.line(time.perf_counter() - started)}")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:6008")
    parser.add_argument("--key", required=True)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--inputs", type=int, default=1)
    parser.add_argument("--words", type=int, nargs=2, default=(8, 200))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--encoding", choices=("float", "base64"), default="float")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
