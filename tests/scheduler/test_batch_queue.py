"""The batching policy, driven without a device and, but for three tests, without a thread or a real clock."""

from __future__ import annotations

import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from models.base import PreparedInput
from scheduler.batch_queue import LOOK_AHEAD, BatchQueue
from scheduler.entry import Batch, Entry, EntryState, Submission

# A hang is a failure; a busy machine is none.
PATIENCE_S = 30.0


class Clock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_queue(tokens: int = 100, size: int = 10, wait: float = 0.0, clock: Callable[[], float] | None = None) -> BatchQueue:
    return BatchQueue(max_batch_tokens=tokens, max_batch_size=size, max_batch_wait=wait, clock=clock or Clock())


CONTENTS = itertools.count()


def make_entry(num_tokens: int, *, content: int | None = None, enqueued_at: float = 100.0, deadline: float = inf) -> Entry:
    """An entry unlike all others, or like those with the same content."""
    no_future: Any = None
    token_ids = np.full(num_tokens, next(CONTENTS) if content is None else -1 - content, dtype=np.int64)
    return Entry(PreparedInput(token_ids), no_future, enqueued_at, deadline)


def add(queue: BatchQueue, *sizes: int, **times: float) -> list[Entry]:
    """One request, with an entry of each size in tokens."""
    entries = [make_entry(size, **times) for size in sizes]
    queue.add(Submission(entries))
    return entries


def add_alike(queue: BatchQueue, *contents: int, **times: float) -> list[Entry]:
    """One request of one-token entries: alike where their contents are."""
    entries = [make_entry(1, content=content, **times) for content in contents]
    queue.add(Submission(entries))
    return entries


def start(queue: BatchQueue) -> list[Entry]:
    """Take a batch, which is not finished: what is added may join it."""
    batch = queue.next_batch()
    assert batch is not None
    assert batch.num_tokens == sum(entry.num_tokens for entry in batch.entries)
    taken = [entry for leader in batch.entries for entry in (leader, *leader.twins)]
    assert all(entry.state is EntryState.TAKEN for entry in taken)
    return batch.entries


def take(queue: BatchQueue) -> list[Entry]:
    """Take a batch, and be done with it."""
    entries = start(queue)
    queue.finish()
    return entries


def waits_of(
    queue: BatchQueue, clock: Clock, monkeypatch: pytest.MonkeyPatch, *events: Callable[[], object]
) -> list[float | None]:
    """The waits that `next_batch` asks for from here on: each lets its time pass at once, or, first, an event cut it short."""
    waits: list[float | None] = []
    happening = iter(events)

    def wait(timeout: float | None = None) -> bool:
        waits.append(timeout)
        event = next(happening, None)
        if event:
            event()
            return True
        assert timeout is not None, "next_batch waits for work that never comes"
        clock.now += timeout
        return False

    monkeypatch.setattr(queue._changed, "wait", wait)
    return waits


@contextmanager
def taking(queue: BatchQueue) -> Iterator[list[tuple[Batch | None, float]]]:
    """A thread that takes one batch; the list gets the batch, and when it came."""
    got: list[tuple[Batch | None, float]] = []
    thread = threading.Thread(target=lambda: got.append((queue.next_batch(), time.monotonic())))
    thread.start()
    try:
        yield got
        thread.join(PATIENCE_S)
    finally:
        queue.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


# Bounds


def test_a_batch_is_full_by_tokens() -> None:
    queue = make_queue(tokens=100)
    entries = add(queue, 40, 60, 1)
    assert take(queue) == entries[:2]
    assert take(queue) == entries[2:]


def test_a_batch_is_full_by_items() -> None:
    queue = make_queue(size=3)
    entries = add(queue, 1, 1, 1, 1)
    assert take(queue) == entries[:3]
    assert take(queue) == entries[3:]


def test_the_first_entry_is_admitted_whatever_its_size() -> None:
    queue = make_queue(tokens=100)
    huge, small = add(queue, 1000), add(queue, 1)
    assert take(queue) == huge
    assert take(queue) == small


