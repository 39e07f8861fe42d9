"""The data that travels: one Entry per input, gathered in a Submission per request, taken in a Batch.

Times are seconds on the monotonic clock (time.monotonic, which is also asyncio's).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from models.base import PreparedInput


class EntryState(Enum):
    """ARRIVING: on the intake queue; WAITING: in the BatchQueue; TAKEN: by the device; DROPPED: cancelled or late."""

    ARRIVING = auto()
    WAITING = auto()
    TAKEN = auto()
    DROPPED = auto()


class Source(Enum):
    """COMPUTED: by the device, for this input; IN_FLIGHT: for an identical one under way; CACHED: for one before it."""

    COMPUTED = "computed"
    IN_FLIGHT = "in_flight"
    CACHED = "cached"


@dataclass(frozen=True, slots=True)
class Vector:
    """What an entry's future resolves to: a unit vector, float32 of shape (width,), and how long it took to get.

    The row may be another caller's too: it is read-only.
    """

    row: npt.NDArray[np.float32]
    queue_seconds: float
    device_seconds: float
    source: Source = Source.COMPUTED


@dataclass(slots=True, eq=False)
class Entry:
    """One input on its way to the device. Its state and its twins are the BatchQueue's to change.

    `twins` are entries with the same input that are taken with it, and get its vector or its failure.
    """

    prepared: PreparedInput
    future: asyncio.Future[Vector]
    enqueued_at: float
    deadline: float
    state: EntryState = EntryState.ARRIVING
    twins: list[Entry] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.prepared.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """The entries of one request, in order: the unit of fairness."""

    entries: Sequence[Entry]


@dataclass(slots=True)
class Batch:
    """What the device runs at once: no two entries alike."""

    entries: list[Entry] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.num_tokens += entry.num_tokens


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one batch took. `size` and `num_tokens` are what the device computed, `device_seconds` is the forward pass. `waits`
    are seconds from arrival to taking, one for each input and each of its twins; `failed` counts those without a vector."""

    size: int
    num_tokens: int
    waits: Sequence[float]
    device_seconds: float
    failed: int
