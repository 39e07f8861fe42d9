"""Checks of a device that fails: the fake model's faults, and what the callers and the supervisor see of them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.support.hosts import Process
from tests.tools.hardening.board import CHECKPOINT, READY_S, Guard, Outcome, Site, check
from tests.tools.hardening.callers import Answer, Callers, embedding, ended, get, is_vector_of

WAITERS = 32
BATCH_S = 0.3
STALL_S = 1.0
COSINE = 0.9999
# Bars, and beyond them when a check that does not go by the clock gives up.
ANSWERED_S = 2.0
EXIT_S = 10.0
PATIENCE_S = 8.0


def without_last_words() -> None:
    """without the answer to those who wait for a device that is lost."""
    from scheduler.scheduler import Scheduler

    Scheduler._died = lambda self, error: None


def without_the_end() -> None:
    """without the end of the process."""
    from app import main

    main.end_on_failure = lambda lifecycle, error, loaded: None


def without_knowing_it() -> None:
    """without telling an error that lasts from one that passes."""
    from scheduler import device_worker

    class Never(Exception):
        pass

    device_worker.DeviceLost = Never


def without_a_watch() -> None:
    """without a watch on a forward pass that does not end."""
    from scheduler.device_worker import DeviceWorker

    DeviceWorker.busy_seconds = lambda self: 0.0


def lost(name: str, sends: str, fault: dict[str, str], fault_s: float, *guards: Guard) -> None:
    """Put a fault of the device on the board. `fault_s` is when it comes, after the first request."""

    @check(name, sends, "all 503 worker_died < 2 s, /health failed, exit 3 < 10 s", *guards)
    def run(site: Site) -> Outcome:
        settings = {"FAKE_SECONDS_PER_BATCH": str(BATCH_S), "MAX_BATCH_SIZE": "4", "WORKER_STALL_S": str(STALL_S)}
        with site.own("tests.support.fakes", **settings, **fault) as server:
            server.until_status("ok")
            return asyncio.run(_lost(server, fault_s, site))


async def _lost(server: Process, fault_s: float, site: Site) -> Outcome:
    async with Callers(server.port()) as callers:
        seen: set[str] = set()
        probe = asyncio.create_task(_probe(callers, seen))
        fault_at = time.monotonic() + fault_s
        asked = [callers.ask(embedding(f"text {number}"), site.seconds(PATIENCE_S)) for number in range(WAITERS)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        code = await ended(server, site.seconds(EXIT_S + ANSWERED_S))
        ended_at = time.monotonic()
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
    replies = [answer for answer in answers if isinstance(answer, Answer)]
    good = [reply for reply in replies if reply.status == 503 and reply.code == "worker_died" and reply.retry_after]
    slowest = max((reply.at for reply in good), default=fault_at) - fault_at
    in_time = slowest < ANSWERED_S and ended_at - fault_at < EXIT_S
    statuses = collections.Counter(f"{reply.status} {reply.code}" for reply in replies if reply not in good)
    if len(replies) < WAITERS:
        statuses["without an answer"] = WAITERS - len(replies)
    others = "".join(f", {count} {what}" for what, count in sorted(statuses.items()))
    last = f", the last after {max(slowest, 0):.2f} s" if good else ""
    probes = ", ".join(f"{path} {'failed' if path in seen else 'never failed'}" for path in ("/health", "/health/live"))
    exit_told = "no exit" if code is None else f"exit {code} after {ended_at - fault_at:.1f} s"
    return Outcome(
        len(good) == WAITERS and len(seen) == 2 and code == 3 and (in_time or site.quick),
        f"{len(good)} of {WAITERS} 503 worker_died{others}{last}; {probes}; {exit_told}",
    )


async def _probe(callers: Callers, seen: set[str]) -> None:
    """Add the routes that say 503 and "failed"."""
    while len(seen) < 2:
        for path in ("/health", "/health/live"):
            with contextlib.suppress(OSError):
                answer = await callers.ask(get(path), fresh=True)
                if answer.status == 503 and json.loads(answer.body)["status"] == "failed":
                    seen.add(path)
        await asyncio.sleep(0.02)


def without_the_adapters_word() -> None:
    """without the adapter's word on what torch's error means."""
    from models import devices

    devices.translate = lambda error: error


@check(
    "sticky torch error",
    f"{WAITERS} waiters, torch's error of a CUDA device from the first batch on, in the miniature model",
    "all 503 worker_died < 2 s, /health failed, exit 3 < 10 s",
    without_the_adapters_word,
    quick=False,
)
def sticky_torch_error(site: Site) -> Outcome:
    with real(site, FAULT_FROM="1") as server:
        return asyncio.run(_lost(server, 0.0, site))


@contextlib.contextmanager
def real(site: Site, **faults: str) -> Iterator[Process]:
    """The miniature model, with faults, ready."""
    with site.own("tests.tools.hardening.faulty", MODEL_PATH=str(CHECKPOINT), DEVICE="cpu", **faults) as server:
        server.until_status("ok", READY_S)
        yield server


lost(
    "device thread killed",
    f"{WAITERS} waiters, the device's thread ends in its first batch",
    {"FAKE_KILL_AFTER": "1"},
    BATCH_S,
    without_last_words,
    without_the_end,
)
lost(
    "sticky device error",
    f"{WAITERS} waiters, a CUDA error in the first batch and ever after",
    {"FAKE_LOSE_AFTER": "1"},
    BATCH_S,
    without_knowing_it,
)
lost(
    "device stall",
    f"{WAITERS} waiters, a first batch that never ends, WORKER_STALL_S=1",
    {"FAKE_STALL_AFTER": "1"},
    STALL_S,
    without_a_watch,
)


def without_halves() -> None:
    """without trying a batch that failed in halves."""
    from scheduler.device_worker import DeviceWorker

    DeviceWorker._embed = lambda self, model, works: iter([(works, self._attempt(model, works))])


@check(
    "out of memory",
    f"{WAITERS} inputs at once, in one request and from {WAITERS} callers, to a device that takes 5",
    f"{WAITERS} of {WAITERS} right vectors, both ways",
    without_halves,
)
def out_of_memory(site: Site) -> Outcome:
    server = site.fake(FAKE_MOST_INPUTS="5", FAKE_SECONDS_PER_BATCH="0.05")
    texts = [f"text {number}" for number in range(WAITERS)]
    together, apart = asyncio.run(_both_ways(server, texts))
    right = [sum(is_vector_of(row, text) for row, text in zip(rows, texts, strict=True)) for rows in (together, apart)]
    return Outcome(right == [WAITERS, WAITERS], f"{right[0]} of {WAITERS} in one request, {right[1]} from callers")


@check(
    "never fits",
    f"{WAITERS} inputs at once, one of which fits no device, in 4 places",
    f"it alone fails: {WAITERS - 1} right vectors, both ways",
    without_halves,
)
def never_fits(site: Site) -> Outcome:
    server = site.fake(FAKE_HEAVY_TEXT="heavy", FAKE_SECONDS_PER_BATCH="0.01")
    right = alone = asked = 0
    for place in (0, 1, 17, WAITERS - 1):
        texts = [f"{'heavy' if number == place else 'text'} {number}" for number in range(WAITERS)]
        for rows in asyncio.run(_both_ways(server, texts)):
            asked += 1
            alone += rows[place] is None
            right += sum(is_vector_of(row, text) for row, text in zip(rows, texts, strict=True))
    return Outcome(
        right == asked * (WAITERS - 1) and alone == asked, f"{right} of {asked * (WAITERS - 1)} right, {alone} of {asked} failed"
    )


@check(
    "torch out of memory",
    f"{WAITERS} inputs at once, both ways, to the miniature model on a device that takes 5",
    f"{WAITERS} of {WAITERS} right vectors, both ways",
    without_halves,
    quick=False,
)
def torch_out_of_memory(site: Site) -> Outcome:
    texts = [f"text {number}" for number in range(WAITERS)]
    with real(site, FAULT_ABOVE="5") as server:
        solo = asyncio.run(_alone(server, texts))
        ways = asyncio.run(_both_ways(server, texts))
        failed = "inputs failed: " in server.stderr
    right = [sum(row is not None and np.dot(row, one) > COSINE for row, one in zip(rows, solo, strict=True)) for rows in ways]
    told = "batches failed" if failed else "none was too large"
    good = right == [WAITERS, WAITERS] and failed
    return Outcome(good, f"{right[0]} of {WAITERS} in one request, {right[1]} from callers; {told}")


async def _alone(server: Process, texts: list[str]) -> list[Any]:
    """The vector of each text, asked for by itself."""
    async with Callers(server.port()) as callers:
        return [(await callers.ask(embedding(text))).vectors()[0] for text in texts]


async def _both_ways(server: Process, texts: list[str]) -> tuple[list[Any], list[Any]]:
    """The vectors of texts in one request that takes partial results, and from callers with one each; None for a failure."""
    async with Callers(server.port()) as callers:
        answer = await callers.ask(embedding(texts, partial=True))
        answers = await asyncio.gather(*(callers.ask(embedding(text)) for text in texts))
    together = answer.vectors() if answer.status == 200 else [None] * len(texts)
    return together, [one.vectors()[0] if one.status == 200 else None for one in answers]