def test_what_waits_goes_at_once_in_one_batch() -> None:
    queue = make_queue()
    entries = [entry for _ in range(4) for entry in add(queue, 1)]
    assert take(queue) == entries


def test_len_and_tokens_count_what_waits() -> None:
    queue = make_queue(size=2)
    add(queue, 5, 6, 7)
    assert (len(queue), queue.waiting_tokens) == (3, 18)
    take(queue)
    assert (len(queue), queue.waiting_tokens) == (1, 7)
    take(queue)
    assert (len(queue), queue.waiting_tokens) == (0, 0)


# Fairness


def test_requests_take_turns() -> None:
    queue = make_queue(size=4)
    first, second, third = add(queue, 1, 1, 1), add(queue, 1, 1, 1), add(queue, 1)
    assert take(queue) == [first[0], second[0], third[0], first[1]]
    assert take(queue) == [second[1], first[2], second[2]]


def test_a_single_input_is_in_the_next_batch_beside_a_request_with_thousands() -> None:
    queue = make_queue(size=16)
    add(queue, *[1] * 2000)
    take(queue)
    single = add(queue, 1)
    assert single[0] in take(queue)


def test_a_request_that_was_passed_over_is_first_in_the_next_batch() -> None:
    queue = make_queue(tokens=100)
    small, large, other = add(queue, 30, 30), add(queue, 90), add(queue, 20)
    assert take(queue) == [small[0], other[0], small[1]]
    assert take(queue) == large


def test_several_passed_over_keep_their_order() -> None:
    queue = make_queue(tokens=100)
    add(queue, 10)
    large = [add(queue, 95)[0] for _ in range(3)]
    late_comer = add(queue, 5, 5)
    assert len(take(queue)) == 3
    assert [take(queue) for _ in range(3)] == [[entry] for entry in large]
    assert late_comer[1].state is EntryState.TAKEN


def test_a_large_entry_waits_for_one_batch_at_most_under_a_stream_of_small_ones() -> None:
    queue = make_queue(tokens=100)
    add(queue, *[10] * 5)
    large = add(queue, 100)[0]
    batches = 0
    while large.state is EntryState.WAITING:
        add(queue, *[10] * 20)
        take(queue)
        batches += 1
    assert batches == 2


def test_look_ahead_bounds_the_requests_that_are_passed_over() -> None:
    for large, admitted in [(LOOK_AHEAD - 1, True), (LOOK_AHEAD, False)]:
        queue = make_queue(tokens=100, size=1000)
        add(queue, 50)
        for _ in range(large):
            add(queue, 60)
        small = add(queue, 50)
        assert (small[0] in take(queue)) is admitted


# Entries that are gone


def test_a_dropped_entry_gives_its_place_back_at_once_and_is_in_no_batch() -> None:
    queue = make_queue()
    entries = add(queue, 5, 6, 7)
    assert queue.drop(entries[0])
    assert queue.drop(entries[1])
    assert (len(queue), queue.waiting_tokens) == (1, 7)
    assert take(queue) == [entries[2]]


def test_an_entry_is_dropped_once() -> None:
    queue = make_queue()
    entries = add(queue, 5, 5)
    assert queue.drop(entries[0])
    assert not queue.drop(entries[0])
    assert (len(queue), queue.waiting_tokens) == (1, 5)


def test_a_taken_entry_cannot_be_dropped() -> None:
    queue = make_queue()
    entries = add(queue, 5)
    take(queue)
    assert not queue.drop(entries[0])
    assert entries[0].state is EntryState.TAKEN
    assert (len(queue), queue.waiting_tokens) == (0, 0)


def test_an_entry_dropped_while_arriving_never_waits() -> None:
    queue = make_queue()
    entries = [make_entry(5), make_entry(6)]
    assert queue.drop(entries[0])
    assert len(queue) == 0
    queue.add(Submission(entries))
    assert (len(queue), queue.waiting_tokens) == (1, 6)
    assert take(queue) == [entries[1]]


