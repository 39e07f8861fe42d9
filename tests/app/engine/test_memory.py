"""What requests may hold together, in bytes and in pixels."""

from __future__ import annotations

import threading
import time

import pytest

from app.engine.memory import MemoryBudget, PixelBudget, RequestTooLarge
from scheduler.errors import Overloaded


def budget(max_bytes: int = 1000) -> MemoryBudget:
    return MemoryBudget(max_bytes, lambda: 7.0)


def test_what_a_request_holds_is_given_back_in_the_end() -> None:
    memory = budget()
    with pytest.raises(ZeroDivisionError), memory.share() as share:
        share.add(300)
        share.expect(200)
        assert memory.held == share.held == 500
        _ = 1 / 0
    assert memory.held == 0


def test_requests_share_the_budget_to_the_byte() -> None:
    memory = budget()
    with memory.share() as one, memory.share() as other:
        one.add(600)
        other.add(400)
        with pytest.raises(Overloaded) as refused:
            one.add(1)
        assert refused.value.retry_after == 7.0
        assert memory.held == 1000
        one.add(-1)
        other.add(1)


def test_a_request_that_would_not_fit_alone_is_told_so_whoever_else_is_there() -> None:
    memory = budget()
    with memory.share() as one, memory.share() as other:
        one.add(500)
        with pytest.raises(RequestTooLarge, match="1,000 bytes"):
            other.add(1001)
        other.add(500)
        with pytest.raises(RequestTooLarge):
            other.add(501)
        assert memory.held == 1000


def test_what_comes_is_taken_from_what_was_set_aside() -> None:
    memory = budget()
    with memory.share() as share:
        share.expect(200)
        share.add(150)
        assert share.held == 200
        share.add(150)
        assert share.held == 300
        share.expect(100)
        share.add(20)
        share.settle()
        assert share.held == memory.held == 320


def test_a_guess_sets_no_more_than_a_quarter_aside_and_refuses_nothing_for_good() -> None:
    memory = budget()
    with memory.share() as share:
        share.expect(10**12)
        assert share.held == 250
    with memory.share() as one, memory.share() as other:
        one.add(800)
        with pytest.raises(Overloaded):
            other.expect(10**12)
        assert memory.held == 800


def test_pixels_are_waited_for_in_turn() -> None:
    """A large image is not overtaken by small ones that would fit before it, and none here fits beside another."""
    pixels, order, first = PixelBudget(100), [], threading.Event()

    def run(name: str, wanted: int) -> None:
        with pixels.share() as wait_for_room:
            wait_for_room(wanted)
            order.append(name)

    with pixels.share() as wait_for_room:
        wait_for_room(60)
        threads = []
        for name, wanted in (("large", 90), ("small", 20), ("beyond", 10**9)):
            threads.append(threading.Thread(target=run, args=(name, wanted)))
            threads[-1].start()
            while len(pixels._waiting) < len(threads):
                time.sleep(0.001)
        assert not first.wait(0.05) and order == []
    for thread in threads:
        thread.join(30)
    assert order == ["large", "small", "beyond"]
    with pixels.share() as wait_for_room:
        wait_for_room(100)


def test_a_decoder_that_fails_gives_its_pixels_back() -> None:
    pixels = PixelBudget(100)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), pixels.share() as wait_for_room:
            wait_for_room(100)
            _ = 1 / 0
    with pixels.share():
        pass


def test_a_guess_never_says_that_a_request_is_too_large() -> None:
    memory = budget()
    with memory.share() as share:
        share.add(900)
        share.expect(10**12)
        assert share.held == 1000
