"""The soak: everything that callers do, for minutes, while the server's memory, descriptors and threads are watched."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.support.hosts import ImageHost, Process, data_uri, image_host, png, post
from tests.tools.hardening.board import Outcome, Site, check, descriptors, memory_mib, threads
from tests.tools.hardening.callers import Callers, embedding

CALLERS = 4
BAD = 0.05
LEAVE = 0.03
# Between two requests of a caller: a soak need not take the machine.
PAUSE_S = 0.01
SAMPLE_S = 2.0
WARM_UPS = 5
# The part of the samples that counts: before it the process warms up.
COUNTED = 0.6
SLOPE_MIB_PER_MIN = 1.0
# What comes and goes with connections under way at a sample.
DESCRIPTORS = 8
THREADS = 2
COSINE = 0.9999

Item = Any
Row = npt.NDArray[np.float32]


def with_bodies_kept() -> None:
    """without letting go of the bodies."""
    from app.dialects import openai, registry

    kept, bodies = openai.OPENAI, []

    def parse(body: bytes, *rest: Any) -> object:
        bodies.append(bytes(body))
        return kept.parse(body, *rest)

    registry.DIALECTS = (replace(kept, parse=parse),)


def with_sockets_kept() -> None:
    """without closing a socket for each download."""
    import socket

    from app.media.fetch import ImageFetcher

    kept, sockets = ImageFetcher._fetch, []

    async def fetch(self: ImageFetcher, *rest: Any, **named: Any) -> Any:
        sockets.append(socket.socket())
        return await kept(self, *rest, **named)

    ImageFetcher._fetch = fetch


@dataclass
class Sample:
    at: float
    memory_mib: float
    descriptors: int
    threads: int


@dataclass
class Soak:
    """What is asked, from a pool whose solo vectors are known, and what came of it."""

    pool: list[Item]
    bad: list[bytes]
    solo: list[Row] = field(default_factory=list)
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    checked: int = 0
    wrong: int = 0
    left: int = 0
    samples: list[Sample] = field(default_factory=list)

    async def call(self, callers: Callers, seed: int, until: float) -> None:
        """One caller: mostly requests of 1 to 8 inputs, some bad, some left."""
        rng = random.Random(seed)
        for turn in itertools.count():
            if time.monotonic() > until:
                return
            drawn = rng.random()
            if drawn < BAD:
                answer = await callers.ask(rng.choice(self.bad))
                self.statuses[f"bad {answer.status}"] += 1
            elif drawn < BAD + LEAVE:
                wire = await callers.connect()
                wire.send(embedding([f"left {seed} {turn}", rng.choice(self.pool)])[: -rng.choice((0, 20)) or None])
                await asyncio.sleep(rng.uniform(0, 0.03))
                wire.abort()
                self.left += 1
            else:
                await self._ask(callers, rng, f"{seed} {turn}")
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, callers: Callers, rng: random.Random, name: str) -> None:
        places = rng.choices(range(len(self.pool)), k=rng.randint(1, 8))
        # One that nobody else has, so that nothing is only ever remembered.
        fresh = f"fresh {name} " + "word " * rng.randint(0, 150)
        answer = await callers.ask(embedding([fresh, *(self.pool[place] for place in places)]))
        self.statuses[str(answer.status)] += 1
        if answer.status == 200:
            for place, row in zip(places, answer.vectors()[1:], strict=True):
                self.checked += 1
                self.wrong += not float(np.dot(np.array(row), self.solo[place])) > COSINE

    async def watch(self, server: Process) -> None:
        while True:
            self.samples.append(Sample(time.monotonic(), memory_mib(server), descriptors(server), threads(server)))
            await asyncio.sleep(SAMPLE_S)


@check(
    "soak",
    f"texts, images by base64 and by URL, {BAD:.0%} bad, {LEAVE:.0%} who leave, for minutes",
    "memory < 1 MiB/min over the last 60 %, descriptors and threads flat, 0 5xx, every vector its solo one",
    with_bodies_kept,
    with_sockets_kept,
    quick=False,
)
def soak(site: Site) -> Outcome:
    return asyncio.run(_soak(site))


async def _soak(site: Site) -> Outcome:
    pictures = [noise(seed) for seed in range(6)]
    async with image_host(**{f"image{number}": png(picture) for number, picture in enumerate(pictures)}) as host:
        with site.own("app", IMAGE_URL_ALLOWED_HOSTS=host.host) as server:
            await asyncio.to_thread(server.until_status, "ok", 120)
            async with Callers(server.port()) as callers:
                run = Soak(pool_of(pictures, host), bad_requests(host))
                for item in run.pool:
                    (row,) = (await callers.ask(embedding([item]))).vectors()
                    run.solo.append(np.array(row, dtype=np.float32))
                await warm_up(callers, run)
                until = time.monotonic() + site.soak_minutes * 60
                watch = asyncio.create_task(run.watch(server))
                await asyncio.gather(*(run.call(callers, seed, until) for seed in range(CALLERS)))
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch
    return verdict(run, site.soak_minutes)


async def warm_up(callers: Callers, run: Soak) -> None:
    """Larger batches than any that follow, so that no buffer grows for the first time in what is counted."""
    rng = random.Random(1)
    for _ in range(WARM_UPS):
        await asyncio.gather(*(callers.ask(embedding(rng.sample(run.pool, len(run.pool)))) for _ in range(CALLERS)))


def verdict(run: Soak, minutes: float) -> Outcome:
    counted = run.samples[-int(len(run.samples) * COUNTED) :]
    slope = slope_per_minute([sample.at for sample in counted], [sample.memory_mib for sample in counted])
    grown_descriptors = growth([sample.descriptors for sample in counted])
    grown_threads = growth([sample.threads for sample in counted])
    faults = sum(count for what, count in run.statuses.items() if what.split()[-1] >= "500")
    asked_badly = sum(count for what, count in run.statuses.items() if what.startswith("bad"))
    answered_badly = sum(count for what, count in run.statuses.items() if what.startswith("bad 4"))
    flat = grown_descriptors <= DESCRIPTORS and grown_threads <= THREADS
    good = run.statuses["200"] > 0 and not faults and not run.wrong and answered_badly == asked_badly
    statuses = ", ".join(f"{count} x {what}" for what, count in sorted(run.statuses.items()))
    return Outcome(
        good and flat and slope < SLOPE_MIB_PER_MIN,
        f"{minutes:g} min: {slope:+.2f} MiB/min at {counted[-1].memory_mib:.0f} MiB, descriptors {grown_descriptors:+.0f} at "
        f"{counted[-1].descriptors}, threads {grown_threads:+.0f} at {counted[-1].threads}; {statuses}; {run.left} left; "
        f"{run.checked - run.wrong} of {run.checked} vectors are their solo one",
    )


def slope_per_minute(times: Sequence[float], values: Sequence[float]) -> float:
    """By least squares."""
    return float(np.polyfit(np.array(times) - times[0], values, 1)[0]) * 60


def growth(values: Sequence[float]) -> float:
    """From the median of the first third to that of the last."""
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def noise(seed: int) -> Image.Image:
    """An image that does not compress, of a size of its own."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (64 + 8 * seed, 96, 3), dtype=np.uint8))