def test_a_request_whose_entries_are_all_gone_before_they_arrive_is_nothing() -> None:
    queue = make_queue()
    entry = make_entry(5)
    queue.drop(entry)
    queue.add(Submission([entry]))
    queue.close()
    assert queue.next_batch() is None


def test_dropped_entries_are_forgotten_while_the_device_is_busy() -> None:
    queue = make_queue()
    add(queue, 1, 1, 1)
    arrays = []
    for _ in range(500):
        entry = make_entry(1)
        arrays.append(weakref.ref(entry.prepared.token_ids))
        queue.add(Submission([entry]))
        queue.drop(entry)
    del entry
    assert sum(array() is not None for array in arrays) <= 4
    assert len(take(queue)) == 3


def test_forgetting_keeps_the_others_and_their_order() -> None:
    queue = make_queue()
    first, second = add(queue, 1, 1, 1), add(queue, 1, 1, 1)
    for entry in (first[0], first[1], second[0], second[2]):
        assert queue.drop(entry)
    assert len(queue) == 2
    assert take(queue) == [first[2], second[1]]


def test_a_late_entry_is_in_no_batch() -> None:
    clock = Clock()
    queue = make_queue(clock=clock)
    late, in_time = add(queue, 5, deadline=101.0), add(queue, 5, deadline=101.5)
    clock.now = 101.0
    assert take(queue) == in_time
    assert late[0].state is EntryState.DROPPED
    assert (len(queue), queue.waiting_tokens) == (0, 0)


def test_a_request_goes_on_after_its_late_entries() -> None:
    clock = Clock()
    queue = make_queue(clock=clock, size=1)
    mixed = [make_entry(1, deadline=101.0), make_entry(1), make_entry(1, deadline=101.0), make_entry(1)]
    queue.add(Submission(mixed))
    clock.now = 102.0
    assert [take(queue), take(queue)] == [[mixed[1]], [mixed[3]]]


def test_next_batch_goes_on_waiting_where_all_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    queue = make_queue(clock=clock)
    add(queue, 1, 1, deadline=101.0)
    clock.now = 102.0
    fresh: list[Entry] = []
    waits = waits_of(queue, clock, monkeypatch, lambda: fresh.extend(add(queue, 1)))
    assert take(queue) == fresh
    assert waits == [None]


def test_take_all_empties_the_queue() -> None:
    queue = make_queue()
    first, second = add(queue, 1, 2), add(queue, 3)
    queue.drop(first[0])
    assert queue.take_all() == [first[1], *second]
    assert (len(queue), queue.waiting_tokens) == (0, 0)
    assert queue.take_all() == []
    queue.close()
    assert queue.next_batch() is None


# Entries that are alike


def test_what_is_alike_is_taken_with_the_first_and_counts_once() -> None:
    queue = make_queue(tokens=3, size=3)
    first, second = add_alike(queue, 1, 2, 1, 1), add_alike(queue, 1, 3)
    assert take(queue) == [first[0], second[1], first[1]]
    assert first[0].twins == [first[2], first[3], second[0]]
    assert not first[1].twins and not second[1].twins
    assert (len(queue), queue.waiting_tokens) == (0, 0)


def test_whichever_is_taken_first_takes_the_others_along() -> None:
    """A bulk request's copy of another's only input never holds that one up, nor does it wait for its own turn."""
    queue = make_queue(size=2)
    bulk, single = add_alike(queue, 10, 11, 12, 13, 1), add_alike(queue, 1)
    assert take(queue) == [bulk[0], single[0]]
    assert single[0].twins == [bulk[4]]
    assert take(queue) == bulk[1:3]
    other = add_alike(queue, 13, 14)
    assert take(queue) == [bulk[3], other[1]]
    assert bulk[3].twins == [other[0]]


