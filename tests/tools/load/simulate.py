"""The batching policy against a modelled device, in virtual time: the real BatchQueue, a clock of our own, and no threads.

    python -m tests.tools.load.simulate

The device takes OVERHEAD_S a batch and TOKEN_S a token, as an H100 is predicted to for the 2B model; the ratios between the
policies are what counts. Arrivals are Poisson with a fixed seed. Prints latency for windows of 0 to 10 ms at three loads, and
of a single request beside one with 2,000 inputs.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.base import PreparedInput
from scheduler.batch_queue import BatchQueue
from scheduler.places import Places
from scheduler.work import Submission, Waiter, Work

OVERHEAD_S = 1.5e-3
TOKEN_S = 5e-6
BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, in seconds, and the tokens of each of its inputs."""

    at: float
    tokens: Sequence[int]
    kind: str = "single"


@dataclass
class Report:
    """Latency of each request by kind, in seconds, from arrival to its last vector; and what the device did."""

    latencies: dict[str, list[float]] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    busy: float = 0.0
    end: float = 0.0

    def percentile(self, share: float, kind: str = "single") -> float:
        ordered = sorted(self.latencies[kind])
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def batch_seconds(tokens: int) -> float:
    """Return the seconds that the modelled device takes for a batch."""
    return OVERHEAD_S + TOKEN_S * tokens


def simulate(arrivals: Iterable[Arrival], window: float = 0.0, batch_tokens: int = BATCH_TOKENS, batch_size: int = 256) -> Report:
    """Run all arrivals through one BatchQueue and one device; `window` is the queue's max_batch_wait, in seconds."""
    now, free_at = 0.0, 0.0
    queue = BatchQueue(
        Places(0), max_batch_tokens=batch_tokens, max_batch_size=batch_size, max_batch_wait=window, clock=lambda: now
    )
    report = Report()
    open_inputs: dict[int, int] = {}
    owner: dict[Work, int] = {}
    coming = sorted(arrivals, key=lambda arrival: arrival.at)
    arrived = 0
    while arrived < len(coming) or len(queue):
        while arrived < len(coming) and coming[arrived].at <= now:
            works = [Work(prepared(count)) for count in coming[arrived].tokens]
            open_inputs[arrived] = len(works)
            owner.update(dict.fromkeys(works, arrived))
            queue.add(Submission([Waiter(work, NOBODY, coming[arrived].at, math.inf) for work in works]))
            arrived += 1
        if now >= free_at and queue.ready_in() == 0.0 and (batch := queue.next_batch()):
            free_at = now + batch_seconds(batch.num_tokens)
            report.batches.append(len(batch.works))
            for request in map(owner.pop, batch.works):
                open_inputs[request] -= 1
                if not open_inputs[request]:
                    report.latencies.setdefault(coming[request].kind, []).append(free_at - coming[request].at)
            continue
        moments = [arrival.at for arrival in coming[arrived : arrived + 1]]
        if (wait := queue.ready_in()) is not None:
            moments.append(max(free_at, now + wait))
        now = min(moments)
    report.end = free_at
    return report


def prepared(num_tokens: int) -> PreparedInput:
    """Make an input unlike all others."""
    return PreparedInput(np.broadcast_to(np.int64(next(CONTENTS)), (num_tokens,)))


def poisson(rate: float, seconds: float, rng: random.Random) -> list[Arrival]:
    """Draw single texts at `rate` a second, their tokens log-normal around 60 as a search's queries and passages are."""
    arrivals, at = [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        arrivals.append(Arrival(at, [19 + min(2000, round(rng.lognormvariate(3.7, 0.9)))]))
    return arrivals


def capacity() -> float:
    """Estimate the texts a second that the device could do in full batches of such texts."""
    mean = 19 + math.exp(3.7 + 0.9**2 / 2)
    return BATCH_TOKENS / mean / batch_seconds(BATCH_TOKENS)


def main() -> None:
    """Print the tables."""
    print(f"{'load':>6}{'window':>10}{'p50 ms':>9}{'p99 ms':>9}{'batch':>8}")
    for load in (0.1, 0.5, 0.9):
        for window in (0.0, 0.002, 0.005, 0.010):
            report = simulate(poisson(load * capacity(), 3.0, random.Random(1)), window)
            p50, p99 = report.percentile(0.5) * 1e3, report.percentile(0.99) * 1e3
            mean = sum(report.batches) / len(report.batches)
            print(f"{load:>6.0%}{window * 1e3:>7.0f} ms{p50:>9.1f}{p99:>9.1f}{mean:>8.1f}")
    report = simulate([Arrival(0.0, [100] * 2000, "bulk"), *poisson(200, 1.0, random.Random(2))])
    print(
        f"single requests beside one of 2,000 inputs: p99 {report.percentile(0.99) * 1e3:.1f} ms; the bulk one took "
        f"{report.latencies['bulk'][0] * 1e3:.0f} ms; a full batch takes {batch_seconds(BATCH_TOKENS) * 1e3:.1f} ms"
    )


CONTENTS = itertools.count()
# In the place of a future: nobody waits in virtual time.
NOBODY: Any = None


if __name__ == "__main__":
    main()
