"""SIGINT and SIGTERM ask a run to stop; the second one ends it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from app.bulk.ending import Stopped

T = TypeVar("T")


class Interruption:
    """For the running event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._signal: asyncio.Future[signal.Signals] = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signal.done():
            os._exit(128 + number)
        self._signal.set_result(number)

    async def unless_asked(self, work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
        """The result of some work. Raises Stopped as soon as a signal asks for the end; the work is cancelled then."""
        task = asyncio.ensure_future(work)
        both: set[asyncio.Future[Any]] = {task, self._signal}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.check()
        raise AssertionError("neither done nor asked to stop")

    def check(self) -> None:
        """Raises Stopped where a signal has asked for the end. In any thread."""
        if not self._signal.done():
            return
        number = self._signal.result()
        raise Stopped(f"stopped by {'Ctrl-C' if number is signal.SIGINT else number.name}", 128 + number)
