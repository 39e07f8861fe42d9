"""The ways in which a run of `python -m app embed` ends: its exit codes, and the one exception that ends it early."""

from __future__ import annotations

from enum import IntEnum


class Ending(IntEnum):
    """The exit codes of a run. 0 to 3 mean the same as for the service; 128 plus a signal's number is a run that a signal
    stopped."""

    COMPLETE = 0
    START_FAILED = 1
    REFUSED = 2
    DEVICE_FAILED = 3
    BAD_ROWS = 4
    STOPPED = 5


class Stopped(Exception):
    """Raised to end the run with exit code `code`. The message is the reason; what was committed stays."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def refused(message: str) -> Stopped:
    """Return a Stopped for a command that cannot succeed unless its options, its input or its settings are changed."""
    return Stopped(message, Ending.REFUSED)
