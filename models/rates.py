"""Measures how fast a model is on this machine, for limits that follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from models.base import PreparedInput

# The least that a measured run takes: long enough to be exact, short enough to wait for.
MIN_SECONDS = 0.3
# Inputs of a batch; a faster model is measured by shorter runs.
MAX_INPUTS = 128
# Runs at the final size. The fastest counts: other work of the machine can slow a run down, but never speed it up.
RUNS = 3


def measure(embed: Callable[[Sequence[PreparedInput]], object], item: PreparedInput) -> float:
    """Returns the tokens per second of `embed`, by batches of copies of `item` that double until even the fastest run takes long
    enough."""
    embed([item])
    count = 1
    while True:
        runs: list[float] = []
        while len(runs) < RUNS and (count >= MAX_INPUTS or min(runs, default=MIN_SECONDS) >= MIN_SECONDS):
            started = time.perf_counter()
            embed([item] * count)
            runs.append(time.perf_counter() - started)
        if len(runs) == RUNS:
            return count * item.num_tokens / min(runs)
        count *= 2
