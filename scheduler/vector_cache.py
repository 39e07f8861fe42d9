"""VectorCache: the vectors of recent inputs, by identity, least recently used first out. Bounded in bytes.

A process serves one model, so an input's identity is enough to say which vector is its own. For the event loop's thread alone.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

# What an entry takes beside its components: key, array object and its share of the table, just after the table has grown.
ENTRY_BYTES = 384


class VectorCache:
    """Rows are float32 of shape (width,), read-only. With `max_bytes` 0 nothing is ever kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._rows: OrderedDict[bytes, npt.NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """The memory that is taken."""
        return self._bytes

    def get(self, identity: bytes) -> npt.NDArray[np.float32] | None:
        """The vector of the input with this identity; None where it is not kept."""
        row = self._rows.get(identity)
        if row is not None:
            self._rows.move_to_end(identity)
        return row

    def put(self, identity: bytes, row: npt.NDArray[np.float32]) -> None:
        """Keep a copy of a vector: the row itself is a part of its batch, and would keep all of that alive."""
        size = row.nbytes + ENTRY_BYTES
        if size > self._max_bytes:
            return
        if (old := self._rows.pop(identity, None)) is not None:
            self._bytes -= old.nbytes + ENTRY_BYTES
        kept = row.copy()
        kept.flags.writeable = False
        self._rows[identity] = kept
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= oldest.nbytes + ENTRY_BYTES
