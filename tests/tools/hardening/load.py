"""Checks of what happens when more is asked than can be done: overload, callers that leave, and deadlines.

The fake model takes a fixed time for a batch, so that the server's capacity is known, and the same on every machine.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import multiprocessing
import random
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.support.hosts import Process
from tests.tools.hardening.board import Outcome, Site, check, memory_mib
from tests.tools.hardening.callers import HOST, Answer, Callers, embedding, get

TIMES_THE_LOAD = 4
MEMORY_MIB = 50.0
# Where other work on the machine spoils the times, once more; all else holds for every try.
TRIES = 2
REFUSED_S = 0.05
HEALTH_S = 0.05
GOODPUT = 0.9


def without_a_full_queue() -> None:
    """without a bound on the queue."""
    import dataclasses

    from scheduler.scheduler import Scheduler

    kept = Scheduler.__init__

    def init(self, load, limits, **callbacks):  # type: ignore[no-untyped-def]
        kept(self, load, dataclasses.replace(limits, max_queue_size=10**9), **callbacks)

    Scheduler.__init__ = init


def without_retry_after() -> None:
    """without Retry-After."""
    from app.http import error_replies

    kept = error_replies.error_reply

    def error_reply(error: BaseException, dialect: object) -> object:
        reply = kept(error, dialect)
        reply.headers.popall("Retry-After", None)
        return reply

    error_replies.error_reply = error_reply


def with_memory_of_refusals() -> None:
    """without letting go of what it has refused."""
    from app.http import error_replies

    kept, refused = error_replies.error_reply, []

    def error_reply(error: BaseException, dialect: object) -> object:
        refused.append(bytearray(100_000))
        return kept(error, dialect)

    error_replies.error_reply = error_reply


@dataclass
class Flood:
    """Requests of so many inputs each, and what came of them."""

    sizes: Sequence[int]
    asked: int = 0
    answers: list[tuple[int, Answer, list[str]]] = field(default_factory=list)
    lost: int = 0

    def requests(self) -> Iterator[tuple[int, list[str], bytes]]:
        """Without end: no two inputs alike, or they would be computed once."""
        numbers = itertools.count()
        for size in itertools.cycle(self.sizes):
            texts = [f"text {next(numbers)}" for _ in range(size)]
            yield size, texts, embedding(texts)

    async def ask(self, callers: Callers, size: int, texts: list[str], request: bytes) -> None:
        self.asked += 1
        try:
            self.answers.append((size, await callers.ask(request), texts))
        except OSError:
            self.lost += 1

    async def steady(self, callers: Callers, sizes: Sequence[int], seconds: float) -> float:
        """Callers with one request of such a size under way each; inputs per second."""
        ends = time.monotonic() + seconds

        async def call(number: int, size: int) -> None:
            for turn in itertools.count():
                if time.monotonic() >= ends:
                    return
                texts = [f"steady {number} {turn} {index}" for index in range(size)]
                await self.ask(callers, size, texts, embedding(texts))

        await asyncio.gather(*(call(number, size) for number, size in enumerate(sizes)))
        return self.inputs_per_second(ends - seconds * 0.7, ends)

    async def rush(self, callers: Callers, count: int, inputs_per_second: float) -> tuple[float, float]:
        """`count` requests, each at its time whether those before it are answered or not; from when to when they were sent."""
        wanted = [*itertools.islice(self.requests(), count)]
        interval = statistics.mean(self.sizes) / inputs_per_second
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(wanted):
                if (wait := began + number * interval - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(self.ask(callers, *request))
            sent_at = time.monotonic()
        return began, sent_at

    def inputs_per_second(self, since: float, until: float) -> float:
        """Inputs that got their vectors. Replies come a batch at a time: one counts evenly over the time that it was waited for,
        and here with the part of it in the window, or a batch more or less would be chance."""
        parts = [
            size * (min(until, answer.at) - max(since, answer.asked_at)) / answer.seconds
            for size, answer, _ in self.answers
            if answer.status == 200 and answer.at > since and answer.asked_at < until
        ]
        return sum(parts) / (until - since)

    def counted(self) -> dict[str, int]:
        """By what they got: "200", "429", or what should not be."""
        counts: collections.Counter[str] = collections.Counter({"200": 0, "429": 0})
        for _, answer, texts in self.answers:
            if answer.status == 200:
                counts["200" if answer.has_vectors_of(texts) else "200 wrong"] += 1
            elif answer.status == 429:
                good = answer.code == "overloaded"
                counts["429" if good and answer.retry_after else "429 without Retry-After" if good else "429 malformed"] += 1
            else:
                counts[str(answer.status)] += 1
        if self.lost:
            counts["lost"] = self.lost
        return dict(counts)

    def refused_p99(self) -> float:
        return percentile([answer.seconds for _, answer, _ in self.answers if answer.status == 429], 0.99)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))


@check(
    "overload",
    "4 times what the device can do: 10,000 requests, 1,500 if quick; then wrk",
    f"200s and 429s add up, each 429 with Retry-After; +{MEMORY_MIB:.0f} MiB at most; full: goodput >= 90 %, p99 < 50 ms",
    without_a_full_queue,
    without_retry_after,
    with_memory_of_refusals,
)
def overload(site: Site) -> Outcome:
    settings = {"FAKE_SECONDS_PER_BATCH": "0.05", "MAX_BATCH_SIZE": "16", "MAX_QUEUE_SIZE": "64"}
    with site.own("tests.support.fakes", **settings) as server:
        server.until_status("ok")
        good, figures = True, []
        for _ in range(site.many(TRIES, 1)):
            flood, rest = asyncio.run(_overload(server, site))
            counts = flood.counted()
            good &= set(counts) == {"200", "429"} and min(counts.values()) > 0 and sum(counts.values()) == flood.asked
            good &= rest.grown_mib <= MEMORY_MIB
            figures.append(f"{told(counts)} of {flood.asked}; {rest}")
            if in_time := rest.in_time():
                break
        if not site.quick:
            figures.append(wrk(server, TIMES_THE_LOAD * (64 + 16)))
    return Outcome(good and (in_time or site.quick), "; ".join(figures))


@dataclass(frozen=True, slots=True)
class Rest:
    """What a rush did to the server: inputs per second before and meanwhile, memory in MiB, the 99th percentiles in seconds."""

    peak: float
    goodput: float
    grown_mib: float
    refused_p99: float
    health_p99: float

    def in_time(self) -> bool:
        return self.goodput >= GOODPUT * self.peak and self.refused_p99 < REFUSED_S and self.health_p99 < HEALTH_S

    def __str__(self) -> str:
        health = f", /health p99 {self.health_p99 * 1000:.1f} ms" if self.health_p99 else ""
        return (
            f"goodput {self.goodput:.0f}/s, {self.goodput / self.peak:.0%} of {self.peak:.0f}/s; 429 p99 "
            f"{self.refused_p99 * 1000:.1f} ms{health}; {self.grown_mib:+.1f} MiB"
        )


async def _overload(server: Process, site: Site) -> tuple[Flood, Rest]:
    async with Callers(server.port()) as callers:
        peak = await Flood([1]).steady(callers, [1] * 48, site.many(4, 1))
        before = memory_mib(server)
        most = [before]
        watch = asyncio.create_task(_watch_memory(server, most))
        flood = Flood([1])
        count = site.many(10_000, 1_500)
        health: list[float] = []
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) if not site.quick else contextlib.nullcontext() as pool:
            probing = pool.submit(probe_health, server.port(), count / (TIMES_THE_LOAD * peak)) if pool else None
            began, sent_at = await flood.rush(callers, count, TIMES_THE_LOAD * peak)
            if probing:
                health = await asyncio.wrap_future(probing)
        watch.cancel()
        goodput = flood.inputs_per_second(began + 0.25, sent_at)
    return flood, Rest(peak, goodput, max(most) - before, flood.refused_p99(), percentile(health, 0.99))


async def _watch_memory(server: Process, most: list[float]) -> None:
    while True:
        most.append(memory_mib(server))
        await asyncio.sleep(0.1)


def probe_health(port: int, seconds: float) -> list[float]:
    """What /health takes, in seconds: in a process of its own, which waits for nothing else."""

    async def probe() -> list[float]:
        took: list[float] = []
        ends = time.monotonic() + seconds
        async with Callers(port) as callers:
            while time.monotonic() < ends:
                took.append((await callers.ask(get("/health"))).seconds)
                await asyncio.sleep(0.01)
        return took

    return asyncio.run(probe())


WRK = """
wrk.method = "POST"
wrk.headers["Authorization"] = "Bearer sk-test"
local number = 0
request = function()
  number = number + 1
  return wrk.format(nil, "/v1/embeddings", nil, '{"input":"wrk ' .. number .. '"}')
