"""The batching policy, driven without a device and, but for the tests of its lock, without a thread or a real clock."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.batch_queue import DEFAULT_BATCH_TOKENS, LOOK_AHEAD, BatchQueue
from scheduler.places import Places
from scheduler.work import Batch, Submission, Waiter, WaiterState, Work
from tests.support.queues import HandClock, Shared, add, make_queue, make_waiter, take

# A hang is a failure; a busy machine is none.
PATIENCE_S = 30.0


def waits_of(
    queue: BatchQueue, clock: HandClock, monkeypatch: pytest.MonkeyPatch, *events: Callable[[], object]
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


class Taking:
    """What a thread that takes one batch has done: how it waited, and what it got."""

    def __init__(self) -> None:
        self.waits: list[float | None] = []
        self.got: list[Batch | None] = []
        self._waiting = threading.Event()

    def until_it_waits(self) -> None:
        assert self._waiting.wait(PATIENCE_S)
        self._waiting.clear()


@contextmanager
def taking(queue: BatchQueue, monkeypatch: pytest.MonkeyPatch) -> Iterator[Taking]:
    """Take one batch in a thread, by the queue's own condition."""
    taken = Taking()
    wait = queue._changed.wait

    def observed(timeout: float | None = None) -> bool:
        # The lock is held, and only the wait gives it up: who takes the lock after this finds a thread that waits.
        taken.waits.append(timeout)
        taken._waiting.set()
        return wait(timeout)

    monkeypatch.setattr(queue._changed, "wait", observed)
    thread = threading.Thread(target=lambda: taken.got.append(queue.next_batch()))
    thread.start()
    try:
        yield taken
        thread.join(PATIENCE_S)
    finally:
        queue.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


# Bounds


def test_bounds_a_batch_is_full_by_tokens() -> None:
    queue = make_queue(tokens=100)
    waiters = add(queue, 40, 60, 1)
    assert take(queue) == waiters[:2]
    assert take(queue) == waiters[2:]


def test_bounds_a_batch_is_full_by_items() -> None:
    queue = make_queue(size=3)
    waiters = add(queue, 1, 1, 1, 1)
    assert take(queue) == waiters[:3]
    assert take(queue) == waiters[3:]


def test_bounds_admit_the_first_input_whatever_its_size() -> None:
    queue = make_queue(tokens=100)
    huge, small = add(queue, 1000), add(queue, 1)
    assert take(queue) == huge
    assert take(queue) == small


def test_bounds_let_all_that_waits_go_at_once_in_one_batch() -> None:
    queue = make_queue()
    waiters = [waiter for _ in range(4) for waiter in add(queue, 1)]
    assert take(queue) == waiters


def test_bounds_follow_the_rate_of_a_cpu_unless_they_are_given() -> None:
    for given, expected in ((None, 2500), (300, 300)):
        queue = make_queue(tokens=given)
        assert queue.max_batch_tokens == given or DEFAULT_BATCH_TOKENS
        queue.fit_to_cpu(10_000.0)
        assert queue.max_batch_tokens == expected


def test_backlog_counts_what_waits_and_its_tokens() -> None:
    queue = make_queue(size=2)
    add(queue, 5, 6, 7)
    assert (len(queue), queue.waiting_tokens) == (3, 18)
    take(queue)
    assert (len(queue), queue.waiting_tokens) == (1, 7)
    take(queue)
    assert (len(queue), queue.waiting_tokens) == (0, 0)


# Fairness


def test_fairness_requests_take_turns() -> None:
    queue = make_queue(size=4)
    first, second, third = add(queue, 1, 1, 1), add(queue, 1, 1, 1), add(queue, 1)
    assert take(queue) == [first[0], second[0], third[0], first[1]]
    assert take(queue) == [second[1], first[2], second[2]]


def test_fairness_a_single_input_is_in_the_next_batch_beside_a_request_with_thousands() -> None:
    queue = make_queue(size=16)
    add(queue, *[1] * 2000)
    take(queue)
    single = add(queue, 1)
    assert single[0] in take(queue)


def test_look_ahead_puts_a_request_that_was_passed_over_first_in_the_next_batch() -> None:
    queue = make_queue(tokens=100)
    small, large, other = add(queue, 30, 30), add(queue, 90), add(queue, 20)
    assert take(queue) == [small[0], other[0], small[1]]
    assert take(queue) == large


