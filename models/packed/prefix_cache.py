"""Keys and values of instructions' prefixes, computed once and kept while they are used: a bounded LRU.

A prefix is the tokens that every input with one instruction begins with. One that hardly comes again is not worth a pass of its
own, and a batch of many instructions must not make many: where there are more of them than are kept, they would take turns.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedInput

# In tokens: 112 KiB each in bfloat16 for the 2B model. A longer prefix is computed with its input.
MAX_TOKENS = 2048
MAX_PREFIX_TOKENS = 256
# Prefixes that are counted, and the inputs that make one worth computing.
MAX_SEEN = 4096
WORTH_SIGHTINGS = 3
# Prefixes computed for one batch.
MAX_NEW = 4


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """`layers` holds keys and values, each (length, key-value heads, head_dim), for every layer."""

    key: bytes
    length: int
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]


class PrefixCache:
    """For the device's thread alone. `compute` runs the model over a prefix's token ids, int64 of shape (length,)."""

    def __init__(self, compute: Callable[[npt.NDArray[np.int64]], Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        self._compute = compute
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._tokens = 0
        self._sightings: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def for_batch(self, batch: Sequence[PreparedInput]) -> list[Prefix | None]:
        """Each input's prefix, None where it is computed with the input."""
        keys = [item.token_ids[: item.prefix_tokens].tobytes() for item in batch]
        found: dict[bytes, Prefix] = {}
        computed = 0
        # The most frequent first: only so many are computed for one batch.
        for key, count in Counter(keys).most_common():
            if prefix := self._kept.get(key):
                self._kept.move_to_end(key)
                found[key] = prefix
            elif self._see(key, count) >= WORTH_SIGHTINGS and computed < MAX_NEW:
                found[key] = self._add(key)
                computed += 1
        return [found.get(key) for key in keys]

    def _see(self, key: bytes, count: int) -> int:
        """How often a prefix has been seen; never often enough where it is empty or too long."""
        if not 0 < len(key) <= MAX_PREFIX_TOKENS * np.dtype(np.int64).itemsize:
            return 0
        seen = self._sightings[key] = self._sightings.pop(key, 0) + count
        if len(self._sightings) > MAX_SEEN:
            self._sightings.popitem(last=False)
        return seen

    def _add(self, key: bytes) -> Prefix:
        token_ids = np.frombuffer(key, dtype=np.int64).copy()
        prefix = self._kept[key] = Prefix(key, len(token_ids), self._compute(token_ids))
        self._tokens += prefix.length
        self._sightings.pop(key, None)
        while self._tokens > MAX_TOKENS:
            self._tokens -= self._kept.popitem(last=False)[1].length
        return prefix
