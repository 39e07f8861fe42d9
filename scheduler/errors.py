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
    """Base of all that follows. `reason` is its name in metrics."""

    reason = "other"


class NotReady(SchedulerError):
    """The model is still loading."""

    reason = "loading"


class Overloaded(SchedulerError):
    """The queue is full. `retry_after` is in seconds, from the backlog and the measured rate."""

    reason = "overloaded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(SchedulerError):
    """No new work: the process is stopping."""

    reason = "draining"


class DeadlineExceeded(SchedulerError):
    """The deadline passed before the device took the input."""

    reason = "deadline"


class BatchFailed(SchedulerError):
    """The model could not embed this input. The cause is chained."""

    reason = "fault"


class WorkerDied(SchedulerError):
    """The device, or the thread that owns it, is lost: the process has to be started anew."""

    reason = "worker_died"