def test_look_ahead_keeps_the_order_of_several_passed_over() -> None:
    queue = make_queue(tokens=100)
    add(queue, 10)
    large = [add(queue, 95)[0] for _ in range(3)]
    late_comer = add(queue, 5, 5)
    assert len(take(queue)) == 3
    assert [take(queue) for _ in range(3)] == [[waiter] for waiter in large]
    assert late_comer[1].state is WaiterState.TAKEN


def test_look_ahead_lets_a_large_input_wait_for_one_batch_under_a_stream_of_small_ones() -> None:
    queue = make_queue(tokens=100)
    add(queue, *[10] * 5)
    large = add(queue, 100)[0]
    batches = 0
    while large.state is WaiterState.WAITING:
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


# Waiters that leave


def test_drop_frees_the_place_at_once_and_keeps_the_waiter_out_of_every_batch() -> None:
    places = Places(3)
    assert places.take(3)
    queue = make_queue(places=places)
    waiters = add(queue, 5, 6, 7)
    assert queue.drop(waiters[0])
    assert queue.drop(waiters[1])
    assert (len(queue), queue.waiting_tokens, places.in_use) == (1, 7, 1)
    assert take(queue) == [waiters[2]]
    assert places.in_use == 0


def test_drop_happens_once() -> None:
    queue = make_queue()
    waiters = add(queue, 5, 5)
    assert queue.drop(waiters[0])
    assert not queue.drop(waiters[0])
    assert (len(queue), queue.waiting_tokens) == (1, 5)


def test_drop_refuses_a_waiter_that_is_taken() -> None:
    queue = make_queue()
    waiters = add(queue, 5)
    take(queue)
    assert not queue.drop(waiters[0])
    assert waiters[0].state is WaiterState.TAKEN
    assert (len(queue), queue.waiting_tokens) == (0, 0)


def test_drop_of_an_arriving_waiter_keeps_it_from_ever_waiting() -> None:
    places = Places(2)
    assert places.take(2)
    queue = make_queue(places=places)
    waiters = [make_waiter(5), make_waiter(6)]
    assert queue.drop(waiters[0])
    assert not queue.drop(waiters[0])
    assert (len(queue), places.in_use) == (0, 1)
    queue.add(Submission(waiters))
    assert (len(queue), queue.waiting_tokens) == (1, 6)
    assert take(queue) == [waiters[1]]


def test_drop_of_a_whole_request_before_it_arrives_leaves_nothing() -> None:
    queue = make_queue()
    waiter = make_waiter(5)
    queue.drop(waiter)
    queue.add(Submission([waiter]))
    queue.close()
    assert queue.next_batch() is None


def test_drop_all_empties_the_queue() -> None:
    queue = make_queue()
    first, second = add(queue, 1, 2), add(queue, 3)
    queue.drop(first[0])
    assert queue.drop_all() == [first[1], *second]
    assert (len(queue), queue.waiting_tokens) == (0, 0)
    assert queue.drop_all() == []
    queue.close()
    assert queue.next_batch() is None


def test_sweep_forgets_what_is_dropped_while_the_device_is_busy() -> None:
    queue = make_queue()
    add(queue, 1, 1, 1)
    arrays = []
    for _ in range(500):
        waiter = make_waiter(1)
        arrays.append(weakref.ref(waiter.work.prepared.token_ids))
        queue.add(Submission([waiter]))
        queue.drop(waiter)
    del waiter
    assert sum(array() is not None for array in arrays) <= 4
    assert len(take(queue)) == 3


def test_sweep_keeps_the_others_and_their_order() -> None:
    queue = make_queue()
    first, second = add(queue, 1, 1, 1), add(queue, 1, 1, 1)
    for waiter in (first[0], first[1], second[0], second[2]):
        assert queue.drop(waiter)
    assert len(queue) == 2
    assert take(queue) == [first[2], second[1]]


def test_deadline_keeps_a_late_waiter_out_of_every_batch() -> None:
    clock, places = HandClock(), Places(2)
    assert places.take(2)
    queue = make_queue(clock=clock, places=places)
    late, in_time = add(queue, 5, deadline=101.0), add(queue, 5, deadline=101.5)
    clock.now = 101.0
    assert take(queue) == in_time
    assert late[0].state is WaiterState.DROPPED
    assert (len(queue), queue.waiting_tokens, places.in_use) == (0, 0, 0)


