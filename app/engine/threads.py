"""Threads beside the event loop: for decoding and tokenising as many as the device leaves cores for, for large bodies two."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

# Threads that prepare inputs for a GPU, at most; each may hold an image of tens of megapixels.
MAX_PREPARATION_THREADS = 8


def thread_count(device: str, cores: int) -> int:
    """Returns how many threads prepare inputs, if the process may run on `cores`. On a CPU the forward pass has them all, and
    waits for its slowest thread: of two cores one such thread left 3 to 8 % more of it than two did."""
    return max(1, cores // 4) if device == "cpu" else min(MAX_PREPARATION_THREADS, cores)


async def run_on(threads: Executor, function: Callable[..., T], *arguments: Any) -> T:
    """Runs a function on a thread, in the caller's context. If the caller goes while it waits for one, its arguments are let go
    of at once: an executor keeps a cancelled job, with a body or an image in it, until a thread comes to it."""
    job = [partial(copy_context().run, function, *arguments)]
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: job.pop()())
    finally:
        job.clear()


class PreparationThreads:
    """The threads that prepare inputs. They start with the first request, when the device is known, and end with the context."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> PreparationThreads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown()

    def pool(self, device: str) -> tuple[Executor, int]:
        """Returns the threads, and how many they are."""
        count = thread_count(device, self._cores)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="prepare")
        return self._pool, count


class BodyThreads:
    """The threads that parse large bodies and write large replies. They are not those that prepare inputs, so that neither waits
    for the other. They end with the context."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="bodies")

    def __enter__(self) -> BodyThreads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()

    async def run(self, large: bool, function: Callable[..., T], *arguments: Any) -> T:
        """Runs a function on a thread if its work is large, else where it is: the way to a thread and back takes some 100 us."""
        return await run_on(self._pool, function, *arguments) if large else function(*arguments)
