"""Places: the capacity of the queue, counted in inputs. Reservation: some of them, for one request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

from models.base import PreparedInput
from scheduler.work import Vector

Submit = Callable[[Sequence[PreparedInput], float], list[asyncio.Future[Vector]]]


class Places:
    """The places in use, at most `limit`. Thread-safe: the device's thread gives while the event loop takes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_use = 0
        self._lock = threading.Lock()

    @property
    def in_use(self) -> int:
        return self._in_use

    def take(self, count: int) -> bool:
        """Take `count` places; returns False, and takes none, if fewer are free."""
        with self._lock:
            if self._in_use + count > self._limit:
                return False
            self._in_use += count
            return True

    def give(self, count: int) -> None:
        """Give back `count` places."""
        with self._lock:
            self._in_use -= count


class Reservation:
    """Places that a request has taken before its inputs are prepared. A context manager: gives back what was not submitted."""

    def __init__(self, places: Places, count: int, submit: Submit) -> None:
        self._places = places
        self._left = count
        self._submit = submit

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self._places.give(self._left)
        self._left = 0

    def submit(self, inputs: Sequence[PreparedInput], deadline: float) -> list[asyncio.Future[Vector]]:
        """Queue prepared inputs; returns one future each, in order. `deadline` is on the monotonic clock.

        A future raises DeadlineExceeded, BatchFailed, Draining or WorkerDied; cancelling it takes its input out of the queue.
        Raises ValueError if there are more inputs than places, Draining or WorkerDied if no work is taken any more.
        """
        if len(inputs) > self._left:
            raise ValueError(f"{len(inputs)} inputs for {self._left} places")
        futures = self._submit(inputs, deadline)
        # The places are the inputs' own from here on.
        self._left -= len(inputs)
        return futures
