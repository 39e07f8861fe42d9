"""Checks of the memory that requests may hold together, however they come by it."""

from __future__ import annotations

import asyncio
import collections
import time

import orjson

from tests.support.hosts import Process, RawConnection, base64_of, connect, picture, post
from tests.tools.hardening.board import Outcome, Site, check, memory_mib

MIB = 1 << 20
BUDGET_MIB = 64
# What the allocator and the socket buffers take beside it.
SLACK_MIB = 48


def without_budget() -> None:
    """without the budget for bytes in flight."""
    from app.engine.memory import MemoryBudget

    MemoryBudget.take = lambda self, share, num_bytes: None  # type: ignore[method-assign]


def without_counting_replies() -> None:
    """without counting replies as memory."""
    from contextlib import nullcontext

    from app.engine.memory import MemoryBudget

    MemoryBudget.occupied = lambda self, num_bytes: nullcontext()  # type: ignore[method-assign,assignment,return-value]


def without_a_time_for_replies() -> None:
    """without a time limit for replies."""
    from app.http import server

    server.REPLY_S = 3600.0


@check(
    "half-sent bodies",
    "40 bodies of 31 MB that never end, MAX_BYTES_IN_FLIGHT=64MiB",
    f"429 for those beyond it; memory +{BUDGET_MIB + SLACK_MIB} MiB at most; the next good request 200",
    without_budget,
)
def half_sent_bodies(site: Site) -> Outcome:
    # A busy machine takes long over all of them: neither a head nor a body may be late meanwhile.
    late = {"HEADER_TIMEOUT_S": "300", "BODY_TIMEOUT_S": "300"}
    with site.own("tests.support.fakes", MAX_BYTES_IN_FLIGHT="64MiB", **late) as server:
        server.until_status("ok")
        return asyncio.run(hold_bodies(server, 40, 31_000_000))


async def hold_bodies(server: Process, count: int, size: int) -> Outcome:
    """Send all but the last byte of each."""
    before = memory_mib(server)
    refused = 0
    async with Many(server, count) as connections:

        async def send(raw: RawConnection) -> bool:
            """Whether it was refused."""
            sending = asyncio.create_task(raw.send(post(None, f"Content-Length: {size}") + b" " * (size - 1)))
            replied = asyncio.create_task(raw.reply(120))
            await asyncio.wait([sending, replied], return_when=asyncio.FIRST_COMPLETED)
            if not sending.done() or sending.exception():
                sending.cancel()
                return (await replied).status == 429
            await asyncio.sleep(0.5)
            replied.cancel()
            return replied.done() and not replied.cancelled() and replied.result().status == 429

        refused = sum(await asyncio.gather(*(send(raw) for raw in connections)))
        grown = memory_mib(server) - before
    next_status = await until_accepted(server)
    passed = grown <= BUDGET_MIB + SLACK_MIB and refused > 0 and next_status == 200
    return Outcome(passed, f"+{grown:.0f} MiB, {refused} of {count} refused with 429, the next {next_status}")


@check(
    "queued images",
    "600 images of 512 x 512 in 600 requests at once, MAX_BYTES_IN_FLIGHT=64MiB",
    f"only 200 and 429 add up; memory +{BUDGET_MIB + SLACK_MIB} MiB at most",
    without_budget,
    quick=False,
)
def queued_images(site: Site) -> Outcome:
    # Small batches: the forward pass takes memory of its own, many times that of its images.
    with site.own("app", MAX_BYTES_IN_FLIGHT="64MiB", MAX_BATCH_TOKENS="600") as server:
        server.until_status("ok", 120)
        asyncio.run(queue_images(server, range(60)))
        before = memory_mib(server)
        most, statuses = asyncio.run(queue_images(server, range(100, 100 + site.many(600, 300))))
    passed = set(statuses) == {200, 429} and most - before <= BUDGET_MIB + SLACK_MIB
    return Outcome(passed, f"+{most - before:.0f} MiB, {dict(statuses)}")


async def queue_images(server: Process, seeds: range) -> tuple[float, collections.Counter[int]]:
    """The most memory meanwhile, in MiB, and the replies by status."""
    statuses: collections.Counter[int] = collections.Counter()
    most = 0.0
    bodies = [post(orjson.dumps(image_request(seed))) for seed in seeds]
    async with Many(server, len(bodies)) as connections:

        async def ask(raw: RawConnection, body: bytes) -> None:
            await raw.send(body)
            statuses[(await raw.reply(120)).status] += 1

        asking = asyncio.gather(*(ask(raw, body) for raw, body in zip(connections, bodies, strict=True)))
        while not asking.done():
            await asyncio.sleep(0.05)
            most = max(most, memory_mib(server))
        await asking
    return most, statuses


def image_request(seed: int) -> dict[str, object]:
    return {"input": {"image": base64_of(picture(seed + 1, (512, 512)))}}


class Many:
    """Connections that are all open at once, and closed together."""

    def __init__(self, server: Process, count: int) -> None:
        self._contexts = [connect(server.port()) for _ in range(count)]

    async def __aenter__(self) -> list[RawConnection]:
        return [await context.__aenter__() for context in self._contexts]

    async def __aexit__(self, *_: object) -> None:
        for context in self._contexts:
            await context.__aexit__(None, None, None)


async def until_accepted(server: Process, seconds: float = 30.0) -> int:
    """The status of a good request, once it is no 429 any more."""
    until = time.monotonic() + seconds
    while True:
        status, _, _ = await asyncio.to_thread(server.request, "/v1/embeddings", {"input": "a"})
        if status != 429 or time.monotonic() > until:
            return status
        await asyncio.sleep(0.1)


@check(
    "replies that nobody takes",
    "20 callers that ask for 20 MB each and read nothing, MAX_BYTES_IN_FLIGHT=64MiB",
    "a new caller gets 429, and 200 once they are given up",
    without_counting_replies,
    without_a_time_for_replies,
    quick=False,
)
def replies_that_nobody_takes(site: Site) -> Outcome:
    with site.own("tests.support.fakes", MAX_BYTES_IN_FLIGHT="64MiB", EMBEDDING_DIMENSION="2560") as server:
        server.until_status("ok")
        return asyncio.run(leave_replies(server, 20))


async def leave_replies(server: Process, count: int) -> Outcome:
    body = orjson.dumps({"input": [str(number) for number in range(2000)]})
    async with Many(server, count) as connections:
        for raw in connections:
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await raw.send(post(body))
        await asyncio.sleep(3)
        during, _, _ = await asyncio.to_thread(server.request, "/v1/embeddings", {"input": "a"})
        started = time.monotonic()
        after = await until_accepted(server, 75)
        waited = time.monotonic() - started
    return Outcome(during == 429 and after == 200, f"{during} while they do not read, {after} after {waited:.0f} s")