def test_deadline_lets_a_request_go_on_after_its_late_inputs() -> None:
    clock = HandClock()
    queue = make_queue(clock=clock, size=1)
    mixed = [make_waiter(1, deadline=101.0), make_waiter(1), make_waiter(1, deadline=101.0), make_waiter(1)]
    queue.add(Submission(mixed))
    clock.now = 102.0
    assert [take(queue), take(queue)] == [[mixed[1]], [mixed[3]]]


def test_deadline_lets_next_batch_go_on_waiting_if_all_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    queue = make_queue(clock=clock)
    add(queue, 1, 1, deadline=101.0)
    clock.now = 102.0
    fresh: list[Waiter] = []
    waits = waits_of(queue, clock, monkeypatch, lambda: fresh.extend(add(queue, 1)))
    assert take(queue) == fresh
    assert waits == [None]


def test_deadline_that_has_passed_on_arrival_keeps_the_waiter_from_waiting() -> None:
    places = Places(2)
    assert places.take(2)
    queue = make_queue(places=places)
    late, in_time = make_waiter(1, deadline=100.0), make_waiter(1, deadline=100.1)
    queue.add(Submission([late, in_time]))
    assert late.state is WaiterState.DROPPED
    assert (len(queue), queue.waiting_tokens, places.in_use) == (1, 1, 1)
    assert take(queue) == [in_time]


# Waiting for more


def test_wait_counts_from_the_oldest_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    queue = make_queue(wait=2.0, clock=clock)
    newer, older = add(queue, 1, enqueued_at=99.9), add(queue, 1, enqueued_at=99.5)
    waits = waits_of(queue, clock, monkeypatch)
    assert take(queue) == [*newer, *older]
    assert waits == [pytest.approx(1.5)]