def test_no_two_entries_of_a_batch_are_alike() -> None:
    queue = make_queue(size=256, tokens=10_000)
    add_alike(queue, *[number % 7 for number in range(200)])
    batch = take(queue)
    assert sorted(len(entry.twins) for entry in batch) == [27] * 3 + [28] * 4


def test_what_comes_while_its_like_is_computed_joins_it() -> None:
    queue = make_queue(size=1)
    (leader,) = add_alike(queue, 1)
    assert start(queue) == [leader]
    joined, waiting = add_alike(queue, 1, 2), add_alike(queue, 3)
    assert leader.twins == joined[:1]
    assert [entry.state for entry in joined] == [EntryState.TAKEN, EntryState.WAITING]
    assert (len(queue), queue.waiting_tokens) == (2, 2)
    assert not queue.drop(joined[0])
    assert queue.finish() == [leader, joined[0]]
    assert take(queue) == joined[1:]
    assert take(queue) == waiting


def test_what_comes_after_the_end_waits() -> None:
    queue = make_queue()
    (leader,) = add_alike(queue, 1)
    start(queue)
    assert queue.finish() == [leader]
    assert queue.finish() == []
    later = add_alike(queue, 1)
    assert take(queue) == later
    assert not leader.twins


def test_what_a_device_held_is_told_with_its_twins() -> None:
    queue = make_queue()
    first, second = add_alike(queue, 1, 2, 1), add_alike(queue, 2)
    start(queue)
    late = add_alike(queue, 1)
    assert sorted(map(id, queue.finish())) == sorted(map(id, [*first, *second, *late]))


def test_a_late_one_joins_neither_what_is_taken_nor_what_is_computed() -> None:
    clock = Clock()
    queue = make_queue(clock=clock)
    late, in_time = add_alike(queue, 1, deadline=101.0), add_alike(queue, 1, 1)
    clock.now = 101.0
    assert start(queue) == in_time[:1]
    assert in_time[0].twins == in_time[1:]
    assert late[0].state is EntryState.DROPPED
    later = add_alike(queue, 1, deadline=100.5)
    assert later[0].state is EntryState.WAITING
    assert in_time[0].twins == in_time[1:]
    queue.finish()
    fresh = add_alike(queue, 1)
    assert take(queue) == fresh
    assert not fresh[0].twins


def test_a_late_one_behind_its_like_is_left_for_its_timer() -> None:
    clock = Clock()
    queue = make_queue(clock=clock, size=1)
    leader, late = add_alike(queue, 1), add_alike(queue, 1, deadline=101.0)
    clock.now = 101.0
    assert take(queue) == leader
    assert not leader[0].twins
    assert late[0].state is EntryState.WAITING
    again = add_alike(queue, 1)
    assert take(queue) == again
    assert not again[0].twins
    assert (len(queue), queue.waiting_tokens) == (0, 0)


@pytest.mark.parametrize("gone", [[0], [1], [0, 1], [1, 2], [0, 3], [0, 1, 2], [3, 2, 1]])
def test_a_cancelled_one_is_no_twin_and_the_others_still_are(gone: list[int]) -> None:
    queue = make_queue()
    entries = [add_alike(queue, 1)[0] for _ in range(4)]
    for index in gone:
        assert queue.drop(entries[index])
    left = [entry for index, entry in enumerate(entries) if index not in gone]
    assert len(queue) == len(left)
    assert take(queue) == left[:1]
    assert sorted(map(id, left[0].twins)) == sorted(map(id, left[1:]))
    assert len(queue) == 0
    later = add_alike(queue, 1)
    assert take(queue) == later
    assert not later[0].twins


def test_twins_are_forgotten_while_others_have_their_turn() -> None:
    """Their requests wait behind many others, and would keep their pixels alive."""
    queue = make_queue(size=1)
    (leader,) = add_alike(queue, 1)
    add(queue, *[1] * 5)
    arrays = []
    for _ in range(100):
        (twin,) = add_alike(queue, 1)
        arrays.append(weakref.ref(twin.prepared.token_ids))
    del twin
    assert take(queue) == [leader]
    leader.twins.clear()
    assert sum(array() is not None for array in arrays) == 0


