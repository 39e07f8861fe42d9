"""How fast a model is on this machine, for limits that follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from models.base import PreparedInput

# Long enough to mean something, short enough to wait for.
ENOUGH_SECONDS = 0.3
MOST_INPUTS = 128
# The fastest counts: what else the machine does can slow a run down, but never speed it up.
RUNS = 3


def measure(embed: Callable[[Sequence[PreparedInput]], object], item: PreparedInput) -> float:
    """Tokens per second of `embed`, by batches of one input that double until even the fastest run takes long enough."""
    embed([item])
    count = 1
    while True:
        runs: list[float] = []
        while len(runs) < RUNS and (count >= MOST_INPUTS or min(runs, default=ENOUGH_SECONDS) >= ENOUGH_SECONDS):
            started = time.perf_counter()
            embed([item] * count)
            runs.append(time.perf_counter() - started)
        if len(runs) == RUNS:
            return count * item.num_tokens / min(runs)
        count *= 2
