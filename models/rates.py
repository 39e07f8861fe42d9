"""How fast a model is on this machine, for limits that follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from models.base import PreparedInput

# Long enough to mean something, short enough to wait for.
ENOUGH_SECONDS = 0.3
MOST_INPUTS = 128


def measure(embed: Callable[[Sequence[PreparedInput]], object], item: PreparedInput) -> float:
    """Tokens per second of `embed`, by batches of one input that double until one takes long enough."""
    embed([item])
    count = 1
    while True:
        started = time.perf_counter()
        embed([item] * count)
        elapsed = time.perf_counter() - started
        if elapsed >= ENOUGH_SECONDS or count >= MOST_INPUTS:
            return count * item.num_tokens / elapsed
        count *= 2
