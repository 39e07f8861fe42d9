"""BatchQueue: the backlog, and which of it goes to the device next. The whole batching policy.

- A batch forms as late as possible: `next_batch` is called by a device that is free, and takes what waits at that moment.
- It is bounded by tokens first, by inputs second; the first input is always admitted, so a large one is never stuck.
- Requests take turns, one input each, so that one with thousands of inputs does not hold up one with a single input. A request
  whose next input did not fit is first in the batch after.
- With `max_batch_wait` above 0 a batch that is not full waits for more, counted from its oldest input's arrival.
- A waiter that is cancelled or late leaves at that moment, and is in no batch.
- Each waiter has a position in its own request's turns. Whichever waiter of a Work comes first takes the Work, for all of them.

Knows no event loop: the loop's thread adds and drops, the device's thread takes, under one condition.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from scheduler.places import Places
from scheduler.work import Batch, Submission, Waiter, WaiterState, Work

DEFAULT_BATCH_TOKENS = 8192
# On a CPU a batch of this length keeps the matrix products busy, and a single text need not wait long for it.
CPU_BATCH_SECONDS = 0.25
MIN_CPU_BATCH_TOKENS = 256
# Requests that may be passed over for one batch: looking further costs more than a fuller batch gains.
LOOK_AHEAD = 32


class BatchQueue:
    """A thread-safe queue, which gives back the place of each waiter that leaves it.

    `max_batch_tokens` None is DEFAULT_BATCH_TOKENS, or less after `fit_to_cpu`. `max_batch_wait` is in seconds; `clock` is the
    monotonic clock of the waiters' times.
    """

    def __init__(
        self,
        places: Places,
        *,
        max_batch_tokens: int | None,
        max_batch_size: int,
        max_batch_wait: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = places
        self._follows_rate = max_batch_tokens is None
        self.max_batch_tokens = max_batch_tokens or DEFAULT_BATCH_TOKENS
        self.max_batch_size = max_batch_size
        self.max_batch_wait = max_batch_wait
        self._clock = clock
        self._changed = threading.Condition()
        self._requests: deque[deque[Waiter]] = deque()
        self._waiting = 0
        self._waiting_tokens = 0
        self._stale = 0
        self._closed = False

    def __len__(self) -> int:
        """Return the number of waiters in the queue."""
        return self._waiting

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens

    def fit_to_cpu(self, tokens_per_second: float) -> None:
        """Bound a batch by CPU_BATCH_SECONDS at this rate, unless `max_batch_tokens` was given. Call before any work is added."""
        if self._follows_rate:
            tokens = int(tokens_per_second * CPU_BATCH_SECONDS)
            self.max_batch_tokens = min(max(tokens, MIN_CPU_BATCH_TOKENS), DEFAULT_BATCH_TOKENS)

    def add(self, submission: Submission) -> None:
        """Put a request's waiters behind the requests that wait. One whose Work the device has taken needs no position."""
        with self._changed:
            now = self._clock()
            request = deque(waiter for waiter in submission.waiters if self._admit(waiter, now))
            if request:
                self._requests.append(request)
                self._waiting += len(request)
                self._waiting_tokens += sum(waiter.work.num_tokens for waiter in request)
                self._changed.notify()

    def drop(self, waiter: Waiter) -> bool:
        """Give up a waiter; returns False if the device has taken its Work, or it was dropped before."""
        with self._changed:
            if waiter.state not in (WaiterState.ARRIVING, WaiterState.WAITING):
                return False
            self._drop(waiter)
            self._sweep_if_due()
            return True

    def drop_all(self) -> list[Waiter]:
        """Empty the queue of what a device that is lost will never run; returns the waiters that were in it."""
        with self._changed:
            waiters = [waiter for request in self._requests for waiter in request if _waits(waiter)]
            for waiter in waiters:
                self._drop(waiter)
            self._requests.clear()
            return waiters

    def close(self) -> None:
        """Let `next_batch` return what waits, without waiting for more, and then None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def ready_in(self) -> float | None:
        """Seconds until `next_batch` would return a batch, 0 for at once; None if nothing waits."""
        with self._changed:
            return max(0.0, self._time_to_gather()) if self._waiting else None

    def next_batch(self) -> Batch | None:
        """Wait for work and take the next batch; returns None once closed and empty. The device's thread alone calls it."""
        with self._changed:
            while True:
                if not self._waiting:
                    self._requests.clear()
                    if self._closed:
                        return None
                    self._changed.wait()
                elif (wait := self._time_to_gather()) > 0:
                    self._changed.wait(wait)
                elif batch := self._take():
                    return batch

    def _admit(self, waiter: Waiter, now: float) -> bool:
        """Add an arriving waiter to its Work; returns True if it has to wait for the device."""
        if waiter.state is not WaiterState.ARRIVING:
            return False
        if waiter.deadline <= now:
            self._leave(waiter, WaiterState.DROPPED)
            return False
        waiter.work.waiters.append(waiter)
        waiter.state = WaiterState.ATTACHED if waiter.work.taken else WaiterState.WAITING
        return not waiter.work.taken

    def _drop(self, waiter: Waiter) -> None:
        if _waits(waiter):
            waiter.work.waiters.remove(waiter)
        self._leave(waiter, WaiterState.DROPPED)

    def _leave(self, waiter: Waiter, state: WaiterState) -> None:
        """Give back a waiter's place. If it has a position in the queue, that is stale from here on."""
        if _waits(waiter):
            self._stale += 1
            self._waiting -= 1
            self._waiting_tokens -= waiter.work.num_tokens
        waiter.state = state
        self._places.give(1)

    def _sweep_if_due(self) -> None:
        """Remove the stale positions if they are the most: they would keep pixels in memory while the device is busy."""
        if self._stale > self._waiting:
            swept = (deque(filter(_waits, request)) for request in self._requests)
            self._requests = deque(request for request in swept if request)
            self._stale = 0

    def _time_to_gather(self) -> float:
        """Seconds to go on waiting for a fuller batch; 0 or less if it should go now."""
        full = self._waiting >= self.max_batch_size or self._waiting_tokens >= self.max_batch_tokens
        if full or self._closed or not self.max_batch_wait:
            return 0.0
        oldest = min(head.enqueued_at for request in self._requests if (head := _head(request)))
        return oldest + self.max_batch_wait - self._clock()

    def _take(self) -> Batch | None:
        """Take one input of each request in turn, until the batch is full or nothing near the front fits in."""
        batch, now = Batch(), self._clock()
        passed_over: deque[deque[Waiter]] = deque()
        while self._requests and len(batch.works) < self.max_batch_size and len(passed_over) < LOOK_AHEAD:
            request = self._requests.popleft()
            waiter = _head(request)
            if waiter is None:
                continue
            if batch.works and batch.num_tokens + waiter.work.num_tokens > self.max_batch_tokens:
                passed_over.append(request)
                continue
            request.popleft()
            self._stale -= 1
            if waiter.deadline > now:
                self._start(waiter.work, now)
                batch.add(waiter.work)
            else:
                # Its caller is told by the deadline's timer; here it is only kept off the device.
                self._drop(waiter)
            if request:
                self._requests.append(request)
        self._requests.extendleft(reversed(passed_over))
        self._sweep_if_due()
        return batch if batch.works else None

    def _start(self, work: Work, now: float) -> None:
        """Take a Work for all its waiters that are not late."""
        for waiter in work.waiters:
            self._leave(waiter, WaiterState.TAKEN if waiter.deadline > now else WaiterState.DROPPED)
        work.waiters = [waiter for waiter in work.waiters if waiter.state is WaiterState.TAKEN]
        work.taken = True


def _waits(waiter: Waiter) -> bool:
    return waiter.state is WaiterState.WAITING


def _head(request: deque[Waiter]) -> Waiter | None:
    """A request's first waiter that waits still; the stale positions before it are removed."""
    while request and not _waits(request[0]):
        request.popleft()
    return request[0] if request else None