end
done = function(summary, latency)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  print(string.format("DONE %d %d %d %d %d", summary.requests, errors.status, broken, summary.duration, latency:percentile(99)))
end
"""


def wrk(server: Process, connections: int) -> str:
    """What wrk, another load tool, sees with so many connections that never wait."""
    if not shutil.which("wrk"):
        return "wrk not installed"
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK)
        script.flush()
        url = f"http://{HOST}:{server.port()}/v1/embeddings"
        command = ["wrk", "-t1", f"-c{connections}", "-d5s", "-s", script.name, url]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    line = next((line for line in ran.stdout.splitlines() if line.startswith("DONE ")), "")
    if not line:
        return f"wrk failed: {ran.stderr.strip() or ran.stdout.strip()}"
    requests, refused, broken, microseconds, p99 = map(int, line.split()[1:])
    seconds = microseconds / 1e6
    return (
        f"wrk: {connections} connections, {requests / seconds:.0f} requests/s, {refused} of {requests} non-2xx, {broken} broken, "
        f"goodput {(requests - refused) / seconds:.0f}/s, p99 {p99 / 1000:.0f} ms"
    )


def without_counting_inputs() -> None:
    """without counting a request's inputs before it is let in."""
    from scheduler.places import Places

    kept = Places.take

    def take(self, count):  # type: ignore[no-untyped-def]
        if not kept(self, 1):
            return False
        self.give(1 - count)
        return True

    Places.take = take


