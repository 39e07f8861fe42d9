"""Checks of the process's life: how it starts, and how it stops."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable

from tests.support.hosts import Process
from tests.tools.hardening.board import Outcome, Site, check
from tests.tools.hardening.callers import Answer, Callers, embedding, ended, get

# A reply and the end of what it is waited for with may come in any order within so long.
TOLERANCE_S = 0.1
# Well above what an end takes, and below every time limit that could hold it up.
ENDED_S = 8.0


def without_the_open_port() -> None:
    """without the port kept open (aiohttp's own shutdown closes the listener first)."""
    from app.http import server

    async def drain(*_: object) -> None:
        pass

    server.drain = drain


def without_refusals() -> None:
    """without the refusal of new work."""
    from scheduler.scheduler import Scheduler

    Scheduler.drain = lambda self: None


def without_connection_close() -> None:
    """without `Connection: close` on the replies."""
    from app.lifecycle import Lifecycle

    Lifecycle.draining = property(lambda self: False, lambda self, value: None)


def without_signals() -> None:
    """without handlers of our own for signals."""
    from app.http import server

    server.handle_signals = lambda lifecycle: None


@check(
    "SIGTERM",
    "200 in flight, idle and busy keep-alive clients, new connections all the while",
    "200 right vectors; new work 503 on an open port, every reply closes; exit 0",
    without_the_open_port,
    without_refusals,
    without_connection_close,
    without_signals,
)
def sigterm(site: Site) -> Outcome:
    settings = {"FAKE_SECONDS_PER_BATCH": "0.5", "MAX_BATCH_SIZE": "40", "SHUTDOWN_TIMEOUT_S": "20"}
    with site.own("tests.support.fakes", **settings) as server:
        server.until_status("ok")
        return asyncio.run(_sigterm(server, *((120, 80) if site.quick else (240, 200))))


async def _sigterm(server: Process, count: int, fewest: int) -> Outcome:
    """`count` requests at once, of which `fewest` have to be in flight when the signal comes: a batch may be through by then."""
    texts = [f"text {number}" for number in range(count)]
    async with Callers(server.port()) as callers:
        idle = [await callers.connect() for _ in range(10)]
        for wire in idle[:5]:
            await wire.ask(get("/v1/models"))
        accepted = [asyncio.create_task(callers.ask(embedding(text))) for text in texts]
        while await callers.metric("embedding_prepare_seconds_count") < count:
            await asyncio.sleep(0.01)
        late = Late(callers)
        busy = asyncio.create_task(late.busy())
        await asyncio.sleep(0.05)
        server.popen.send_signal(signal.SIGTERM)
        signalled_at = time.monotonic()
        await late.until_draining()
        # aiohttp's own shutdown would reset these.
        kept = await asyncio.gather(*(late.note(wire.ask(embedding("late"))) for wire in idle))
        probes = [asyncio.create_task(late.probe(request)) for request in late.requests]
        answers = await asyncio.gather(*accepted, return_exceptions=True)
        finished_at = time.monotonic()
        late.over.set()
        await asyncio.gather(busy, *probes)
        code = await ended(server, 25)
        ended_at = time.monotonic()
    replies = [answer for answer in answers if isinstance(answer, Answer)]
    vectors = sum(
        isinstance(answer, Answer) and answer.has_vectors_of([text]) for answer, text in zip(answers, texts, strict=True)
    )
    in_flight = sum(reply.at > signalled_at for reply in replies)
    open_still = sum(reply.at > late.since and not reply.closes for reply in [*replies, *late.answers])
    lost = sum(at < finished_at - TOLERANCE_S for at in late.lost)
    seen = ", ".join(f"{number} x {what}" for what, number in sorted(late.seen.items())) or "nobody late"
    wanted = {"503 draining", "ready 503", "live 200"}
    good = vectors == count and in_flight >= fewest and kept == ["503 draining"] * len(idle) and set(late.seen) == wanted
    # Beyond what is still to be written nothing holds up the end.
    good = good and code == 0 and ended_at - finished_at < ENDED_S
    return Outcome(
        good and not lost and not open_still,
        f"{vectors} of {count} right, {in_flight} after the signal; {kept.count('503 draining')} of {len(idle)} idle clients "
        f"answered; {seen}; {lost} refused or reset; {open_still} replies without close; "
        f"exit {code} {ended_at - finished_at:.2f} s after the last",
    )


class Late:
    """Clients that come, or go on, when the server drains: from `since` on, until it is `over`.

    `seen` counts what they got, `lost` are the times when they were refused or reset.
    """

    requests = (embedding("late"), get("/health/ready"), get("/health/live"))

    def __init__(self, callers: Callers) -> None:
        self._callers = callers
        self.since = math.inf
        self.over = asyncio.Event()
        self.answers: list[Answer] = []
        self.lost: list[float] = []
        self.seen: collections.Counter[str] = collections.Counter()

    async def until_draining(self) -> None:
        """Until the server says so, or for a second and a half: what comes after that finds it draining, or is a finding."""
        until = time.monotonic() + 1.5
        with contextlib.suppress(OSError):
            while await self._callers.status() != "draining" and time.monotonic() < until:
                await asyncio.sleep(0.01)
        self.since = time.monotonic()

    async def note(self, asked: Awaitable[Answer], name: str = "") -> str:
        """What comes back, in a word."""
        try:
            answer = await asked
        except OSError:
            self.lost.append(time.monotonic())
            return "lost"
        draining = answer.status == 503 and answer.code == "draining" and answer.retry_after
        kind = f"{name} {answer.status}" if name else "503 draining" if draining else f"{answer.status} {answer.code}"
        if answer.asked_at > self.since:
            self.answers.append(answer)
            self.seen[kind] += 1
        return kind

    async def probe(self, request: bytes) -> None:
        """The same request over new connections."""
        name = {get("/health/ready"): "ready", get("/health/live"): "live"}.get(request, "")
        while not self.over.is_set():
            await self.note(self._callers.ask(request, fresh=True), name)
            await asyncio.sleep(0.02)

    async def busy(self) -> None:
        """A keep-alive client that sends one request after another, on the same connection as long as it is let."""
        request = embedding("busy").replace(b"/v1/embeddings ", b"/v1/embeddings/preview ")
        while not self.over.is_set():
            await self.note(self._callers.ask(request))
            await asyncio.sleep(0.01)


def without_giving_up() -> None:
    """without the 503 for what is given up."""
    from app.lifecycle import Lifecycle

    Lifecycle.abandon = lambda self: None


@check(
    "shutdown timeout",
    "20 in flight, more than SHUTDOWN_TIMEOUT_S can answer",
    "503 for what is unanswered, then exit 0",
    without_giving_up,
)
def shutdown_timeout(site: Site) -> Outcome:
    settings = {"FAKE_SECONDS_PER_BATCH": "1.5", "MAX_BATCH_SIZE": "1", "SHUTDOWN_TIMEOUT_S": "0.5"}
    with site.own("tests.support.fakes", **settings) as server:
        server.until_status("ok")
        answers, code, seconds = asyncio.run(_stopped(server, 20, lambda: server.popen.send_signal(signal.SIGTERM)))
    seen = collections.Counter(answers)
    return Outcome(set(seen) <= {"503 draining", "200"} and seen["503 draining"] >= 18 and code == 0, told(seen, code, seconds))


def without_the_second_signal() -> None:
    """without the meaning of the second signal."""
    from app.http import server
    from app.lifecycle import ExitCode

    def handle_signals(lifecycle: object) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lifecycle.end, ExitCode.DRAINED)

    server.handle_signals = handle_signals


