"""Hosts that run on a thread of their own while a check asks a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def background(start: Callable[[], Awaitable[T]]) -> Iterator[T]:
    """What `start` starts, on an event loop; all tasks there are cancelled in the end."""
    started: Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        try:
            started.set_result((await start(), asyncio.get_running_loop(), stop))
        except BaseException as error:
            started.set_exception(error)
            return
        await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    result, loop, stop = started.result(10)
    try:
        yield result
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
