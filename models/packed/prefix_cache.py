"""Keys and values of instructions' prefixes, computed once and kept while they are used: a bounded LRU.

A prefix is the tokens that every input with one instruction begins with. A prefix that hardly comes again is not worth a pass of
its own. A batch of many instructions must not compute many prefixes: more than are kept would only evict each other.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedInput

# Tokens of all prefixes that are kept: 112 KiB each in bfloat16 for the 2B model.
MAX_TOKENS = 2048
# A longer prefix is computed with its input.
MAX_PREFIX_TOKENS = 256
# Prefixes whose inputs are counted; the least recently counted is forgotten first.
MAX_COUNTED = 4096
# Inputs that make a prefix worth computing.
MIN_INPUTS = 3
# Prefixes computed for one batch, at most.
MAX_NEW = 4


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A computed prefix: `layers` has its keys and values, each (length, key-value heads, head_dim), for every layer."""

    key: bytes
    length: int
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]


class PrefixCache:
    """Computed prefixes, by their token ids. Only the device's thread may use it. `compute` runs the model over a prefix's token
    ids, int64 (length,)."""

    def __init__(self, compute: Callable[[npt.NDArray[np.int64]], Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        self._compute = compute
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._tokens = 0
        self._counted: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def for_batch(self, batch: Sequence[PreparedInput]) -> list[Prefix | None]:
        """Returns each input's prefix, None if its first tokens are to be computed with the rest."""
        keys = [item.token_ids[: item.prefix_tokens].tobytes() for item in batch]
        found: dict[bytes, Prefix] = {}
        computed = 0
        # The most frequent first: only so many are computed for one batch.
        for key, count in Counter(keys).most_common():
            if prefix := self._kept.get(key):
                self._kept.move_to_end(key)
                found[key] = prefix
            elif self._count(key, count) >= MIN_INPUTS and computed < MAX_NEW:
                found[key] = self._add(key)
                computed += 1
        return [found.get(key) for key in keys]

    def _count(self, key: bytes, count: int) -> int:
        """Counts `count` more inputs with a prefix, and returns how many there have been; 0 if it is empty or too long."""
        if not 0 < len(key) <= MAX_PREFIX_TOKENS * np.dtype(np.int64).itemsize:
            return 0
        total = self._counted[key] = self._counted.pop(key, 0) + count
        if len(self._counted) > MAX_COUNTED:
            self._counted.popitem(last=False)
        return total

    def _add(self, key: bytes) -> Prefix:
        """Computes a prefix and keeps it; the least recently used ones make room."""
        token_ids = np.frombuffer(key, dtype=np.int64).copy()
        prefix = self._kept[key] = Prefix(key, len(token_ids), self._compute(token_ids))
        self._tokens += prefix.length
        self._counted.pop(key, None)
        while self._tokens > MAX_TOKENS:
            self._tokens -= self._kept.popitem(last=False)[1].length
        return prefix
