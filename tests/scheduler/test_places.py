"""Places: the capacity of the queue, and a request's hold on some of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from models.base import PreparedInput
from scheduler.places import Places, Reservation
from scheduler.work import Vector

PATIENCE_S = 30.0


def inputs(count: int) -> list[PreparedInput]:
    return [PreparedInput(np.arange(3)) for _ in range(count)]


def submit(inputs: Sequence[PreparedInput], deadline: float) -> list[asyncio.Future[Vector]]:
    """Take the inputs, and with them their places."""
    return []


def refuse(inputs: Sequence[PreparedInput], deadline: float) -> list[asyncio.Future[Vector]]:
    raise KeyError


def test_places_are_taken_up_to_the_limit_and_all_or_none() -> None:
    places = Places(4)
    assert places.take(3)
    assert not places.take(2)
    assert places.in_use == 3
    assert places.take(1)
    assert not places.take(1)
    places.give(2)
    assert places.in_use == 2
    assert places.take(2)


def test_places_are_counted_right_by_two_threads(eager_switches: None) -> None:
    places = Places(10)

    def give_and_take() -> None:
        for _ in range(5000):
            if places.take(2):
                places.give(1)
                places.give(1)

    threads = [threading.Thread(target=give_and_take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert places.in_use == 0


def test_reservation_gives_back_what_was_not_submitted() -> None:
    places = Places(10)
    assert places.take(5)
    with Reservation(places, 5, submit) as reserved:
        reserved.submit(inputs(2), 0.0)
        assert places.in_use == 5
    assert places.in_use == 2


def test_reservation_gives_back_its_places_after_an_error() -> None:
    places = Places(10)
    assert places.take(5)
    with pytest.raises(KeyError), Reservation(places, 5, refuse) as reserved:
        reserved.submit(inputs(2), 0.0)
    assert places.in_use == 0


def test_reservation_submits_no_more_than_it_has() -> None:
    places = Places(10)
    assert places.take(3)
    with Reservation(places, 3, submit) as reserved:
        reserved.submit(inputs(2), 0.0)
        with pytest.raises(ValueError, match="2 inputs for 1 places"):
            reserved.submit(inputs(2), 0.0)
    assert places.in_use == 2
