"""The batching policy in virtual time: what the real BatchQueue does with a modelled device. Nothing here depends on a clock."""

from __future__ import annotations

import random

import pytest

from tests.tools.load.simulate import BATCH_TOKENS, Arrival, batch_seconds, capacity, poisson, simulate

pytestmark = pytest.mark.tools

FULL_BATCH = batch_seconds(BATCH_TOKENS)


def test_batching_lets_an_idle_device_take_the_first_request_at_once() -> None:
    report = simulate([Arrival(0.0, [20]), Arrival(10.0, [20])])
    assert report.latencies["single"] == pytest.approx([batch_seconds(20)] * 2)
    assert report.batches == [1, 1]


def test_batching_gathers_what_comes_while_the_device_is_busy() -> None:
    report = simulate([Arrival(0.0, [8000]), *(Arrival(0.001, [20]) for _ in range(50))])
    assert report.batches == [1, 50]


def test_window_gathers_and_costs_its_time() -> None:
    arrivals = [Arrival(0.0, [20]), Arrival(0.004, [20])]
    report = simulate(arrivals, window=0.005)
    assert report.batches == [2]
    assert report.latencies["single"][0] == pytest.approx(0.005 + batch_seconds(40))


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("window", [0.002, 0.005, 0.010])
def test_window_never_beats_taking_what_is_there(load: float, window: float) -> None:
    arrivals = poisson(load * capacity(), 2.0, random.Random(3))
    greedy, waiting = simulate(arrivals), simulate(arrivals, window)
    # Near saturation the device gathers by itself, and a short window changes nothing but a percent, up or down.
    assert greedy.percentile(0.5) <= waiting.percentile(0.5) * 1.02
    assert greedy.percentile(0.99) <= waiting.percentile(0.99) * 1.02


def test_fairness_a_single_request_waits_for_two_batches_beside_a_bulk_one() -> None:
    arrivals = [Arrival(0.0, [100] * 2000, "bulk"), *poisson(200, 0.15, random.Random(2))]
    report = simulate(arrivals)
    assert max(report.latencies["single"]) <= 3 * FULL_BATCH
    assert report.latencies["bulk"][0] > 10 * FULL_BATCH


def test_fairness_a_large_input_is_not_starved_by_a_stream_of_small_ones() -> None:
    """The small ones fill every batch; the large one has its turn after theirs, and passed over once goes first in the next."""
    requests = 30
    small = [Arrival(0.0, [400] * 100) for _ in range(requests)]
    report = simulate([*small, Arrival(0.1, [BATCH_TOKENS], "large")])
    turns = requests / (BATCH_TOKENS // 400)
    assert report.latencies["large"][0] <= (turns + 3) * FULL_BATCH
    assert len(report.batches) > 100


def test_fairness_two_bulk_requests_share_the_device() -> None:
    report = simulate([Arrival(0.0, [100] * 1000, "first"), Arrival(0.0, [100] * 1000, "second")])
    assert report.latencies["first"][0] == pytest.approx(report.latencies["second"][0], rel=0.1)
