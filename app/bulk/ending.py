"""How a run of `python -m app embed` ends: its exit codes, and the one exception that ends it early."""

from __future__ import annotations

from enum import IntEnum


class Ending(IntEnum):
    """Exit codes. 0 to 3 mean what they mean for the service; 128 and a signal's number is a run that was asked to stop."""

    COMPLETE = 0
    START_FAILED = 1
    REFUSED = 2
    DEVICE_FAILED = 3
    BAD_ROWS = 4
    STOPPED = 5


class Stopped(Exception):
    """The run ends here, with one line that says why. What was committed stays."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def refused(message: str) -> Stopped:
    """Something that was asked for cannot be: it has to be changed before the command is of any use."""
    return Stopped(message, Ending.REFUSED)
