"""How long /health takes while large bodies and large images are embedded, against a running server on the loopback.

    python -m tests.tools.load.health --key KEY [--callers 2] [--seconds 10]

One line for each kind of load: p50, p99 and the longest in milliseconds, and the counts of the load's replies by status.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import functools
import gzip
import io
import ipaddress
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import orjson
from PIL import Image

INTERVAL_S = 0.005
LARGE_BODY = 20 << 20


def noise(width: int, height: int, format: str, **options: object) -> bytes:
    """An image file that does not compress."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def image_body(data: bytes) -> bytes:
    return orjson.dumps({"input": {"image": base64.b64encode(data).decode()}})


def texts_body(size: int) -> bytes:
    words = random.Random(0).choices(["river", "stone", "lantern", "harbour", "quiet"], k=size // 7)
    return orjson.dumps({"input": [" ".join(words[at : at + 150]) for at in range(0, len(words), 150)][:2000]})


def many_body(element: bytes) -> bytes:
    """A body of 30 MiB in which the elements are as many as there is room for."""
    return b'{"input":[' + b",".join([element] * ((30 << 20) // (len(element) + 1))) + b"]}"


LOADS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "32 texts": lambda: texts_body(32 * 900),
    "2,000 texts": lambda: texts_body(2 << 20),
    "2,000 texts of 10 KB": lambda: orjson.dumps({"input": ["word " * 2000] * 2000}),
    "many {}": lambda: many_body(b"{}"),
    "many 0": lambda: many_body(b"0"),
    "many texts": lambda: many_body(b'""'),
    "a gzip bomb": lambda: gzip.compress(bytes(1 << 28), 1),
    "no JSON, 20 MiB": lambda: b"[" * LARGE_BODY,
    "a text of 20 MiB": lambda: orjson.dumps({"input": "word " * (LARGE_BODY // 5)}),
    "no image, 20 MiB": lambda: image_body(bytes(15 << 20)),
    "a JPEG of 12 MP": lambda: image_body(noise(4000, 3000, "JPEG", quality=90)),
    "a JPEG of 49 MP": lambda: image_body(noise(7000, 7000, "JPEG", quality=50)),
    "a PNG of 6 MP": lambda: image_body(noise(2500, 2400, "PNG", compress_level=1)),
}


async def load(url: str, key: str, body: bytes, callers: int, seconds: float) -> collections.Counter[int]:
    """Callers that send the body over and over, gzip under its name, and go when the time is over; their replies by status."""
    until = time.perf_counter() + seconds
    statuses: collections.Counter[int] = collections.Counter()
    headers = {"Content-Encoding": "gzip"} if body[:2] == b"\x1f\x8b" else {}

    async def call() -> None:
        while body and time.perf_counter() < until:
            async with session.post("/v1/embeddings", data=io.BytesIO(body), headers=headers) as reply:
                await reply.read()
                statuses[reply.status] += 1

    async with aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {key}"}) as session:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(call() for _ in range(callers)))
    return statuses


async def probe(url: str, seconds: float) -> list[float]:
    """What /health takes, in seconds, in order of length."""
    until = time.perf_counter() + seconds
    waits: list[float] = []
    async with aiohttp.ClientSession(url) as session:
        while time.perf_counter() < until:
            started = time.perf_counter()
            async with session.get("/health") as reply:
                await reply.read()
            waits.append(time.perf_counter() - started)
            await asyncio.sleep(INTERVAL_S)
    return sorted(waits)


def run(options: argparse.Namespace) -> None:
    """All loads, one after the other; refuses to load any host but this one."""
    if not ipaddress.ip_address(urlsplit(options.url).hostname or "").is_loopback:
        raise SystemExit("only a loopback address is ever loaded")
    # The load in a process of its own: it would hold up the probe.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        for name in LOADS:
            if options.only not in name:
                continue
            sent = other.submit(run_load, options.url, options.key, [(name, options.callers)], options.seconds)
            waits = asyncio.run(probe(options.url, options.seconds))
            p50, p99 = (share_of(waits, share) for share in (0.5, 0.99))
            print(
                f"{name:>20}: p50 {p50:6.1f}  p99 {p99:6.1f}  longest {waits[-1] * 1000:6.1f} ms  {dict(sent.result())}",
                flush=True,
            )


def share_of(waits: Sequence[float], share: float) -> float:
    """The wait, in milliseconds, that such a share of them does not exceed."""
    return waits[min(len(waits) - 1, int(len(waits) * share))] * 1000


def run_load(url: str, key: str, loads: Sequence[tuple[str, int]], seconds: float) -> collections.Counter[int]:
    """Several of LOADS at once, each by name and number of callers; all replies by status. Their bodies are made before the time
    begins to run."""
    bodies = [(body_of(name), callers) for name, callers in loads]

    async def run() -> collections.Counter[int]:
        return sum(
            await asyncio.gather(*(load(url, key, body, callers, seconds) for body, callers in bodies)), collections.Counter()
        )

    return asyncio.run(run())


@functools.cache
def body_of(name: str) -> bytes:
    return LOADS[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:6008")
    parser.add_argument("--key", required=True)
    parser.add_argument("--callers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", default="", help="the loads whose name contains this")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
