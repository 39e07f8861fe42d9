"""BatchQueue: what waits for the device, and which of it goes next. The whole batching policy.

- A batch forms as late as possible: `next_batch` is called by a device that is free, and takes what waits at that moment.
- It is bounded by tokens first, by items second; the first entry is always admitted, so a large one is never stuck.
- Requests take turns, one entry each, so that one with thousands of inputs does not hold up one with a single input. A request
  whose next entry did not fit is first in the batch after.
- With `max_batch_wait` above 0 a batch that is not full waits for more, counted from its oldest entry's arrival.
- An entry that is cancelled or late is gone at that moment, and never reaches a batch.

Knows no event loop: the loop's thread adds and drops, the device's thread takes, under one condition.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from scheduler.entry import Batch, Entry, EntryState, Submission

# Requests that may be passed over for one batch: looking further costs more than a fuller batch gains.
LOOK_AHEAD = 32


class BatchQueue:
    """Thread-safe. `max_batch_wait` is in seconds; `clock` is the monotonic clock that entries are stamped with."""

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_batch_size: int,
        max_batch_wait: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.max_batch_wait = max_batch_wait
        self._clock = clock
        self._changed = threading.Condition()
        self._requests: deque[deque[Entry]] = deque()
        self._waiting = 0
        self._waiting_tokens = 0
        self._dropped = 0
        self._closed = False

    def __len__(self) -> int:
        """Entries that wait."""
        return self._waiting

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens

    def add(self, submission: Submission) -> None:
        """Put a request's entries behind those of the requests that wait already."""
        with self._changed:
            entries = deque(entry for entry in submission.entries if entry.state is EntryState.ARRIVING)
            if not entries:
                return
            for entry in entries:
                entry.state = EntryState.WAITING
            self._requests.append(entries)
            self._waiting += len(entries)
            self._waiting_tokens += sum(entry.num_tokens for entry in entries)
            self._changed.notify()

    def drop(self, entry: Entry) -> bool:
        """Give up an entry that has not been taken; False where the device has it already, or it is gone."""
        with self._changed:
            if entry.state is EntryState.ARRIVING:
                entry.state = EntryState.DROPPED
                return True
            if not self._drop(entry):
                return False
            self._dropped += 1
            # While the device is busy nothing else forgets them, and their pixels would add up with every caller that gives up.
            if self._dropped > self._waiting:
                self._sweep()
            return True

    def close(self) -> None:
        """Let `next_batch` hand out what waits, without waiting for more, and then None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take_all(self) -> list[Entry]:
        """Empty the queue: what a device that is lost will never run."""
        with self._changed:
            entries = [entry for request in self._requests for entry in request if entry.state is EntryState.WAITING]
            for entry in entries:
                self._drop(entry)
            self._requests.clear()
            return entries

    def ready_in(self) -> float | None:
        """Seconds until `next_batch` would hand out a batch, 0 for at once; None while nothing waits."""
        with self._changed:
            return max(0.0, self._time_to_gather()) if self._waiting else None

    def next_batch(self) -> Batch | None:
        """Wait for work and take the next batch; None once closed and empty. For the device's thread."""
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

    def _drop(self, entry: Entry) -> bool:
        if entry.state is not EntryState.WAITING:
            return False
        entry.state = EntryState.DROPPED
        self._waiting -= 1
        self._waiting_tokens -= entry.num_tokens
        return True

    def _sweep(self) -> None:
        """Forget the dropped entries."""
        live = (deque(entry for entry in request if entry.state is EntryState.WAITING) for request in self._requests)
        self._requests = deque(request for request in live if request)
        self._dropped = 0

    def _time_to_gather(self) -> float:
        """Seconds to go on waiting for a fuller batch; 0 where it should go now."""
        full = self._waiting >= self.max_batch_size or self._waiting_tokens >= self.max_batch_tokens
        if full or self._closed or not self.max_batch_wait:
            return 0.0
        oldest = min(head.enqueued_at for request in self._requests if (head := _head(request)))
        return oldest + self.max_batch_wait - self._clock()

    def _take(self) -> Batch | None:
        """Take one entry of each request in turn, until the batch is full or nothing near the front fits in."""
        batch, now = Batch(), self._clock()
        passed_over: deque[deque[Entry]] = deque()
        while self._requests and len(batch.entries) < self.max_batch_size and len(passed_over) < LOOK_AHEAD:
            request = self._requests.popleft()
            entry = _head(request)
            if entry is None:
                continue
            if batch.entries and batch.num_tokens + entry.num_tokens > self.max_batch_tokens:
                passed_over.append(request)
                continue
            request.popleft()
            self._drop(entry)
            # A late one's caller is told by the deadline's timer; here it is only kept off the device.
            if entry.deadline > now:
                entry.state = EntryState.TAKEN
                batch.add(entry)
            if request:
                self._requests.append(request)
        self._requests.extendleft(reversed(passed_over))
        return batch if batch.entries else None


def _head(request: deque[Entry]) -> Entry | None:
    """A request's first entry that waits still; those before it, dropped, are forgotten."""
    while request and request[0].state is not EntryState.WAITING:
        request.popleft()
    return request[0] if request else None