def pool_of(pictures: Sequence[Image.Image], host: ImageHost) -> list[Item]:
    """Items of every kind."""
    rng = random.Random(0)
    words = ("river", "stone", "lantern", "harbour", "quiet")
    texts: list[Item] = [" ".join(rng.choices(words, k=rng.randint(1, 120))) for _ in range(40)]
    uris: list[Item] = [{"type": "image", "image": data_uri(picture)} for picture in pictures]
    urls: list[Item] = [{"type": "image_url", "image_url": {"url": host.url(f"/image{number}.png")}} for number in range(6)]
    fused: list[Item] = [{"text": f"a picture {number}", "image": data_uri(picture)} for number, picture in enumerate(pictures)]
    return texts + uris + urls + fused


def bad_requests(host: ImageHost) -> list[bytes]:
    """Each a 4xx."""
    return [
        post(b'{"input": ["cut'),
        post(b"\xff\xfe" * 1000),
        post(json.dumps({"input": [1, 2, 3]}).encode()),
        post(json.dumps({"input": "x", "dimensions": 0}).encode()),
        embedding("word " * 9000),
        embedding([{"type": "image", "image": "data:image/png;base64,AAAA"}]),
        embedding([{"type": "image_url", "image_url": {"url": host.url("/missing.png")}}, "text"]),
        embedding([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]),
        embedding("text", model="another"),
        post(b'{"input":"x"}', key="wrong"),
    ]
