"""Hosts that run on a thread of their own while a check asks a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TypeVar

T = TypeVar("T")
Speak = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def background(hosts: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """What `hosts` enters, on an event loop; all tasks there are cancelled in the end."""
    started: Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        try:
            async with hosts() as entered:
                started.set_result((entered, asyncio.get_running_loop(), stop))
                await stop.wait()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    entered, loop, stop = started.result(10)
    try:
        yield entered
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@asynccontextmanager
async def listening(speak: Speak, host: str, port: int) -> AsyncIterator[int]:
    """Have `speak` answer every connection; yields the port."""
    server = await asyncio.start_server(speak, host, port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
