"""Keys and values of instructions' prefixes, computed once and kept while they are used: a bounded LRU.

A prefix is the tokens that every input with one instruction begins with. One that is seen for the first time, in one input, is
not worth computing apart.
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
# Prefixes remembered as seen once.
MAX_SEEN = 4096


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
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def for_batch(self, batch: Sequence[PreparedInput]) -> list[Prefix | None]:
        """Each input's prefix, None where it is computed with the input."""
        keys = [item.token_ids[: item.prefix_tokens].tobytes() for item in batch]
        found = {key: self._find(key, count) for key, count in Counter(keys).items()}
        return [found[key] for key in keys]

    def _find(self, key: bytes, count: int) -> Prefix | None:
        if prefix := self._kept.get(key):
            self._kept.move_to_end(key)
            return prefix
        token_ids = np.frombuffer(key, dtype=np.int64).copy()
        if not 0 < len(token_ids) <= MAX_PREFIX_TOKENS:
            return None
        if count < 2 and key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
            return None
        prefix = self._kept[key] = Prefix(key, len(token_ids), self._compute(token_ids))
        self._tokens += prefix.length
        while self._tokens > MAX_TOKENS:
            self._tokens -= self._kept.popitem(last=False)[1].length
        return prefix