def test_wait_is_over_for_an_old_input(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    queue = make_queue(wait=2.0, clock=clock)
    old = add(queue, 1, enqueued_at=98.0)
    waits = waits_of(queue, clock, monkeypatch)
    assert take(queue) == old
    assert waits == []


def test_wait_of_zero_gathers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    queue = make_queue(clock=clock)
    waiters = add(queue, 1)
    waits = waits_of(queue, clock, monkeypatch)
    assert take(queue) == waiters
    assert waits == []


@pytest.mark.parametrize("sizes", [[50, 50], [1] * 10])
def test_wait_is_not_for_a_full_batch(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    clock = HandClock()
    queue = make_queue(wait=2.0, clock=clock)
    waiters = add(queue, *sizes)
    waits = waits_of(queue, clock, monkeypatch)
    assert take(queue) == waiters
    assert waits == []


def test_wait_takes_what_comes_during_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    queue = make_queue(wait=2.0, clock=clock)
    waiters = add(queue, 1)

    def another_comes() -> None:
        clock.now += 0.5
        waiters.extend(add(queue, 1, enqueued_at=clock.now))

    waits = waits_of(queue, clock, monkeypatch, another_comes)
    assert take(queue) == waiters
    assert waits == [pytest.approx(2.0), pytest.approx(1.5)]


def test_wait_is_the_next_oldests_if_the_oldest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    queue = make_queue(wait=2.0, clock=clock)
    oldest, next_oldest = add(queue, 1, enqueued_at=99.0), add(queue, 1, 1, enqueued_at=99.5)
    waits = waits_of(queue, clock, monkeypatch, lambda: queue.drop(oldest[0]))
    assert take(queue) == next_oldest
    assert waits == [pytest.approx(1.0), pytest.approx(1.5)]


def test_wait_is_for_new_work_if_everything_is_dropped_during_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock()
    queue = make_queue(wait=2.0, clock=clock)
    dropped, fresh = add(queue, 1), list[Waiter]()
    events = [lambda: queue.drop(dropped[0]), lambda: fresh.extend(add(queue, 1))]
    waits = waits_of(queue, clock, monkeypatch, *events)
    assert take(queue) == fresh
    assert waits == [pytest.approx(2.0), None, pytest.approx(2.0)]


def test_wait_is_on_the_monotonic_clock_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = BatchQueue(Places(1), max_batch_tokens=100, max_batch_size=10, max_batch_wait=3600.0)
    with taking(queue, monkeypatch) as taken:
        taken.until_it_waits()
        add(queue, 1, enqueued_at=time.monotonic())
        taken.until_it_waits()
        queue.close()
    first, second = taken.waits
    assert first is None and second is not None and 3600 - PATIENCE_S < second <= 3600


def test_wait_gives_an_idle_device_the_first_input_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = make_queue()
    with taking(queue, monkeypatch) as taken:
        taken.until_it_waits()
        waiters = add(queue, 1)
    (batch,) = taken.got
    assert batch is not None and [work.waiters for work in batch.works] == [waiters]
    assert taken.waits == [None]


@pytest.mark.parametrize("cut_short", ["full", "closed"])
def test_wait_ends_if_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch, cut_short: str) -> None:
    queue = make_queue(wait=3600.0)
    with taking(queue, monkeypatch) as taken:
        taken.until_it_waits()
        add(queue, 1)
        taken.until_it_waits()
        assert not taken.got
        if cut_short == "full":
            add(queue, *[1] * 9)
        else:
            queue.close()
    (batch,) = taken.got
    assert batch is not None and len(batch.works) == (10 if cut_short == "full" else 1)
    assert taken.waits == [None, 3600.0]


# The end


def test_close_hands_out_what_waits_and_then_none() -> None:
    queue = make_queue(size=2, wait=60.0)
    waiters = add(queue, 1, 1, 1)
    queue.close()
    assert take(queue) == waiters[:2]
    assert take(queue) == waiters[2:]
    assert queue.next_batch() is None
    assert queue.next_batch() is None


def test_close_wakes_a_device_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = make_queue()
    with taking(queue, monkeypatch) as taken:
        taken.until_it_waits()
        queue.close()
    assert taken.got == [None]


# In general


def test_race_a_waiter_is_dropped_or_taken_and_never_both(eager_switches: None) -> None:
    """The loop's thread drops what the device's thread takes at that moment: both go by the turns."""
    places = Places(1000)
    assert places.take(1000)
    queue = make_queue(tokens=1000, size=3, places=places)
    requests = [add(queue, *[1] * 10) for _ in range(100)]
    waiters = [waiter for turn in zip(*requests, strict=True) for waiter in turn]
    taken: list[Waiter] = []

    def take_everything() -> None:
        while batch := queue.next_batch():
            taken.extend(waiter for work in batch.works for waiter in work.waiters)

    thread = threading.Thread(target=take_everything)
    thread.start()
    while not taken:
        time.sleep(0)
    dropped = [waiter for waiter in waiters if queue.drop(waiter)]
    queue.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert sorted(map(id, [*dropped, *taken])) == sorted(map(id, waiters))
    assert (len(queue), queue.waiting_tokens, places.in_use) == (0, 0, 0)


class QueueMachine(RuleBasedStateMachine):
    """Whatever is added, dropped and taken: the queue agrees with plain lists of what waits, walked as the policy says."""

    @initialize(tokens=st.integers(1, 60), size=st.integers(1, 8))
    def start(self, tokens: int, size: int) -> None:
        self.clock = HandClock()
        self.shared = Shared(tokens=tokens, size=size, clock=self.clock)
        self.queue = self.shared.queue
        # In the order of their turns.
        self.requests: list[list[Waiter]] = []
        self.running: dict[bytes, Work] = {}
        self.held: list[Waiter] = []
        self.attached: list[Waiter] = []
        self.came_out: list[Waiter] = []

    @property
    def waiting(self) -> list[Waiter]:
        return [waiter for request in self.requests for waiter in request]

    def in_time(self, waiters: list[Waiter]) -> list[Waiter]:
        return [waiter for waiter in waiters if waiter.deadline > self.clock.now]

    def forget(self, gone: list[Waiter]) -> None:
        """Take waiters out of the lists."""
        ids = set(map(id, gone))
        self.requests = [[waiter for waiter in request if id(waiter) not in ids] for request in self.requests]

    @rule(
        # Half of the inputs are identical to others: those of one of three contents, which give their size too.
        sizes=st.lists(
            st.tuples(
                st.integers(1, 50), st.sampled_from([0.0, 0.5, 2.0, inf, inf]), st.sampled_from([None, None, None, 0, 1, 2])
            ),
            min_size=1,
            max_size=12,
        ),
        gone=st.sets(st.integers(0, 11)),
    )
    def add(self, sizes: list[tuple[int, float, int | None]], gone: set[int]) -> None:
        now = self.clock.now
        waiters = [
            make_waiter(size if content is None else 7 * content + 1, content=content, enqueued_at=now, deadline=now + left)
            for size, left, content in sizes
        ]
        dropped = {index for index in gone if index < len(waiters) and index % 3 == 0}
        assert self.shared.places.take(len(dropped))
        for index in dropped:
            assert self.shared.drop(waiters[index])
        self.shared.submit(waiters)
        arrived = self.in_time([waiter for index, waiter in enumerate(waiters) if index not in dropped])
        for waiter in waiters:
            if waiter.deadline <= now:
                assert waiter.state is WaiterState.DROPPED
                self.shared.in_flight.forget(waiter.work)
        attached = [waiter for waiter in arrived if waiter.work.content_hash in self.running]
        for waiter in attached:
            assert waiter.work is self.running[waiter.work.content_hash]
            assert any(waiter is other for other in waiter.work.waiters)
        self.attached += attached
        self.held += attached
        self.came_out += attached
        self.requests.append([waiter for waiter in arrived if waiter.work.content_hash not in self.running])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.waiting), min_size=1, max_size=20, unique_by=id))
        for waiter in chosen:
            assert self.shared.drop(waiter)
        self.forget(chosen)

    @precondition(lambda self: self.came_out)
    @rule(data=st.data())
    def drop_too_late(self, data: st.DataObject) -> None:
        assert not self.shared.drop(data.draw(st.sampled_from(self.came_out)))

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.in_time(self.waiting))
    @rule()
    def take(self) -> None:
        self.finish()
        self.check(self.shared.start())

    @rule()
    def finish(self) -> None:
        ended = self.shared.in_flight.finish(self.running.values())
        assert sorted(map(id, ended)) == sorted(map(id, self.held))
        self.running, self.held, self.attached = {}, [], []

    def walk(self) -> list[Work]:
        """Return the works that the next batch should have, and leave the requests in the order of their next turns."""
        works: list[Work] = []
        turns, passed_over = self.requests, list[list[Waiter]]()
        while turns and len(works) < self.queue.max_batch_size and len(passed_over) < LOOK_AHEAD:
            request = [waiter for waiter in turns.pop(0) if waiter.work not in works]
            if not request:
                continue
            head, *rest = request
            if works and sum(work.num_tokens for work in works) + head.work.num_tokens > self.queue.max_batch_tokens:
                passed_over.append(request)
                continue
            if self.in_time([head]):
                works.append(head.work)
            turns.append(rest)
        self.requests = passed_over + turns
        return works

    def check(self, works: list[Work]) -> None:
        queue, waiting = self.queue, self.waiting
        assert works == self.walk(), "not the works whose turn it was"
        taken = [waiter for work in works for waiter in work.waiters]
        assert works and self.in_time(taken) == taken
        assert len(works) <= queue.max_batch_size
        tokens = sum(work.num_tokens for work in works)
        assert tokens <= queue.max_batch_tokens or len(works) == 1
        ids = set(map(id, taken))
        assert len(ids) == len(taken)
        assert ids <= set(map(id, waiting))
        hashes = {work.content_hash for work in works}
        assert len(hashes) == len(works), "computed twice"
        for waiter in self.in_time(waiting):
            assert (waiter.work.content_hash in hashes) == (id(waiter) in ids), "an identical one left behind"
        late = [waiter for waiter in waiting if waiter.state is WaiterState.DROPPED]
        assert not self.in_time(late)
        for waiter in late:
            self.shared.in_flight.forget(waiter.work)
        self.forget([*taken, *late])
        self.running = {work.content_hash: work for work in works}
        self.held = taken
        self.came_out += taken
        heads = [request[0] for request in self.requests if request]
        if len(works) < queue.max_batch_size and len(heads) < LOOK_AHEAD:
            fits = [head for head in heads if tokens + head.work.num_tokens <= queue.max_batch_tokens]
            assert not fits, "what fits in was left behind"

    @rule()
    def drop_all(self) -> None:
        dropped = self.queue.drop_all()
        assert sorted(map(id, dropped)) == sorted(map(id, self.waiting))
        for waiter in dropped:
            self.shared.in_flight.forget(waiter.work)
        self.forget(dropped)

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "queue"):
            assert len(self.queue) == len(self.waiting)
            assert self.queue.waiting_tokens == sum(waiter.work.num_tokens for waiter in self.waiting)
            assert self.shared.places.in_use == len(self.waiting) + len(self.attached)
            in_flight = {waiter.work.content_hash for waiter in self.waiting} | self.running.keys()
            assert len(self.shared.in_flight) == len(in_flight)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.queue.close()
        self.finish()
        while batch := self.queue.next_batch():
            self.check(batch.works)
            self.finish()
        assert not self.in_time(self.waiting), "a waiter never came out"
        assert (len(self.queue), self.queue.waiting_tokens) == (0, 0)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
