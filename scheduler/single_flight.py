"""SingleFlight: identical inputs are computed once, for all who wait.

One dict, content hash -> Work, of what waits for the device and what it computes. Not thread-safe: the event loop's thread alone
calls it.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.places import Places
from scheduler.work import Submission, Waiter, WaiterState, Work


class SingleFlight:
    """The works in flight: from the first waiter that arrives until the result is there, or the last waiter gives up."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._works: dict[bytes, Work] = {}

    def __len__(self) -> int:
        """Return the number of works in flight."""
        return len(self._works)

    def join(self, submission: Submission) -> None:
        """Let each waiter share the Work of an identical input that is in flight. Call right before the BatchQueue's `add`."""
        for waiter in submission.waiters:
            if waiter.state is WaiterState.ARRIVING:
                waiter.work = self._works.setdefault(waiter.work.content_hash, waiter.work)

    def forget(self, work: Work) -> None:
        """Let nobody join a Work whose last waiter has given up; does nothing if it has waiters."""
        if not work.waiters and self._works.get(work.content_hash) is work:
            del self._works[work.content_hash]

    def finish(self, works: Iterable[Work]) -> list[Waiter]:
        """End works that the device took: nobody joins them any more, and what places their waiters still hold are given back.

        Returns the waiters. The works do not keep them: they refer to each other, and a cycle would keep the inputs in memory.
        """
        ended: list[Waiter] = []
        for work in works:
            ended += work.waiters
            work.waiters = []
            self.forget(work)
        self._places.give(sum(waiter.state is WaiterState.ATTACHED for waiter in ended))
        return ended

    def finish_all(self) -> list[Waiter]:
        """End every Work, as `finish` does: the device is lost, or is not waited for. Call when the BatchQueue is empty."""
        return self.finish(list(self._works.values()))
