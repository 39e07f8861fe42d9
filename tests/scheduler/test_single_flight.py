"""Single-flight: identical inputs are computed once, and each waiter still has a turn, a deadline and an end of its own."""

from __future__ import annotations

import threading
import weakref

import pytest

from scheduler.work import Waiter, WaiterState, Work
from tests.support.queues import HandClock, Shared, add, make_waiter

# A hang is a failure; a busy machine is none.
PATIENCE_S = 30.0


def test_single_flight_takes_identical_inputs_with_the_first_and_counts_them_once() -> None:
    shared = Shared(tokens=3, size=3)
    first, second = shared.add(1, 2, 1, 1), shared.add(1, 3)
    assert shared.take() == [[first[0], first[2], first[3], second[0]], [second[1]], [first[1]]]
    assert shared.is_empty()


def test_single_flight_goes_by_whichever_turn_comes_first() -> None:
    """A bulk request's copy of another's only input never holds that one up, nor does it wait for its own turn."""
    shared = Shared(size=2)
    bulk, single = shared.add(10, 11, 12, 13, 1), shared.add(1)
    assert shared.take() == [[bulk[0]], [bulk[4], single[0]]]
    assert shared.take() == [[bulk[1]], [bulk[2]]]
    other = shared.add(13, 14)
    assert shared.take() == [[bulk[3], other[0]], [other[1]]]


def test_single_flight_leaves_no_two_identical_inputs_in_a_batch() -> None:
    shared = Shared(size=256, tokens=10_000)
    shared.add(*[number % 7 for number in range(200)])
    assert sorted(len(waiters) for waiters in shared.take()) == [28] * 3 + [29] * 4


def test_single_flight_lets_what_comes_during_the_pass_join_it() -> None:
    shared = Shared(size=1)
    (first,) = shared.add(1)
    (work,) = shared.start()
    later, waiting = shared.add(1, 2), shared.add(3)
    assert work.waiters == [first, later[0]]
    assert [waiter.state for waiter in later] == [WaiterState.ATTACHED, WaiterState.WAITING]
    assert (len(shared.queue), shared.queue.waiting_tokens) == (2, 2)
    assert shared.places.in_use == 3
    assert not shared.drop(later[0])
    assert shared.in_flight.finish([work]) == [first, later[0]]
    assert shared.places.in_use == 2
    assert [shared.take(), shared.take()] == [[later[1:]], [waiting]]


def test_single_flight_ends_with_the_batch() -> None:
    shared = Shared()
    (first,) = shared.add(1)
    (work,) = shared.start()
    assert shared.in_flight.finish([work]) == [first]
    assert shared.in_flight.finish([work]) == []
    later = shared.add(1)
    assert shared.take() == [later]
    assert shared.is_empty()


def test_single_flight_knows_all_that_a_lost_device_held() -> None:
    shared = Shared()
    first, second = shared.add(1, 2, 1), shared.add(2)
    shared.start()
    later, waiting = shared.add(1), shared.add(3)
    assert shared.queue.drop_all() == waiting
    assert sorted(map(id, shared.in_flight.finish_all())) == sorted(map(id, [*first, *second, *later]))
    assert shared.is_empty()


def test_single_flight_lets_a_late_waiter_join_neither_what_is_taken_nor_what_is_computed() -> None:
    clock = HandClock()
    shared = Shared(clock=clock)
    late, in_time = shared.add(1, deadline=101.0), shared.add(1, 1)
    clock.now = 101.0
    (work,) = shared.start()
    assert work.waiters == in_time
    assert late[0].state is WaiterState.DROPPED
    later = shared.add(1, deadline=100.5)
    assert later[0].state is WaiterState.DROPPED
    assert work.waiters == in_time
    assert shared.in_flight.finish([work]) == in_time
    fresh = shared.add(1)
    assert shared.take() == [fresh]
    assert shared.is_empty()


def test_single_flight_drops_a_late_waiter_behind_one_in_time() -> None:
    clock = HandClock()
    shared = Shared(clock=clock, size=1)
    first, late = shared.add(1), shared.add(1, deadline=101.0)
    clock.now = 101.0
    assert shared.take() == [first]
    assert late[0].state is WaiterState.DROPPED
    assert shared.is_empty()
    again = shared.add(1)
    assert shared.take() == [again]


def test_single_flight_drops_a_late_waiter_before_one_in_time() -> None:
    """Its turn comes and takes nothing along: the other has a turn of its own."""
    clock = HandClock()
    shared = Shared(clock=clock, size=1)
    late, other, in_time = shared.add(1, deadline=101.0), shared.add(2), shared.add(1)
    clock.now = 101.0
    assert shared.take() == [other]
    assert late[0].state is WaiterState.DROPPED
    assert in_time[0].state is WaiterState.WAITING
    assert shared.take() == [in_time]