def test_cancelled_copies_of_what_waits_are_forgotten_while_the_device_is_busy() -> None:
    queue = make_queue()
    (first,) = add_alike(queue, 1)
    arrays = []
    for _ in range(100):
        (copy,) = add_alike(queue, 1)
        arrays.append(weakref.ref(copy.prepared.token_ids))
        queue.drop(copy)
    del copy
    assert sum(array() is not None for array in arrays) <= 2
    assert take(queue) == [first]
    assert not first.twins


def test_take_all_takes_what_is_alike_one_by_one() -> None:
    queue = make_queue()
    entries = add_alike(queue, 1, 1, 2, 1)
    assert queue.take_all() == entries
    assert (len(queue), queue.waiting_tokens) == (0, 0)
    later = add_alike(queue, 1)
    assert take(queue) == later
    assert not later[0].twins


# Waiting for more


def test_the_wait_counts_from_the_oldest_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    queue = make_queue(wait=2.0, clock=clock)
    newer, older = add(queue, 1, enqueued_at=99.9), add(queue, 1, enqueued_at=99.5)
    waits = waits_of(queue, clock, monkeypatch)
    assert take(queue) == [*newer, *older]
    assert waits == [pytest.approx(1.5)]


def test_an_old_entry_does_not_wait_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    queue = make_queue(wait=2.0, clock=clock)
    old = add(queue, 1, enqueued_at=98.0)
    waits = waits_of(queue, clock, monkeypatch)
    assert take(queue) == old
    assert waits == []


def test_without_a_wait_nothing_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    queue = make_queue(clock=clock)
    entries = add(queue, 1)
    waits = waits_of(queue, clock, monkeypatch)
    assert take(queue) == entries
    assert waits == []


