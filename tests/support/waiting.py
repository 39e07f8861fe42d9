"""Waiting for a condition, by polling. The time limit only keeps a test from hanging; it is nothing that a test asserts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_PAUSE_S = 0.01


def wait_until(condition: Callable[[], object], what: str, timeout: float = 90.0) -> None:
    """Wait until `condition()` is true. Raises AssertionError, which names `what`, after `timeout` seconds; an exception of the
    condition ends the waiting too."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout:g} s: {what}"
        time.sleep(_PAUSE_S)


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait on the event loop until `condition()` is true. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        await asyncio.sleep(_PAUSE_S)
