"""What the scheduler says when an input gets no vector.

SchedulerError
├── NotReady           the model is still loading
├── Overloaded         the queue is full; try again in `retry_after` seconds
├── Draining           the process is stopping
├── DeadlineExceeded   the deadline passed before the device took the input
├── BatchFailed        the model raised an error, for this input alone or with it
└── WorkerDied         the device, or the thread that owns it, is lost
"""

from __future__ import annotations


class SchedulerError(Exception):
    """Base of all that follows."""


class NotReady(SchedulerError):
    """The model is still loading."""


class Overloaded(SchedulerError):
    """The queue is full. `retry_after` is in seconds, from the backlog and the measured rate."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(SchedulerError):
    """No new work: the process is stopping."""


class DeadlineExceeded(SchedulerError):
    """The deadline passed before the device took the input."""


class BatchFailed(SchedulerError):
    """The model could not embed this input. The cause is chained."""


class WorkerDied(SchedulerError):
    """The device, or the thread that owns it, is lost: the process has to be started anew."""