@pytest.mark.parametrize("sizes", [[50, 50], [1] * 10])
def test_a_full_batch_does_not_wait(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    clock = Clock()
    queue = make_queue(wait=2.0, clock=clock)
    entries = add(queue, *sizes)
    waits = waits_of(queue, clock, monkeypatch)
    assert take(queue) == entries
    assert waits == []


def test_what_comes_during_the_wait_goes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    queue = make_queue(wait=2.0, clock=clock)
    entries = add(queue, 1)

    def another_comes() -> None:
        clock.now += 0.5
        entries.extend(add(queue, 1, enqueued_at=clock.now))

    waits = waits_of(queue, clock, monkeypatch, another_comes)
    assert take(queue) == entries
    assert waits == [pytest.approx(2.0), pytest.approx(1.5)]


def test_the_wait_is_the_next_oldests_where_the_oldest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    queue = make_queue(wait=2.0, clock=clock)
    oldest, next_oldest = add(queue, 1, enqueued_at=99.0), add(queue, 1, 1, enqueued_at=99.5)
    waits = waits_of(queue, clock, monkeypatch, lambda: queue.drop(oldest[0]))
    assert take(queue) == next_oldest
    assert waits == [pytest.approx(1.0), pytest.approx(1.5)]


def test_waits_for_work_where_everything_is_dropped_during_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    queue = make_queue(wait=2.0, clock=clock)
    dropped, fresh = add(queue, 1), list[Entry]()
    events = [lambda: queue.drop(dropped[0]), lambda: fresh.extend(add(queue, 1))]
    waits = waits_of(queue, clock, monkeypatch, *events)
    assert take(queue) == fresh
    assert waits == [pytest.approx(2.0), None, pytest.approx(2.0)]


def test_an_idle_device_gets_the_first_entry_at_once() -> None:
    queue = make_queue(clock=time.monotonic)
    with taking(queue) as got:
        time.sleep(0.05)
        assert not got
        added_at = time.monotonic()
        entries = add(queue, 1)
    batch, came_at = got[0]
    assert batch is not None and batch.entries == entries
    assert came_at - added_at < 10


def test_gathers_for_the_wait_on_a_real_clock() -> None:
    queue = make_queue(wait=1.0, clock=time.monotonic)
    with taking(queue) as got:
        added_at = time.monotonic()
        add(queue, 1, enqueued_at=added_at)
        time.sleep(0.05)
        add(queue, 1, enqueued_at=time.monotonic())
    batch, came_at = got[0]
    assert batch is not None and len(batch.entries) == 2
    assert 1.0 <= came_at - added_at < 10


@pytest.mark.parametrize("cut_short", ["full", "closed"])
def test_a_wait_ends_where_there_is_nothing_to_wait_for(cut_short: str) -> None:
    queue = make_queue(wait=60.0, clock=time.monotonic)
    with taking(queue) as got:
        now = time.monotonic()
        add(queue, 1, enqueued_at=now)
        time.sleep(0.05)
        assert not got
        if cut_short == "full":
            add(queue, *[1] * 9, enqueued_at=now)
        else:
            queue.close()
    batch, came_at = got[0]
    assert batch is not None and len(batch.entries) == (10 if cut_short == "full" else 1)
    assert came_at - now < 10


# The end


def test_close_hands_out_what_waits_and_then_none() -> None:
    queue = make_queue(size=2, wait=60.0)
    entries = add(queue, 1, 1, 1)
    queue.close()
    assert take(queue) == entries[:2]
    assert take(queue) == entries[2:]
    assert queue.next_batch() is None
    assert queue.next_batch() is None


def test_close_wakes_a_device_that_waits() -> None:
    queue = make_queue()
    with taking(queue) as got:
        time.sleep(0.05)
        queue.close()
    assert got[0][0] is None


# In general


def test_an_entry_is_dropped_or_taken_never_both() -> None:
    """The loop's thread drops what the device's thread takes at that moment, switched at nearly every instruction."""
    queue = make_queue(tokens=1000, size=3)
    entries = [entry for _ in range(100) for entry in add(queue, *[1] * 10)]
    taken: list[Entry] = []

    def take_everything() -> None:
        while batch := queue.next_batch():
            taken.extend(batch.entries)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=take_everything)
        thread.start()
        while not taken:
            time.sleep(0)
        dropped = [entry for entry in entries if queue.drop(entry)]
        queue.close()
        thread.join(PATIENCE_S)
    finally:
        sys.setswitchinterval(interval)
    assert not thread.is_alive()
    assert sorted(map(id, [*dropped, *taken])) == sorted(map(id, entries))
    assert (len(queue), queue.waiting_tokens) == (0, 0)


