"""The pipeline of a run: rows are read ahead on a thread, embedded in several requests at a time, and committed in order.

Memory is bounded by twice as many requests as are under way, and by what is not committed yet.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile

from app.bulk.embedder import Embedder
from app.bulk.ending import refused
from app.bulk.interruption import Interruption
from app.bulk.journal import Journal
from app.bulk.options import Options
from app.bulk.progress import Progress
from app.bulk.rows import BulkRow, Cursor, Fault, Source, Vector

# The items of a request have no more bytes, as JSON. Base64 images reach this; for texts the number of rows is the limit.
MAX_GROUP_BYTES = 8 << 20
# A part is committed when it has so many rows, or bytes of vectors and ids, or when so much time has passed: a kill loses no more
# work than that, and what is under way.
COMMIT_ROWS = 65_536
COMMIT_BYTES = 32 << 20
COMMIT_INTERVAL_S = 5.0
# The first requests have so many rows. A fast reply doubles the size, and a slow one halves it: a slow request holds up the
# commit, and may pass a service's deadline.
INITIAL_ROWS = 32
FAST_S = 2.0
SLOW_S = 10.0

# The rows of a request, and the task that embeds them.
Group = tuple[list[BulkRow], asyncio.Task[list[Vector | Fault]]]


class Pace:
    """The number of rows in a request, `max_rows` at most, adapted to how long requests take."""

    def __init__(self, max_rows: int) -> None:
        self.rows = min(INITIAL_ROWS, max_rows)
        self._max_rows = max_rows

    def adapt(self, seconds: float, rows: int) -> None:
        """Take account of a request of `rows` rows that took `seconds`."""
        if seconds < FAST_S and rows == self.rows:
            self.rows = min(self._max_rows, 2 * rows)
        elif seconds > SLOW_S:
            self.rows = max(1, min(self.rows, rows // 2))


class Stream:
    """Embeds and commits the rows from the journal's cursor to the end of the input. `rate` is in rows per second."""

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
        # Rows that are embedded, or bad, and not committed yet.
        self._pending: list[tuple[BulkRow, Vector | Fault]] = []
        self._pending_bytes = 0
        self._pending_vectors = 0
        self._committed_at = time.monotonic()
        self.rate = 0.0

    async def run(self) -> None:
        """Read, embed and commit every row. Raises Stopped, after committing every row that was done."""
        limit = self._options.limit
        total, position = (self._source.total, at_of) if limit is None else (limit, row_of)
        with Progress(total, position(self._journal.cursor), quiet=self._options.quiet) as progress:
            try:
                while await self._read_ahead():
                    group, task = self._window[0]
                    self._add(group, await self._interruption.unless_stopped(task))
                    self._window.popleft()
                    cursor = group[-1].after
                    bad = cursor.row - self._journal.vectors - self._pending_vectors
                    progress.advance(position(cursor), len(group), cursor.row, bad)
                    if self._is_due():
                        await self._commit()
            finally:
                self.rate = progress.rate()
                tasks = [task for _, task in self._window]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._commit()

    def _rows(self) -> Iterator[BulkRow]:
        rows, limit = self._source.rows(self._journal.cursor), self._options.limit
        return rows if limit is None else takewhile(lambda row: row.number < limit, rows)

    async def _read_ahead(self) -> bool:
        """Fill the window with twice as many requests as may be under way, since a request that is done waits for those before
        it. Returns whether the window has any."""
        while len(self._window) < 2 * self._options.concurrency:
            group = await self._interruption.unless_stopped(asyncio.to_thread(next, self._reader, None))
            if group is None:
                break
            self._window.append((group, asyncio.create_task(self._embed(group))))
        return bool(self._window)

    async def _embed(self, group: list[BulkRow]) -> list[Vector | Fault]:
        """Embed the rows of a group that could be read."""
        async with self._slots:
            started = time.monotonic()
            answers = await self._embedder.embed([row.item for row in group if row.item is not None])
            self._pace.adapt(time.monotonic() - started, len(group))
            return answers

    def _add(self, group: list[BulkRow], answers: list[Vector | Fault]) -> None:
        """Add rows that are done, in order, to those to be committed. Their items are dropped."""
        left = iter(answers)
        for row in group:
            answer = row.fault or next(left)
            self._pending_vectors += not isinstance(answer, Fault)
            done = replace(row, item=None)
            # In a part, a bad row takes as much room as a vector.
            self._pending_bytes += done.num_bytes + 4 * self._dimension
            self._pending.append((done, answer))

    def _is_due(self) -> bool:
        if len(self._pending) >= COMMIT_ROWS or self._pending_bytes >= COMMIT_BYTES:
            return True
        return time.monotonic() - self._committed_at >= COMMIT_INTERVAL_S

    async def _commit(self) -> None:
        """Commit what is pending. Raises Stopped if the input has changed since the run began."""
        if self._source.has_changed():
            raise refused(f"{self._options.input} has changed while it was read; --restart begins anew")
        if self._pending:
            await asyncio.to_thread(self._journal.commit, self._pending, self._dimension)
            self._pending, self._pending_bytes, self._pending_vectors = [], 0, 0
        self._committed_at = time.monotonic()


def groups(rows: Iterator[BulkRow], pace: Pace, max_bytes: int = MAX_GROUP_BYTES) -> Iterator[list[BulkRow]]:
    """Yield the rows in lists of at most `pace.rows` rows, as it is then, and `max_bytes`. A larger row has a list of its own."""
    group: list[BulkRow] = []
    num_bytes = 0
    for row in rows:
        if group and (len(group) >= pace.rows or num_bytes + row.num_bytes > max_bytes):
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
