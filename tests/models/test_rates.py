"""The measured rate: that of a batch that takes long enough, in its fastest run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from models import rates
from models.base import PreparedInput

ITEM = PreparedInput(np.zeros(200, dtype=np.int64))


class Machine:
    """A machine with a clock of its own: every input takes `seconds`, and run n takes `noise(n)` more."""

    def __init__(self, seconds: float, noise: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.noise = noise
        self.now = 0.0
        self.batches: list[int] = []

    def embed(self, batch: Sequence[PreparedInput]) -> None:
        self.now += len(batch) * self.seconds + self.noise(len(self.batches))
        self.batches.append(len(batch))


def measure(
    monkeypatch: pytest.MonkeyPatch, seconds: float, noise: Callable[[int], float] = lambda _: 0.0
) -> tuple[float, Machine]:
    machine = Machine(seconds, noise)
    monkeypatch.setattr(rates.time, "perf_counter", lambda: machine.now)
    return rates.measure(machine.embed, ITEM), machine


def test_measure_doubles_batches_until_one_takes_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, machine = measure(monkeypatch, 0.05)
    assert rate == pytest.approx(200 / 0.05)
    assert machine.batches == [1, 1, 2, 4, 8, 8, 8]


def test_measure_does_not_count_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, machine = measure(monkeypatch, 1.0, lambda run: 100.0 if run == 0 else 0.0)
    assert rate == pytest.approx(200.0)
    assert machine.batches == [1, 1, 1, 1]


def test_measure_takes_the_largest_batch_of_a_fast_model(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, machine = measure(monkeypatch, 1e-4)
    assert rate == pytest.approx(200 / 1e-4)
    assert machine.batches[-rates.RUNS :] == [rates.MAX_INPUTS] * rates.RUNS


@pytest.mark.parametrize("disturbed", [[4], [4, 5], [5, 6], [4, 6]])
def test_measure_does_not_count_runs_that_were_slowed_down(monkeypatch: pytest.MonkeyPatch, disturbed: list[int]) -> None:
    """Runs 4 to 6 are those of the final size."""
    rate, _ = measure(monkeypatch, 0.05, lambda run: 30.0 if run in disturbed else 0.0)
    assert rate == pytest.approx(200 / 0.05)


def test_measure_goes_on_doubling_after_a_slow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of one has a fixed cost that a larger batch spreads: a rate from it would be far too low."""
    noise = lambda run: 0.04 + (5.0 if run == 1 else 0.0)  # noqa: E731
    rate, machine = measure(monkeypatch, 0.01, noise)
    assert machine.batches == [1, 1, 1, 2, 4, 8, 16, 32, 32, 32]
    assert rate == pytest.approx(32 * 200 / 0.36)