def test_single_flight_goes_on_with_a_work_whose_waiters_were_all_late() -> None:
    clock = HandClock()
    shared = Shared(clock=clock)
    late, other = shared.add(1, deadline=101.0), shared.add(2)
    clock.now = 101.0
    assert shared.take() == [other]
    # The timer that makes the scheduler forget it has not come yet.
    fresh = shared.add(1)
    assert not shared.drop(late[0])
    later = shared.add(1)
    assert shared.take() == [[*fresh, *later]]
    assert shared.is_empty()


@pytest.mark.parametrize("gone", [[0], [1], [0, 1], [1, 2], [0, 3], [0, 1, 2], [3, 2, 1]])
def test_single_flight_goes_on_without_a_waiter_that_is_cancelled(gone: list[int]) -> None:
    shared = Shared()
    waiters = [shared.add(1)[0] for _ in range(4)]
    for index in gone:
        assert shared.drop(waiters[index])
    left = [waiter for index, waiter in enumerate(waiters) if index not in gone]
    assert len(shared.queue) == shared.places.in_use == len(left)
    assert shared.take() == [left]
    assert shared.is_empty()
    later = shared.add(1)
    assert shared.take() == [later]


def test_single_flight_forgets_a_work_whose_waiters_are_all_cancelled() -> None:
    shared = Shared()
    waiters = shared.add(1, 1, 2)
    for waiter in waiters[:2]:
        assert shared.drop(waiter)
    assert len(shared.in_flight) == 1
    later = shared.add(1)
    assert later[0].work is not waiters[0].work
    assert shared.take() == [waiters[2:], later]


def test_single_flight_forgets_no_work_but_the_one_that_it_is_told() -> None:
    """Of two waiters that are gone the second is told of when another Work has come in the place of theirs."""
    shared = Shared()
    gone = shared.add(1, 1)
    for waiter in gone:
        assert shared.queue.drop(waiter)
    shared.in_flight.forget(gone[0].work)
    first = shared.add(1)
    shared.in_flight.forget(gone[1].work)
    second = shared.add(1)
    assert shared.take() == [[*first, *second]]


def test_single_flight_never_knows_of_a_waiter_that_is_dropped_before_it_arrives() -> None:
    shared = Shared()
    waiter = make_waiter(1, content=1)
    assert shared.places.take(1) and shared.drop(waiter)
    shared.submit([waiter])
    assert shared.is_empty()


def test_sweep_forgets_identical_inputs_while_others_have_their_turn() -> None:
    """Their requests wait behind many others, and would keep their pixels in memory."""
    shared = Shared(size=1)
    (first,) = shared.add(1)
    add(shared.queue, *[1] * 5)
    arrays = [weakref.ref(first.work.prepared.token_ids)]
    for _ in range(100):
        (copy,) = shared.add(1)
        arrays.append(weakref.ref(copy.work.prepared.token_ids))
    del copy
    assert len(shared.take()[0]) == 101
    del first
    assert sum(array() is not None for array in arrays) == 0


def test_sweep_forgets_cancelled_copies_of_what_waits_while_the_device_is_busy() -> None:
    shared = Shared()
    (first,) = shared.add(1)
    arrays = []
    for _ in range(100):
        copy = make_waiter(1, content=1)
        arrays.append(weakref.ref(copy.work.prepared.token_ids))
        shared.submit([copy])
        shared.drop(copy)
    assert sum(array() is not None for array in arrays) == 0
    assert sum(map(len, shared.queue._requests)) <= 2
    assert shared.take() == [[first]]


def test_drop_all_returns_identical_inputs_one_by_one() -> None:
    shared = Shared()
    waiters = shared.add(1, 1, 2, 1)
    assert shared.queue.drop_all() == waiters
    assert (len(shared.queue), shared.queue.waiting_tokens, shared.places.in_use) == (0, 0, 0)
    for waiter in waiters:
        shared.in_flight.forget(waiter.work)
    later = shared.add(1)
    assert shared.take() == [later]


def test_race_single_flight_gives_every_waiter_one_end(eager_switches: None) -> None:
    """The loop's thread adds, drops and ends identical inputs that the device's thread takes at that moment."""
    shared = Shared(size=3)
    taken: list[Work] = []

    def take_everything() -> None:
        while batch := shared.queue.next_batch():
            taken.extend(batch.works)

    thread = threading.Thread(target=take_everything)
    thread.start()
    waiters: list[Waiter] = []
    ended: list[Waiter] = []
    for turn in range(400):
        waiters += shared.add(*(turn % 5 + number % 4 for number in range(6)))
        ended += [waiter for waiter in waiters[-12::5] if shared.drop(waiter)]
        while len(taken) > turn % 3:
            ended += shared.in_flight.finish([taken.pop(0)])
    shared.queue.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    ended += shared.in_flight.finish(taken)
    assert sorted(map(id, ended)) == sorted(map(id, waiters))
    assert shared.is_empty()