@check(
    "overload, mixed",
    "4 times what the device can do, half of it in requests of 32 inputs",
    "never more inputs than MAX_QUEUE_SIZE; both kinds get 200s, and 429s in one form; full: goodput >= 90 %",
    without_counting_inputs,
    without_a_full_queue,
)
def overload_mixed(site: Site) -> Outcome:
    places = 192
    settings = {"FAKE_SECONDS_PER_BATCH": "0.2", "MAX_BATCH_SIZE": "64", "MAX_QUEUE_SIZE": str(places)}
    with site.own("tests.support.fakes", **settings) as server:
        server.until_status("ok")
        flood, peak, goodput, deepest = asyncio.run(_overload_mixed(server, site))
    counts = flood.counted()
    kinds = {(size, answer.status) for size, answer, _ in flood.answers}
    good = set(counts) == {"200", "429"} and sum(counts.values()) == flood.asked and len(kinds) == 4 and 0 < deepest <= places
    by_kind = collections.Counter(size for size, answer, _ in flood.answers if answer.status == 200)
    sizes = ", ".join(f"{count} of {size} inputs" for size, count in sorted(by_kind.items()))
    return Outcome(
        good and (site.quick or goodput >= GOODPUT * peak),
        f"{told(counts)} of {flood.asked}, 200s: {sizes}; queue at most {deepest:.0f} of {places}; "
        f"{goodput:.0f} inputs/s, {goodput / peak:.0%} of {peak:.0f}",
    )


async def _overload_mixed(server: Process, site: Site) -> tuple[Flood, float, float, float]:
    async with Callers(server.port()) as callers:
        peak = await Flood([1]).steady(callers, [1] * 96 + [32] * 3, site.many(4, 2))
        # 32 requests of one input and one of 32, in turns that are not always the same.
        flood = Flood(random.Random(1).sample([1] * 320 + [32] * 10, 330))
        depths: list[float] = []
        watch = asyncio.create_task(_watch_depth(callers, depths))
        began, sent_at = await flood.rush(callers, site.many(3_960, 1_320), TIMES_THE_LOAD * peak)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        return flood, peak, flood.inputs_per_second(began + 0.2, sent_at), max(depths)


async def _watch_depth(callers: Callers, depths: list[float]) -> None:
    while True:
        depths.append(json.loads((await callers.ask(get("/health"))).body)["queue_depth"])
        await asyncio.sleep(0.01)


def without_the_backlog() -> None:
    """without the backlog in Retry-After: always a second."""
    from scheduler.scheduler import Scheduler

    Scheduler.retry_after = lambda self: 1.0


