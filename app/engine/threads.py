"""PreparationThreads: what decodes and tokenises, on as many threads as the device leaves cores for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

# Beside a GPU; each may hold an image of tens of megapixels.
MOST = 8


def beside(device: str, cores: int) -> int:
    """How many threads, where the process may run on `cores`. On a CPU the forward pass has them all, and waits for its slowest
    thread: of two cores one such thread left 3 to 8 % more of it than two did."""
    return max(1, cores // 4) if device == "cpu" else min(MOST, cores)


async def run_on(threads: Executor, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function on a thread. Where the caller goes while it waits for one, its arguments are let go of at once: an executor
    keeps a cancelled job, with a body or an image in it, until a thread comes to it."""
    job = [partial(function, *arguments)]
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: job.pop()())
    finally:
        job.clear()


class PreparationThreads:
    """Started for the first request, when the device is known. A context manager: leaving it ends them."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> PreparationThreads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown()

    def pool(self, device: str) -> tuple[Executor, int]:
        """The threads, and how many they are."""
        count = beside(device, self._cores)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="prepare")
        return self._pool, count
