"""serve(): open the port, serve until asked to end, drain, and say the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from functools import partial
from typing import Any

from aiohttp import web

from app.http.connection import JsonRequestHandler
from app.http.keys import DIALECT, LIFECYCLE, MEMORY, METRICS, SCHEDULER, SETTINGS
from app.lifecycle import ExitCode, Lifecycle
from scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

BACKLOG = 1024
# A proxy keeps its idle connections for 60 s as a rule: let it be the one that closes them.
KEEPALIVE_S = 75.0
# For a client to take its reply; a large one may take longer, at a speed of its own (app.http.connection).
REPLY_S = 60.0
# For a client to read its refusal while it still sends: what it sends on is thrown away.
LINGERING_S = 2.0
# With the device lost, waiting requests are answered and probes see it; then the process ends, whatever still hangs.
FAILED_GRACE_S = 1.5
FAILED_DEADLINE_S = 8.0
# After the shutdown timeout: time for the 503s of what was given up to be written.
ABANDON_GRACE_S = 2.0
# With the listener closed: time for what it has accepted last to be a connection that can be answered, or closed.
LAST_ACCEPTED_S = 0.05
# Then what is still being written, to a client that does not read it, is cut off.
CUT_OFF_S = 0.1


async def serve(app: web.Application) -> ExitCode:
    """Serves until a signal or a failure asks for the end, and stops in order; returns the exit code."""
    settings, lifecycle, scheduler = app[SETTINGS], app[LIFECYCLE], app[SCHEDULER]
    runner = web.AppRunner(app, handle_signals=False, handler_cancellation=True, access_log=None, shutdown_timeout=CUT_OFF_S)
    handle_signals(lifecycle)
    try:
        sockets = bind(settings.host, settings.port)
    except OSError as error:
        log.critical("cannot listen on %s port %d: %s", settings.host, settings.port, error.strerror)
        return ExitCode.START_FAILED
    await runner.setup()
    listeners = [await listen(runner, sock, settings.header_timeout_s) for sock in sockets]
    for sock in sockets:
        log.info("listening on %s port %d", *sock.getsockname()[:2])
    await lifecycle.ending()
    give_up_at = asyncio.get_running_loop().time() + settings.shutdown_timeout_s
    if lifecycle.exit_code is ExitCode.DEVICE_FAILED:
        watchdog = threading.Timer(FAILED_DEADLINE_S, os._exit, [int(ExitCode.DEVICE_FAILED)])
        watchdog.daemon = True
        watchdog.start()
        await asyncio.sleep(FAILED_GRACE_S)
    elif lifecycle.exit_code is ExitCode.DRAINED:
        await drain(lifecycle, scheduler, give_up_at, settings.drain_grace_s)
    for listener in listeners:
        listener.close()
    if lifecycle.exit_code is not ExitCode.DEVICE_FAILED:
        await finish_replies(runner, give_up_at + ABANDON_GRACE_S)
        await runner.cleanup()
    return lifecycle.exit_code


def bind(host: str, port: int) -> list[socket.socket]:
    """Opens a listening socket for every address of `host`. Raises OSError."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(addresses):
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


async def listen(runner: web.AppRunner, sock: socket.socket, header_timeout_s: float) -> asyncio.Server:
    """Accepts connections on a socket, handled by our own connection handler rather than TCPSite's."""
    loop, rejected = asyncio.get_running_loop(), runner.app[METRICS].rejected
    options: dict[str, Any] = {
        "loop": loop,
        "header_timeout_s": header_timeout_s,
        "reply_timeout_s": REPLY_S,
        "memory": runner.app[MEMORY],
        "dialect": runner.app[DIALECT],
        "on_refused": lambda reason: rejected.labels(reason).inc(),
        "keepalive_timeout": KEEPALIVE_S,
        "lingering_time": LINGERING_S,
        "auto_decompress": False,
        "access_log": None,
    }
    assert runner.server is not None
    return await loop.create_server(partial(JsonRequestHandler, runner.server, **options), sock=sock, backlog=BACKLOG)


async def drain(lifecycle: Lifecycle, scheduler: Scheduler, give_up_at: float, grace: float) -> None:
    """Refuses new work, answers what is accepted, and keeps the port open for `grace` seconds; gives up at a time on the loop's
    clock."""
    log.info("draining: %d requests under way", lifecycle.in_flight)
    lifecycle.draining = True
    scheduler.drain()
    try:
        async with asyncio.timeout_at(give_up_at):
            await asyncio.sleep(grace)
            await lifecycle.idle()
        log.info("drained")
    except TimeoutError:
        log.warning("%d requests unanswered after SHUTDOWN_TIMEOUT_S are given up", lifecycle.in_flight)
        lifecycle.abandon()
        try:
            async with asyncio.timeout(ABANDON_GRACE_S):
                await lifecycle.idle()
        except TimeoutError:
            log.warning("%d requests are cut off", lifecycle.in_flight)


async def finish_replies(runner: web.AppRunner, cut_off_at: float) -> None:
    """Closes idle connections, and lets the replies that are being written go out, until a time on the loop's clock.

    For connections that the listeners, closed by now, have accepted in their last moment there is one more: aiohttp never wakes
    one that it is told to close before its handler has begun to wait.
    """
    assert runner.server is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(cut_off_at):
            await asyncio.sleep(LAST_ACCEPTED_S)
            runner.server.pre_shutdown()
            await runner.server.shutdown()


def handle_signals(lifecycle: Lifecycle) -> None:
    """Has SIGTERM and SIGINT ask for the end; the second one is the end."""
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def on_signal(number: int) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        lifecycle.end(ExitCode.DRAINED)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