@check(
    "retry-after",
    "requests as large as the queue, while a backlog of 8 s (4 s if quick) is worked off",
    "Retry-After falls with the backlog, and is within a factor of 3 of when there is room",
    without_the_backlog,
)
def retry_after(site: Site) -> Outcome:
    places = site.many(160, 80)
    settings = {"FAKE_SECONDS_PER_BATCH": "0.1", "MAX_BATCH_SIZE": "2", "MAX_QUEUE_SIZE": str(places)}
    with site.own("tests.support.fakes", **settings) as server:
        server.until_status("ok")
        told_at, room_at = asyncio.run(_retry_after(server, places))
    ratios = [seconds / (room_at - at) for at, seconds in told_at if room_at - at >= 1]
    values = [seconds for _, seconds in told_at]
    good = len(ratios) > 3 and values[0] > values[-1] > 0 and all(1 / 3 <= ratio <= 3 for ratio in ratios)
    return Outcome(
        good,
        f"from {values[0]} s down to {values[-1]} s in {len(values)} replies; {min(ratios):.2f} to {max(ratios):.2f} of the time "
        "that it took",
    )


async def _retry_after(server: Process, places: int) -> tuple[list[tuple[float, int]], float]:
    """When which Retry-After was given, and when there was room for a request as large as the queue."""
    told_at: list[tuple[float, int]] = []
    async with Callers(server.port()) as callers:
        for turn in range(3):
            await callers.ask(embedding([f"first {turn}", f"second {turn}"]))
        backlog = asyncio.create_task(callers.ask(embedding([f"text {number}" for number in range(places)])))
        depth = 0
        while depth < places // 2:
            depth = json.loads((await callers.ask(get("/health"))).body)["queue_depth"]
        asked_at = 0.0
        while depth:
            if depth > 12 and time.monotonic() > asked_at + 0.2:
                answer = await callers.ask(embedding([f"more {number}" for number in range(places)]))
                asked_at = answer.at
                told_at.append((answer.at, answer.retry_after if answer.status == 429 else 0))
            await asyncio.sleep(0.02)
            depth = json.loads((await callers.ask(get("/health"))).body)["queue_depth"]
        room_at = time.monotonic()
        await backlog
    return told_at, room_at


def without_cancellation() -> None:
    """without the end of a handler whose caller has left."""
    from aiohttp import web

    class Deaf(web.AppRunner):
        def __init__(self, app: web.Application, **options: object) -> None:
            super().__init__(app, **options | {"handler_cancellation": False})

    web.AppRunner = Deaf


def without_dropping() -> None:
    """without dropping what nobody waits for from the queue."""
    from scheduler.batch_queue import BatchQueue

    BatchQueue.drop = lambda self, waiter: False


@check(
    "disconnects",
    "1,000 callers (300 if quick) that leave: in their body, while they wait, after half a reply",
    "the queue is empty within 5 s, under 10 % were computed, and the next request is answered",
    without_cancellation,
    without_dropping,
)
def disconnects(site: Site) -> Outcome:
    count = site.many(1_000, 300)
    settings = {"FAKE_SECONDS_PER_BATCH": "0.5", "MAX_BATCH_SIZE": "2", "EMBEDDING_DIMENSION": "60000"}
    with site.own("tests.support.fakes", **settings) as server:
        server.until_status("ok")
        return asyncio.run(_disconnects(server, count))


async def _disconnects(server: Process, count: int) -> Outcome:
    halfway = count // 50
    in_body = count // 4
    waiting = count - halfway - in_body
    async with Callers(server.port()) as callers:
        await asyncio.gather(*(leave_after_half(server.port(), f"half {number}") for number in range(halfway)))
        wires = []
        for number in range(in_body + waiting):
            wire = await callers.connect()
            whole = embedding(f"text {number} {'.' * 1000}")
            wire.send(whole if number < waiting else whole[: -random.Random(number).randint(1, 1000)])
            wires.append(wire)
        while await callers.metric("embedding_prepare_seconds_count") < halfway + waiting:
            await asyncio.sleep(0.02)
        random.Random(0).shuffle(wires)
        for wire in wires:
            wire.abort()
        left_at = time.monotonic()
        while (depth := await callers.metric("embedding_queue_depth")) and time.monotonic() < left_at + 5:
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - left_at
        # What the device had taken is counted when it is through.
        await asyncio.sleep(1.1)
        computed = await callers.metric("embedding_batch_size_sum")
        served = False
        if not depth:
            served = (await callers.ask(embedding("good", dimensions=16))).has_vectors_of(["good"])
    emptied = f"empty after {seconds:.2f} s" if not depth else f"{depth:.0f} in the queue after {seconds:.0f} s"
    return Outcome(
        not depth and computed < count / 10 and served,
        f"{in_body} left in their body, {waiting} while they waited, {halfway} after half a reply: {emptied}, "
        f"{computed:.0f} of {count} computed ({computed / count:.1%}), then {'200' if served else 'no vector'}",
    )


