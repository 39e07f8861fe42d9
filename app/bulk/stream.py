"""The rows on their way: read ahead on a thread, asked for in requests of which several are under way, committed in order.

What is in memory is bounded: by the requests under way and as many that wait for one before them, and by what is not committed
yet.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile

from app.bulk.embedder import Embedder, Vector
from app.bulk.ending import refused
from app.bulk.interruption import Interruption
from app.bulk.journal import Journal
from app.bulk.options import Options
from app.bulk.progress import Progress
from app.bulk.rows import Cursor, Fault, Row, Source

# The rows of a request, as JSON, fill no more. Images in base64 come to it; of texts the number of rows is the limit.
MOST_BYTES = 8 << 20
# A part is committed when it has so many rows or bytes of vectors and ids, or after so long: that much work a kill loses, beside
# what is under way.
COMMIT_ROWS = 65_536
COMMIT_BYTES = 32 << 20
COMMIT_EVERY_S = 5.0
# A request begins with so many rows. One that is answered sooner may be larger, one that takes longer is too large: it would hold
# up the commit, and pass a service's deadline.
FIRST_ROWS = 32
SOON_S = 2.0
LATE_S = 10.0

Group = tuple[list[Row], asyncio.Task[list[Vector | Fault]]]


class Pace:
    """How many rows to ask for at a time, `most` at most."""

    def __init__(self, most: int) -> None:
        self.rows = min(FIRST_ROWS, most)
        self._most = most

    def took(self, seconds: float, rows: int) -> None:
        """A request of so many rows was under way for so long."""
        if seconds < SOON_S and rows == self.rows:
            self.rows = min(self._most, 2 * rows)
        elif seconds > LATE_S:
            self.rows = max(1, min(self.rows, rows // 2))


class Stream:
    """From the journal's cursor to the last row."""

    def __init__(
        self,
        source: Source,
        embedder: Embedder,
        journal: Journal,
        options: Options,
        dimension: int,
        interruption: Interruption,
    ) -> None:
        self._source = source
        self._embedder = embedder
        self._journal = journal
        self._options = options
        self._dimension = dimension
        self._interruption = interruption
        self._pace = Pace(options.request_rows)
        self._slots = asyncio.Semaphore(options.concurrency)
        self._window: deque[Group] = deque()
        self._reader = groups(self._rows(), self._pace)
        # Done, and not committed yet.
        self._pending: list[tuple[Row, Vector | Fault]] = []
        self._pending_bytes = 0
        self._good = 0
        self._committed_at = time.monotonic()
        self.rate = 0.0

    async def whole(self) -> None:
        """Read, embed and commit. Raises Stopped, with all committed that was done; `rate` is in rows per second."""
        limit = self._options.limit
        total, measure = (self._source.total, at_of) if limit is None else (limit, row_of)
        with Progress(total, measure(self._journal.cursor), quiet=self._options.quiet) as progress:
            try:
                while await self._read_ahead():
                    group, task = self._window[0]
                    self._add(group, await self._interruption.unless_asked(task))
                    self._window.popleft()
                    cursor = group[-1].after
                    bad = cursor.row - self._journal.vectors - self._good
                    progress.advance(measure(cursor), len(group), cursor.row, bad)
                    if self._is_due():
                        await self._commit()
            finally:
                self.rate = progress.rate()
                tasks = [task for _, task in self._window]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._commit()

    def _rows(self) -> Iterator[Row]:
        rows, limit = self._source.rows(self._journal.cursor), self._options.limit
        return rows if limit is None else takewhile(lambda row: row.number < limit, rows)

    async def _read_ahead(self) -> bool:
        """Fill the window: twice as many requests as are under way, for what is done waits for what comes before it. Whether
        there is anything in it."""
        while len(self._window) < 2 * self._options.concurrency:
            group = await self._interruption.unless_asked(asyncio.to_thread(next, self._reader, None))
            if group is None:
                break
            self._window.append((group, asyncio.create_task(self._answers(group))))
        return bool(self._window)

    async def _answers(self, group: list[Row]) -> list[Vector | Fault]:
        """What comes of the rows of a group that could be read."""
        async with self._slots:
            begun = time.monotonic()
            answers = await self._embedder.embed([row.item for row in group if row.item is not None])
            self._pace.took(time.monotonic() - begun, len(group))
            return answers

    def _add(self, group: list[Row], answers: list[Vector | Fault]) -> None:
        """What is done, in order, to be committed. Of its item a row keeps nothing."""
        left = iter(answers)
        for row in group:
            answer = row.fault or next(left)
            self._good += not isinstance(answer, Fault)
            done = replace(row, item=None)
            # A bad row takes the place of a vector too.
            self._pending_bytes += done.num_bytes + 4 * self._dimension
            self._pending.append((done, answer))

    def _is_due(self) -> bool:
        if len(self._pending) >= COMMIT_ROWS or self._pending_bytes >= COMMIT_BYTES:
            return True
        return time.monotonic() - self._committed_at >= COMMIT_EVERY_S

    async def _commit(self) -> None:
        """Raises Stopped where what was read is not what the run began with."""
        if self._source.has_changed():
            raise refused(f"{self._options.input} has changed while it was read; --restart begins anew")
        if self._pending:
            await asyncio.to_thread(self._journal.commit, self._pending, self._dimension)
            self._pending, self._pending_bytes, self._good = [], 0, 0
        self._committed_at = time.monotonic()


def groups(rows: Iterator[Row], pace: Pace, most_bytes: int = MOST_BYTES) -> Iterator[list[Row]]:
    """The rows in lists, each of at most as many rows as the pace has then, and so many bytes; a row that is larger has one to
    itself."""
    group: list[Row] = []
    num_bytes = 0
    for row in rows:
        if group and (len(group) >= pace.rows or num_bytes + row.num_bytes > most_bytes):
            yield group
            group, num_bytes = [], 0
        group.append(row)
        num_bytes += row.num_bytes
    if group:
        yield group


def at_of(cursor: Cursor) -> int:
    return cursor.at


def row_of(cursor: Cursor) -> int:
    return cursor.row
