"""The data that travels: Waiters in a Submission per request, the Work that they wait for, and Works in a Batch.

Times are seconds on the monotonic clock (time.monotonic, which is also asyncio's).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from models.base import PreparedInput


class Source(Enum):
    """How a vector came: COMPUTED for this input, IN_FLIGHT for an identical one at that time, CACHED from an earlier one."""

    COMPUTED = "computed"
    IN_FLIGHT = "in_flight"
    CACHED = "cached"


@dataclass(frozen=True, slots=True)
class Vector:
    """What a waiter's future resolves to: a unit vector, float32 of shape (width,), and how long it took to get.

    The row may be another caller's too: it is read-only.
    """

    row: npt.NDArray[np.float32]
    queue_seconds: float
    device_seconds: float
    source: Source = Source.COMPUTED


class WaiterState(Enum):
    """How far a waiter has come. It holds a place in the queue while it is ARRIVING, WAITING or ATTACHED.

    ARRIVING: on the intake queue. WAITING: in the BatchQueue. TAKEN: by the device, with its Work. ATTACHED: to a Work that the
    device had taken before it came. DROPPED: cancelled or late.
    """

    ARRIVING = auto()
    WAITING = auto()
    TAKEN = auto()
    ATTACHED = auto()
    DROPPED = auto()


@dataclass(slots=True, eq=False)
class Waiter:
    """One input of one request: its position in the queue, and the future of its vector. The BatchQueue changes its state.

    `context` is the request's: what is logged of this input alone is logged in it.
    """

    work: Work
    future: asyncio.Future[Vector]
    enqueued_at: float
    deadline: float
    state: WaiterState = WaiterState.ARRIVING
    context: Context = field(default_factory=copy_context, repr=False)


@dataclass(slots=True, eq=False)
class Work:
    """A prepared input and its waiters, in order of arrival: several if identical inputs came at about the same time.

    The BatchQueue adds and removes waiters. Once the Work is `taken`, none is removed until SingleFlight finishes it.
    """

    prepared: PreparedInput
    waiters: list[Waiter] = field(default_factory=list)
    taken: bool = False
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = self.prepared.num_tokens

    @property
    def content_hash(self) -> bytes:
        return self.prepared.content_hash


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """The waiters of one request, in order: the unit of fairness."""

    waiters: Sequence[Waiter]


@dataclass(slots=True)
class Batch:
    """What the device runs at once. No two works are identical."""

    works: list[Work] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, work: Work) -> None:
        self.works.append(work)
        self.num_tokens += work.num_tokens


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one batch took. `size` and `num_tokens` count what the device computed; `device_seconds` is the forward pass.

    `waits` has one entry for each waiter: seconds from its arrival until the device took its Work. `failed` counts the waiters
    without a vector.
    """

    size: int
    num_tokens: int
    waits: Sequence[float]
    device_seconds: float
    failed: int
