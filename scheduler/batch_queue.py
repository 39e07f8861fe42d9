"""BatchQueue: what waits for the device, and which of it goes next. The whole batching policy.

- A batch forms as late as possible: `next_batch` is called by a device that is free, and takes what waits at that moment.
- It is bounded by tokens first, by items second; the first entry is always admitted, so a large one is never stuck.
- Requests take turns, one entry each, so that one with thousands of inputs does not hold up one with a single input. A request
  whose next entry did not fit is first in the batch after.
- With `max_batch_wait` above 0 a batch that is not full waits for more, counted from its oldest entry's arrival.
- An entry that is cancelled or late is gone at that moment, and never reaches a batch.
- Entries with the same input are computed once. Each has its own place and turn; whichever is taken first takes the others along
  as its twins, and until the batch is finished those that come later too.

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
        self._gone = 0
        # Entries that came when one like them had been taken, and have no place among those that wait.
        self.joined = 0
        # By content hash: of what waits, the first of those that are alike, which has the others as twins; and what is taken.
        self._first: dict[bytes, Entry] = {}
        self._running: dict[bytes, Entry] = {}
        self._closed = False

    def __len__(self) -> int:
        """Entries that wait."""
        return self._waiting

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens

    def add(self, submission: Submission) -> None:
        """Put a request's entries behind those of the requests that wait already; one that is being computed joins its twin."""
        with self._changed:
            entries: deque[Entry] = deque()
            for entry in submission.entries:
                if entry.state is EntryState.ARRIVING and not self._join_running(entry):
                    entry.state = EntryState.WAITING
                    entries.append(entry)
                    first = self._first.setdefault(entry.prepared.content_hash, entry)
                    if first is not entry:
                        first.twins.append(entry)
            if not entries:
                return
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
            self._gone += 1
            self._sweep_if_due()
            return True

    def close(self) -> None:
        """Let `next_batch` hand out what waits, without waiting for more, and then None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take_all(self) -> list[Entry]:
        """Empty the queue: what a device that is lost will never run."""
        with self._changed:
            entries = [entry for request in self._requests for entry in request if _waits(entry)]
            for entry in entries:
                self._drop(entry)
            self._requests.clear()
            return entries

    def finish(self) -> list[Entry]:
        """What has been taken is done with, or lost: no twin joins it from here on. Returns it, twins included."""
        with self._changed:
            entries = [entry for leader in self._running.values() for entry in (leader, *leader.twins)]
            self._running.clear()
            self.joined = 0
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
        self._leave(entry, EntryState.DROPPED)
        content_hash = entry.prepared.content_hash
        if self._first.get(content_hash) is not entry:
            return True
        del self._first[content_hash]
        while entry.twins:
            heir = entry.twins.pop()
            if heir.state is EntryState.WAITING:
                entry.twins, heir.twins = heir.twins, entry.twins
                self._first[content_hash] = heir
                break
        return True

    def _leave(self, entry: Entry, state: EntryState) -> None:
        """An entry waits no longer, and its place is free."""
        entry.state = state
        self._waiting -= 1
        self._waiting_tokens -= entry.num_tokens

    def _sweep_if_due(self) -> None:
        """Forget what waits no longer, once that is the most: while the device is busy nothing else does, and the pixels would
        add up with every caller that gives up."""
        if self._gone <= self._waiting:
            return
        live = (deque(filter(_waits, request)) for request in self._requests)
        self._requests = deque(request for request in live if request)
        for first in self._first.values():
            first.twins = [*filter(_waits, first.twins)]
        self._gone = 0

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
            if entry.deadline > now:
                self._lead(entry, now)
                batch.add(entry)
            else:
                # Its caller is told by the deadline's timer; here it is only kept off the device.
                self._drop(entry)
            if request:
                self._requests.append(request)
        self._requests.extendleft(reversed(passed_over))
        self._sweep_if_due()
        return batch if batch.entries else None

    def _lead(self, entry: Entry, now: float) -> None:
        """Take an entry, and with it as its twins all that are like it and not late."""
        self._leave(entry, EntryState.TAKEN)
        content_hash = entry.prepared.content_hash
        self._running[content_hash] = entry
        first = self._first.pop(content_hash)
        if first is entry and not first.twins:
            return
        alike, first.twins = [first, *first.twins], []
        # A late one is left where it is: it can lead no more.
        entry.twins = [twin for twin in alike if _waits(twin) and twin.deadline > now]
        for twin in entry.twins:
            self._leave(twin, EntryState.TAKEN)
        self._gone += len(entry.twins)

    def _join_running(self, entry: Entry) -> bool:
        """Make an entry the twin of one that is being computed, where there is one."""
        leader = self._running.get(entry.prepared.content_hash)
        if leader is None or entry.deadline <= self._clock():
            return False
        entry.state = EntryState.TAKEN
        leader.twins.append(entry)
        self.joined += 1
        return True


def _waits(entry: Entry) -> bool:
    return entry.state is EntryState.WAITING


def _head(request: deque[Entry]) -> Entry | None:
    """A request's first entry that waits still; those before it, gone, are forgotten."""
    while request and not _waits(request[0]):
        request.popleft()
    return request[0] if request else None
