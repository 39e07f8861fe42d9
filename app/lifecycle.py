"""Lifecycle: from the open port to the exit code. What is in flight, whether the process is stopping, and why it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum

from scheduler.errors import Draining


class ExitCode(IntEnum):
    """The exit code, which a supervisor reads. DEVICE_FAILED is worth a restart, SETTINGS_WRONG and START_FAILED are not."""

    DRAINED = 0
    START_FAILED = 1
    SETTINGS_WRONG = 2
    DEVICE_FAILED = 3


class Lifecycle:
    """The life of the process: what is in flight, whether it drains, why it ends. For the event loop's thread alone."""

    def __init__(self) -> None:
        self.created = int(time.time())
        self._started_at = time.monotonic()
        self.draining = False
        self.exit_code = ExitCode.DRAINED
        self._ending = asyncio.Event()
        self._under_way: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def uptime(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self._started_at

    @property
    def in_flight(self) -> int:
        """The number of requests under way."""
        return len(self._under_way)

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Counts a request as under way: a drain waits for it. Raises Draining if `abandon` gives it up."""
        limit = asyncio.timeout(None)
        self._under_way.add(limit)
        self._idle.clear()
        try:
            async with limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise Draining("the server is stopping") from None
            raise
        finally:
            self._under_way.discard(limit)
            if not self._under_way:
                self._idle.set()

    def abandon(self) -> None:
        """Gives up what is under way."""
        for limit in self._under_way:
            limit.reschedule(0.0)

    def end(self, code: ExitCode) -> None:
        """Asks the process to end; the first reason counts."""
        if not self._ending.is_set():
            self.exit_code = code
            self._ending.set()

    @property
    def has_ended(self) -> bool:
        """Whether the process was asked to end."""
        return self._ending.is_set()

    async def ending(self) -> None:
        """Waits until the process is asked to end."""
        await self._ending.wait()

    async def idle(self) -> None:
        """Waits until no request is under way."""
        while self.in_flight:
            await self._idle.wait()
