"""The scheduler's queue without a device: a clock that a test moves, waiters for made-up inputs, and a SingleFlight before it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import numpy as np

from models.base import PreparedInput
from scheduler.batch_queue import BatchQueue
from scheduler.places import Places
from scheduler.single_flight import SingleFlight
from scheduler.work import Submission, Waiter, WaiterState, Work


class HandClock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_queue(
    tokens: int | None = 100,
    size: int = 10,
    wait: float = 0.0,
    clock: Callable[[], float] | None = None,
    places: Places | None = None,
) -> BatchQueue:
    return BatchQueue(
        places or Places(1_000_000),
        max_batch_tokens=tokens,
        max_batch_size=size,
        max_batch_wait=wait,
        clock=clock or HandClock(),
    )


CONTENTS = itertools.count()


def make_waiter(num_tokens: int, *, content: int | None = None, enqueued_at: float = 100.0, deadline: float = inf) -> Waiter:
    """A waiter whose input is unlike all others, or identical to those with the same content."""
    no_future: Any = None
    token_ids = np.full(num_tokens, next(CONTENTS) if content is None else -1 - content, dtype=np.int64)
    return Waiter(Work(PreparedInput(token_ids)), no_future, enqueued_at, deadline)


def add(queue: BatchQueue, *sizes: int, **times: float) -> list[Waiter]:
    """Add one request, with an input of each size in tokens; returns its waiters."""
    waiters = [make_waiter(size, **times) for size in sizes]
    queue.add(Submission(waiters))
    return waiters


def take(queue: BatchQueue) -> list[Waiter]:
    """Take a batch; returns the waiters of its works."""
    batch = queue.next_batch()
    assert batch is not None
    assert batch.num_tokens == sum(work.num_tokens for work in batch.works)
    waiters = [waiter for work in batch.works for waiter in work.waiters]
    assert all(waiter.state is WaiterState.TAKEN for waiter in waiters)
    return waiters


class Shared:
    """A queue behind a SingleFlight, as the scheduler has them, for requests of one-token inputs that may be identical."""

    def __init__(self, **options: Any) -> None:
        self.places = Places(1_000_000)
        self.in_flight = SingleFlight(self.places)
        self.queue = make_queue(places=self.places, **options)

    def add(self, *contents: int, **times: float) -> list[Waiter]:
        """Add one request: its inputs are identical if their contents are."""
        waiters = [make_waiter(1, content=content, **times) for content in contents]
        self.submit(waiters)
        return waiters

    def submit(self, waiters: Sequence[Waiter]) -> None:
        assert self.places.take(sum(waiter.state is WaiterState.ARRIVING for waiter in waiters))
        submission = Submission(waiters)
        self.in_flight.join(submission)
        self.queue.add(submission)

    def drop(self, waiter: Waiter) -> bool:
        dropped = self.queue.drop(waiter)
        self.in_flight.forget(waiter.work)
        return dropped

    def start(self) -> list[Work]:
        """Take a batch, which goes on: what is added may join it."""
        batch = self.queue.next_batch()
        assert batch is not None
        assert all(waiter.state is WaiterState.TAKEN for work in batch.works for waiter in work.waiters)
        return batch.works

    def take(self) -> list[list[Waiter]]:
        """Take a batch and end it; returns the waiters of each of its works."""
        return [self.in_flight.finish([work]) for work in self.start()]

    def is_empty(self) -> bool:
        return (len(self.queue), self.queue.waiting_tokens, self.places.in_use, len(self.in_flight)) == (0, 0, 0, 0)