@check("second signal", "SIGTERM twice, with 20 in flight", "the end at once, 128 + 15", without_the_second_signal)
def second_signal(site: Site) -> Outcome:
    with site.own("tests.support.fakes", FAKE_SECONDS_PER_BATCH="5", MAX_BATCH_SIZE="4", SHUTDOWN_TIMEOUT_S="8") as server:
        server.until_status("ok")

        def twice() -> None:
            server.popen.send_signal(signal.SIGTERM)
            server.until_status("draining")
            server.popen.send_signal(signal.SIGTERM)

        answers, code, seconds = asyncio.run(_stopped(server, 20, twice))
    return Outcome(code == 128 + signal.SIGTERM, told(collections.Counter(answers), code, seconds))


async def _stopped(server: Process, count: int, stop: Callable[[], None]) -> tuple[list[str], int | None, float]:
    """What `count` requests get that are in flight when the server is stopped, its exit code, and the seconds to it."""
    async with Callers(server.port()) as callers:
        asked = [asyncio.create_task(callers.ask(embedding(f"text {number}"))) for number in range(count)]
        while await callers.metric("embedding_prepare_seconds_count") < count:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await asyncio.to_thread(stop)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        code = await ended(server, 20)
        seconds = time.monotonic() - began
    kinds = [
        f"{answer.status} {answer.code or ''}".rstrip() if isinstance(answer, Answer) else "without an answer"
        for answer in answers
    ]
    return kinds, code, seconds


def told(seen: collections.Counter[str], code: int | None, seconds: float) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(seen.items())) + f"; exit {code} after {seconds:.1f} s"


def without_grace() -> None:
    """without the grace."""
    from app.http import server

    kept = server.drain
    server.drain = lambda lifecycle, scheduler, give_up_at, grace: kept(lifecycle, scheduler, give_up_at, 0.0)


@check("drain grace", "SIGTERM to an idle server with DRAIN_GRACE_S=1", "503 on an open port for 1 s, exit 0", without_grace)
def drain_grace(site: Site) -> Outcome:
    with site.own("tests.support.fakes", DRAIN_GRACE_S="1") as server:
        server.until_status("ok")
        return asyncio.run(_drain_grace(server))


async def _drain_grace(server: Process) -> Outcome:
    async with Callers(server.port()) as callers:
        began = time.monotonic()
        server.popen.send_signal(signal.SIGTERM)
        late = Late(callers)
        await late.until_draining()
        probe = asyncio.create_task(late.probe(late.requests[0]))
        code = await ended(server, 15)
        late.over.set()
        await probe
    refused = late.seen["503 draining"]
    open_for = min(late.lost, default=time.monotonic()) - began
    good = code == 0 and refused > 0 and open_for >= 1.0 - TOLERANCE_S
    return Outcome(good, f"{refused} x 503 draining; open for {open_for:.2f} s; exit {code}")