class QueueMachine(RuleBasedStateMachine):
    """Whatever is added, dropped and taken: the queue agrees with a plain list of what waits."""

    @initialize(tokens=st.integers(1, 60), size=st.integers(1, 8))
    def start(self, tokens: int, size: int) -> None:
        self.clock = Clock()
        self.queue = make_queue(tokens=tokens, size=size, clock=self.clock)
        self.requests: list[list[Entry]] = []
        self.running: list[Entry] = []
        self.came_out: list[Entry] = []

    @property
    def waiting(self) -> list[Entry]:
        return [entry for request in self.requests for entry in request]

    def in_time(self, entries: list[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.deadline > self.clock.now]

    def forget(self, gone: list[Entry]) -> None:
        """Take entries out of the list."""
        ids = set(map(id, gone))
        self.requests = [[entry for entry in request if id(entry) not in ids] for request in self.requests]

    @rule(
        # Half of the entries are like others: those of one of three contents, which give their size too.
        sizes=st.lists(
            st.tuples(st.integers(1, 50), st.sampled_from([0.5, 2.0, inf]), st.sampled_from([None, None, None, 0, 1, 2])),
            min_size=1,
            max_size=12,
        ),
        gone=st.sets(st.integers(0, 11)),
    )
    def add(self, sizes: list[tuple[int, float, int | None]], gone: set[int]) -> None:
        now = self.clock.now
        entries = [
            make_entry(size if content is None else 7 * content + 1, content=content, enqueued_at=now, deadline=now + left)
            for size, left, content in sizes
        ]
        dropped = {index for index in gone if index < len(entries) and index % 3 == 0}
        for index in dropped:
            assert self.queue.drop(entries[index])
        self.queue.add(Submission(entries))
        arrived = [entry for index, entry in enumerate(entries) if index not in dropped]
        leaders = {leader.prepared.content_hash: leader for leader in self.running}
        joined = [entry for entry in arrived if entry.prepared.content_hash in leaders]
        for entry in joined:
            assert any(entry is twin for twin in leaders[entry.prepared.content_hash].twins)
        self.came_out.extend(joined)
        self.requests.append([entry for entry in arrived if entry.prepared.content_hash not in leaders])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.waiting), min_size=1, max_size=20, unique_by=id))
        for entry in chosen:
            assert self.queue.drop(entry)
        self.forget(chosen)

    @precondition(lambda self: self.came_out)
    @rule(data=st.data())
    def drop_too_late(self, data: st.DataObject) -> None:
        assert not self.queue.drop(data.draw(st.sampled_from(self.came_out)))

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.in_time(self.waiting))
    @rule()
    def take(self) -> None:
        self.finish()
        self.running = start(self.queue)
        self.check(self.running)

    @rule()
    def finish(self) -> None:
        held = [entry for leader in self.running for entry in (leader, *leader.twins)]
        assert sorted(map(id, self.queue.finish())) == sorted(map(id, held))
        self.running = []

    def check(self, batch: list[Entry]) -> None:
        queue = self.queue
        twins = [twin for entry in batch for twin in entry.twins]
        taken = [*batch, *twins]
        assert batch and self.in_time(taken) == taken
        assert len(batch) <= queue.max_batch_size
        tokens = sum(entry.num_tokens for entry in batch)
        assert tokens <= queue.max_batch_tokens or len(batch) == 1
        ids = set(map(id, taken))
        assert len(ids) == len(taken)
        assert ids <= set(map(id, self.waiting))
        alike = {entry.prepared.content_hash for entry in batch}
        assert len(alike) == len(batch), "computed twice"
        for entry in self.in_time(self.waiting):
            assert (entry.prepared.content_hash in alike) == (id(entry) in ids), "a twin left behind"
        twin_ids = set(map(id, twins))
        for request in self.requests:
            alive = [entry for entry in self.in_time(request) if id(entry) not in twin_ids]
            mine = [entry for entry in batch if any(entry is other for other in request)]
            assert [id(entry) for entry in mine] == [id(entry) for entry in alive[: len(mine)]], "out of order"
        late = [entry for entry in self.waiting if entry.state is EntryState.DROPPED]
        assert not self.in_time(late)
        self.came_out.extend(taken)
        self.forget([*taken, *late])
        heads = [request[0] for request in self.requests if request]
        if len(batch) < queue.max_batch_size and len(heads) < LOOK_AHEAD:
            assert all(tokens + head.num_tokens > queue.max_batch_tokens for head in heads), "what fits in was left behind"

    @rule()
    def take_all(self) -> None:
        assert sorted(map(id, self.queue.take_all())) == sorted(map(id, self.waiting))
        self.forget(self.waiting)

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "queue"):
            assert len(self.queue) == len(self.waiting)
            assert self.queue.waiting_tokens == sum(entry.num_tokens for entry in self.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.queue.close()
        while batch := self.queue.next_batch():
            self.check(batch.entries)
            self.queue.finish()
        assert not self.in_time(self.waiting), "an entry never came out"
        assert (len(self.queue), self.queue.waiting_tokens) == (0, 0)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
