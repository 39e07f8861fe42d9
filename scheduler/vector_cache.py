"""VectorCache: the vectors of recent inputs, by content hash, least recently used first out. Bounded in bytes.

A process serves one model, so an input's content hash says which vector is its own. Not thread-safe: the event loop's thread
alone calls it.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

# What an entry takes besides its components: key, array object and its share of the table, just after the table has grown.
ENTRY_BYTES = 384


class VectorCache:
    """A cache of rows, float32 of shape (width,), read-only. With `max_bytes` 0 nothing is ever kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._rows: OrderedDict[bytes, npt.NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Memory in use, with the overhead of each entry."""
        return self._bytes

    def get(self, content_hash: bytes) -> npt.NDArray[np.float32] | None:
        """Return the vector of the input with this content hash; None if it is not kept."""
        row = self._rows.get(content_hash)
        if row is not None:
            self._rows.move_to_end(content_hash)
        return row

    def put(self, content_hash: bytes, row: npt.NDArray[np.float32]) -> None:
        """Keep a copy of a vector: the row itself is a view of its batch, and would keep all of that in memory."""
        size = row.nbytes + ENTRY_BYTES
        if size > self._max_bytes:
            return
        if (old := self._rows.pop(content_hash, None)) is not None:
            self._bytes -= old.nbytes + ENTRY_BYTES
        kept = row.copy()
        kept.flags.writeable = False
        self._rows[content_hash] = kept
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= oldest.nbytes + ENTRY_BYTES
