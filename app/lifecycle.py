"""Lifecycle: from the open port to the exit code. What is in flight, whether the process is stopping, and why it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """What a supervisor reads. DEVICE_FAILED is worth a restart, SETTINGS and START are not."""

    DRAINED = 0
    START_FAILED = 1
    SETTINGS_WRONG = 2
    DEVICE_FAILED = 3


class Lifecycle:
    """For the event loop's thread alone."""

    def __init__(self) -> None:
        self.created = int(time.time())
        self._started_at = time.monotonic()
        self.draining = False
        self.in_flight = 0
        self.exit_code = ExitCode.DRAINED
        self._ending = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request under way: a drain waits for it."""
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def end(self, code: ExitCode) -> None:
        """Ask the process to end; the first reason counts."""
        if not self._ending.is_set():
            self.exit_code = code
            self._ending.set()

    async def ending(self) -> None:
        """Wait until the process is asked to end."""
        await self._ending.wait()

    async def idle(self) -> None:
        """Wait until no request is under way."""
        while self.in_flight:
            await self._idle.wait()