@check("SIGTERM while loading", "SIGTERM to a server that loads for 60 s", "exit 0", without_signals)
def sigterm_while_loading(site: Site) -> Outcome:
    with site.own("tests.support.fakes", FAKE_LOAD_SECONDS="60") as server:
        server.until_status("loading")
        began = time.monotonic()
        server.popen.send_signal(signal.SIGTERM)
        code = asyncio.run(ended(server, 15))
        return Outcome(code == 0, f"exit {code} after {time.monotonic() - began:.2f} s")


def without_loading_beside() -> None:
    """without the port open while the model loads."""
    from app import main
    from app.http.keys import SCHEDULER
    from scheduler.scheduler import State

    kept = main.run_engine

    async def run_engine(app: object) -> object:
        async for _ in kept(app):
            while app[SCHEDULER].state is State.LOADING:
                await asyncio.sleep(0.05)
            yield

    main.run_engine = run_engine


@check(
    "start",
    "requests to a server that loads for 3 s",
    "503 loading with Retry-After, alive and not ready; then 200",
    without_loading_beside,
)
def start(site: Site) -> Outcome:
    began = time.monotonic()
    with site.own("tests.support.fakes", FAKE_LOAD_SECONDS="3") as server:
        port = server.port()
        return asyncio.run(_start(server, port, began))


async def _start(server: Process, port: int, began: float) -> Outcome:
    seen: collections.Counter[str] = collections.Counter()
    wanted = {"/health 503 loading", "live 200", "ready 503", "work 503 loading"}
    async with Callers(port) as callers:
        while (status := await callers.status()) == "loading":
            if not seen:
                first = time.monotonic() - began
            work = await callers.ask(embedding("text"))
            health = await callers.ask(get("/health"))
            kind = f"work {work.status} {work.code}" if work.status == 200 or work.retry_after else "work without Retry-After"
            live, ready = await callers.ask(get("/health/live")), await callers.ask(get("/health/ready"))
            if await callers.status() == "loading":
                seen += collections.Counter(
                    [f"/health {health.status} {status}", f"live {live.status}", f"ready {ready.status}", kind]
                )
            await asyncio.sleep(0.1)
        served = (await callers.ask(embedding("text"))).has_vectors_of(["text"])
    told = ", ".join(f"{count} x {what}" for what, count in sorted(seen.items())) or "never seen loading"
    first_said = f"; first said after {first:.2f} s" if seen else ""
    return Outcome(set(seen) == wanted and served, f"{told}{first_said}; then {'200' if served else 'no vector'}")


def without_the_sole_right() -> None:
    """without the sole right to the port."""
    from app.http import server

    server.bind = lambda host, port: [socket.create_server((host, port), reuse_port=True)]


@check("port in use", "a port that another has", "exit 1 and one clear line", without_the_sole_right)
def port_in_use(site: Site) -> Outcome:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        with site.own("tests.support.fakes", PORT=str(port)) as server:
            code = asyncio.run(ended(server, site.seconds(10)))
            lines = complaints(server)
            good = code == 1 and len(lines) == 1 and f"port {port}" in lines[0] and "Traceback" not in server.stderr
    return Outcome(good, f"exit {code}, {len(lines)} line that says so" if code is not None else "it serves")


def without_all_problems() -> None:
    """without looking further than the first problem."""
    from app import settings

    kept = settings.parse

    def parse(given: dict[str, str]) -> tuple[dict[str, object], dict[str, str]]:
        values, problems = kept(given)
        return values, dict([*problems.items()][:1])

    settings.parse = parse


WRONG = {
    "API_KEY": "a key",
    "PORT": "70000",
    "DEVICE": "gpu",
    "EMBEDDING_DIMENSION": "0",
    "MAX_BATCH_TOKENS": "many",
    "MAX_QUEUE_SIZE": "-1",
    "MAX_REQUEST_BYTES": "32 parsecs",
    "REQUEST_TIMEOUT_S": "nan",
    "SHUTDOWN_TIMEOUT_S": "0",
    "CORS_ORIGINS": "https://page.example/path",
    "IMAGE_URL_ALLOWED_HOSTS": "http://host/",
    "LOG_LEVEL": "LOUD",
}


@check("settings", f"{len(WRONG)} wrong settings at once", "exit 2, every one named", without_all_problems)
def settings(site: Site) -> Outcome:
    with site.own("app", **WRONG) as server:
        code = server.wait(60)
        named = sum(bool(re.search(rf"(?m)^  {name} ", server.stderr)) for name in WRONG)
        good = code == 2 and named == len(WRONG) and "Traceback" not in server.stderr
    return Outcome(good, f"exit {code}, {named} of {len(WRONG)} named")


def complaints(server: Process) -> list[str]:
    """The log's lines of a fault."""
    return [line for line in server.stderr.splitlines() if re.match(r"\S+ (CRITICAL|ERROR) ", line)]
