"""Signals: the first SIGINT or SIGTERM asks a run to stop, a second one ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from app.bulk.ending import Stopped

T = TypeVar("T")


class Interruption:
    """Turns SIGINT and SIGTERM into Stopped, on the running event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._signal: asyncio.Future[signal.Signals] = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signal.done():
            os._exit(128 + number)
        self._signal.set_result(number)

    async def unless_stopped(self, work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
        """Return the result of `work`. Raises Stopped as soon as a signal comes, after cancelling the work."""
        task = asyncio.ensure_future(work)
        first: set[asyncio.Future[Any]] = {task, self._signal}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.check()
        raise AssertionError("the work is not done, and no signal came")

    def check(self) -> None:
        """Raise Stopped if a signal has come. Safe in any thread."""
        if not self._signal.done():
            return
        number = self._signal.result()
        raise Stopped(f"stopped by {'Ctrl-C' if number is signal.SIGINT else number.name}", 128 + number)