async def leave_after_half(port: int, text: str) -> None:
    """A caller that resets the connection when its reply, larger than both sides' buffers, has begun."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await loop.sock_connect(sock, (HOST, port))
        await loop.sock_sendall(sock, embedding(text))
        await loop.sock_recv(sock, 1024)


def without_the_timer() -> None:
    """without the timer that tells a caller that its deadline has passed."""
    from scheduler.scheduler import Scheduler

    Scheduler._expire = lambda self, waiters: None


def without_the_deadline() -> None:
    """without the deadline in the queue."""
    from scheduler.scheduler import Scheduler

    kept = Scheduler._submit
    Scheduler._submit = lambda self, inputs, deadline, *more: kept(self, inputs, deadline + 1000, *more)


def without_the_header() -> None:
    """without reading X-Request-Timeout."""
    from app.http import handlers
    from app.http.keys import SETTINGS

    handlers.request_deadline = lambda request: time.monotonic() + request.app[SETTINGS].request_timeout_s


REQUEST_TIMEOUT_S = 1.5
# Late by more than so much is no deadline kept.
LATE_S = 0.25
MALFORMED = (
    *("", " ", "0", "0.0", "-1", "+1", "1s", "1,5", ".5", "1.", "1e3", "0x10", "nan", "inf", "1 2", "1_000", "١", "1;2"),
    *("12345678901", "0.1234567890", "ten", "\x80"),
)


@check(
    "deadlines",
    f"60 requests whose deadline passes in the queue; {len(MALFORMED)} malformed X-Request-Timeout",
    "504 in JSON, never early, none reaches the device; 400; full: at most 0.25 s late",
    without_the_timer,
    without_the_deadline,
    without_the_header,
)
def deadlines(site: Site) -> Outcome:
    # All have to be in the queue, and their deadlines to pass there, while one batch runs.
    settings = {"FAKE_SECONDS_PER_BATCH": "4", "MAX_BATCH_SIZE": "64", "REQUEST_TIMEOUT_S": str(REQUEST_TIMEOUT_S)}
    with site.own("tests.support.fakes", **settings) as server:
        server.until_status("ok")
        return asyncio.run(_deadlines(server, site))


async def _deadlines(server: Process, site: Site) -> Outcome:
    rng = random.Random(0)
    # As the header says it; without one, and beyond the setting, the setting counts.
    given = [f"{rng.uniform(0.1, 1.2):.3f}" for _ in range(40)] + [None] * 10 + ["100"] * 10
    async with Callers(server.port()) as callers:
        malformed = await asyncio.gather(*(callers.ask(with_timeout("malformed", value)) for value in MALFORMED))
        refused = [answer.status == 400 and answer.code == "invalid_request_error" for answer in malformed]
        running = asyncio.create_task(callers.ask(embedding("running")))
        while not await callers.metric("embedding_prepare_seconds_count"):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        asked = [callers.ask(with_timeout(f"text {number}", value), site.seconds(5)) for number, value in enumerate(given)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        first = (await running).has_vectors_of(["running"])
        # One more batch: what was late would be in it.
        second = (await callers.ask(embedding("last"))).has_vectors_of(["last"]) if first else False
        computed = await callers.metric("embedding_batch_size_sum")
    counts = collections.Counter(
        f"{answer.status} {answer.code}" if isinstance(answer, Answer) else "unanswered" for answer in answers
    )
    late = [
        answer.seconds - min(float(value or REQUEST_TIMEOUT_S), REQUEST_TIMEOUT_S)
        for answer, value in zip(answers, given, strict=True)
        if isinstance(answer, Answer) and answer.status == 504
    ] or [0.0]
    good = counts == {"504 timeout_error": len(given)} and all(refused) and first and second and computed == 2
    good = good and min(late) >= -0.005 and (max(late) < LATE_S or site.quick)
    return Outcome(
        good,
        f"{told(dict(counts))}, {min(late) * 1000:+.0f} to {max(late) * 1000:+.0f} ms after the deadline; "
        f"{computed - 2:.0f} late inputs computed; {sum(refused)} of {len(MALFORMED)} malformed 400",
    )


def with_timeout(text: str, value: str | None) -> bytes:
    request = embedding(text) if value is None else embedding(text, "X-Request-Timeout: %")
    return request.replace(b"%", (value or "").encode(), 1)
