"""The scheduler: places, deadlines, cancelling, stopping and dying. Every path ends with all places given back."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.base import EmbeddingInput, EmbeddingModel, ModelInfo, PreparedInput
from scheduler import device_worker
from scheduler import scheduler as scheduler_module
from scheduler.errors import BatchFailed, DeadlineExceeded, Draining, NotReady, Overloaded, WorkerDied
from scheduler.scheduler import RATE_WEIGHT, WATCH_SECONDS, Limits, Scheduler, State
from scheduler.work import BatchReport, Source, Vector, WaiterState
from tests.conftest import Clock, until
from tests.support.fakes import FakeModel
from tests.support.queues import HandClock

Futures = list[asyncio.Future[Vector]]

# A hang is a failure; a busy machine is none.
PATIENCE_S = 60.0


@dataclass
class House:
    """A scheduler, and all that it has told. The loop's clock is the test's to put forward."""

    scheduler: Scheduler
    clock: Clock
    ready: list[EmbeddingModel] = field(default_factory=list)
    reports: list[BatchReport] = field(default_factory=list)
    failures: list[tuple[BaseException, bool]] = field(default_factory=list)

    @property
    def depth(self) -> int:
        return self.scheduler.queue_depth

    @property
    def waiting(self) -> int:
        """Inputs that the pump has moved into the queue, and the device has not taken."""
        return len(self.scheduler._queue)

    @property
    def attached(self) -> int:
        """Inputs that wait for one like them on the device."""
        works = self.scheduler._in_flight._works.values()
        return sum(waiter.state is WaiterState.ATTACHED for work in works for waiter in work.waiters)

    async def look(self) -> None:
        """Let the watch on the device look at it, several times."""
        for _ in range(4):
            self.clock.advance(WATCH_SECONDS)
            for _ in range(4):
                await asyncio.sleep(0)

    def submit(self, *texts: str, within: float = 3600.0) -> Futures:
        """Submit one request; returns its futures."""
        with self.scheduler.reserve(len(texts)) as places:
            return places.submit(prepare(*texts), time.monotonic() + within)

    async def occupy(self, *texts: str, within: float = 3600.0) -> Futures:
        """Submit one request, and wait until the device has taken it; returns its futures."""
        futures = self.submit(*texts, within=within)
        await until(lambda: not self.depth)
        return futures


def prepare(*texts: str) -> list[PreparedInput]:
    """Return inputs; one whose text begins with "bad" breaks a model that is told to fail at it."""
    model = FakeModel(fail_text="bad")
    return [model.prepare(EmbeddingInput((text,))) for text in texts]


def assert_vectors(outcomes: Sequence[object], *texts: str) -> None:
    """Every text got its own vector."""
    for outcome, text in zip(outcomes, texts, strict=True):
        assert isinstance(outcome, Vector), outcome
        assert np.array_equal(outcome.row, FakeModel().vector(text))


async def outcomes_of(futures: Futures) -> list[Any]:
    await until(lambda: all(future.done() for future in futures))
    return await asyncio.gather(*futures, return_exceptions=True)


async def kinds_of(futures: Futures) -> list[type]:
    return [type(outcome) for outcome in await outcomes_of(futures)]


def busy(house: House) -> bool:
    """Whether a forward pass is running, which a clock that stands still does not say."""
    return house.scheduler._worker._busy_since is not None


def device_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "device"]


Start = Callable[..., Awaitable[House]]


@pytest.fixture
async def start(clock: Clock) -> AsyncIterator[Start]:
    """Start a scheduler: `await start(model, **limits)`. In the end no place, thread or error of the event loop may be left."""
    running: list[tuple[House, FakeModel]] = []
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))

    async def start(model: FakeModel | None = None, *, wait: bool = True, **limits: Any) -> House:
        model = model or FakeModel()
        scheduler = Scheduler(
            model.load,
            Limits(**limits),
            on_ready=lambda: house.ready.append(house.scheduler.loaded_model),
            on_batch=lambda report: house.reports.append(report),
            on_failure=lambda error, loaded: house.failures.append((error, loaded)),
        )
        house = House(scheduler, clock)
        running.append((house, model))
        await scheduler.start()
        if wait:
            await until(lambda: scheduler.state is not State.LOADING)
        return house

    yield start
    for house, model in running:
        if model.gate:
            model.gate.set()
        await house.scheduler.stop(PATIENCE_S)
        assert house.depth == len(house.scheduler._in_flight) == 0
    await until(lambda: not device_threads())
    assert errors == []


class SlowlyLoaded(FakeModel):
    """A model that loads until it may be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.may_load = threading.Event()

    def load(self) -> FakeModel:
        self.may_load.wait(PATIENCE_S)
        return super().load()


@pytest.fixture
def gated() -> FakeModel:
    """A model whose forward pass waits for its gate."""
    return FakeModel(gate=threading.Event())


@pytest.fixture
def hand_clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    """A clock by which inputs arrive and forward passes are measured; it stands still."""
    clock = HandClock()
    for module in (scheduler_module, device_worker):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    return clock


class Timed(FakeModel):
    """A model whose passes take `seconds` on a clock that stands still otherwise."""

    def __init__(self, clock: HandClock, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self.clock = clock
        self.seconds = seconds

    def embed(self, batch: Sequence[PreparedInput]) -> Any:
        self.clock.now += self.seconds
        return super().embed(batch)


# Places


async def test_submit_gives_vectors_back_in_order(start: Start) -> None:
    house = await start(max_batch_size=3)
    texts = [f"text {number}" for number in range(10)]
    assert_vectors(await outcomes_of(house.submit(*texts)), *texts)
    assert house.depth == 0


async def test_places_are_held_from_reserve_until_the_device_takes_the_input(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    running = await house.occupy("a")
    with house.scheduler.reserve(3) as places:
        assert house.depth == 3
        waiting = places.submit(prepare("b", "c"), time.monotonic() + 3600)
        assert house.depth == 3
    assert house.depth == 2
    await until(lambda: house.waiting == 2)
    assert house.depth == 2
    gated.gate.set()
    await outcomes_of([*running, *waiting])
    assert house.depth == 0


async def test_places_that_are_not_used_are_given_back(start: Start) -> None:
    house = await start()
    with house.scheduler.reserve(5):
        assert house.depth == 5
    assert house.depth == 0
    with pytest.raises(KeyError), house.scheduler.reserve(5):
        raise KeyError
    assert house.depth == 0
    with house.scheduler.reserve(5) as places:
        futures = places.submit(prepare("a", "b"), time.monotonic() + 60)
    await outcomes_of(futures)
    assert house.depth == 0


async def test_places_are_no_fewer_than_what_is_submitted(start: Start) -> None:
    house = await start()
    with house.scheduler.reserve(1) as places:
        with pytest.raises(ValueError, match="2 inputs for 1 places"):
            places.submit(prepare("a", "b"), time.monotonic() + 60)
        assert house.depth == 1
    assert house.depth == 0


async def test_overload_is_refused_and_holds_nothing(start: Start, gated: FakeModel) -> None:
    house = await start(gated, max_queue_size=4)
    running = await house.occupy("a")
    waiting = house.submit("b", "c", "d")
    with pytest.raises(Overloaded) as refusal:
        house.scheduler.reserve(2)
    assert refusal.value.retry_after == 1.0
    assert house.depth == 3
    with house.scheduler.reserve(1), pytest.raises(Overloaded):
        house.scheduler.reserve(1)
    gated.gate.set()
    await outcomes_of([*running, *waiting])
    assert_vectors(await outcomes_of(house.submit("e", "f", "g", "h")), "e", "f", "g", "h")


async def test_overload_is_a_request_larger_than_the_queue_even_when_it_is_empty(start: Start) -> None:
    house = await start(max_queue_size=4)
    with house.scheduler.reserve(4):
        pass
    with pytest.raises(Overloaded):
        house.scheduler.reserve(5)
    assert house.depth == 0


async def test_retry_after_follows_from_the_measured_rate(start: Start, hand_clock: HandClock) -> None:
    model = Timed(hand_clock, 0.5)
    house = await start(model, max_queue_size=70)
    await outcomes_of(house.submit(*(f"text {number}" for number in range(70))))
    assert house.scheduler.retry_after() == 0.0
    model.seconds = 2.0
    await outcomes_of(house.submit("c"))
    rate = 140.0 + (0.5 - 140.0) * RATE_WEIGHT
    with house.scheduler.reserve(70), pytest.raises(Overloaded) as refusal:
        house.scheduler.reserve(1)
    assert refusal.value.retry_after == pytest.approx(70 / rate)


async def test_retry_after_counts_no_failed_inputs_as_worked_off(start: Start, hand_clock: HandClock) -> None:
    house = await start(Timed(hand_clock, 2.0, fail_text="bad"))
    assert await kinds_of(house.submit("bad")) == [BatchFailed]
    assert house.scheduler.retry_after() == 1.0
    # Three passes: both, and each alone.
    await outcomes_of(house.submit("good", "bad"))
    with house.scheduler.reserve(1):
        assert house.scheduler.retry_after() == pytest.approx(6.0)


# States


async def test_state_loading_takes_no_work(start: Start) -> None:
    model = SlowlyLoaded()
    house = await start(model, wait=False)
    assert house.scheduler.state is State.LOADING
    for refused in (house.scheduler.check_open, lambda: house.scheduler.reserve(1)):
        with pytest.raises(NotReady):
            refused()
    assert house.scheduler.loaded_model is None
    model.may_load.set()
    await until(lambda: house.ready)
    assert house.scheduler.state is State.READY
    assert house.ready == [model]
    assert house.scheduler.loaded_model is model
    assert house.scheduler.tokens_per_second == model.warm_up()
    house.scheduler.check_open()
    assert not house.failures


async def test_load_that_fails_is_a_failure(start: Start) -> None:
    error = RuntimeError("no weights")
    house = await start(FakeModel(load_error=error))
    assert house.scheduler.state is State.FAILED
    assert house.failures == [(error, False)]
    with pytest.raises(WorkerDied):
        house.scheduler.reserve(1)
    await house.look()
    assert len(house.failures) == 1


async def test_state_draining_refuses_new_work_and_finishes_what_is_reserved(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    running = await house.occupy("a")
    waiting = house.submit("b")
    with house.scheduler.reserve(1) as places:
        house.scheduler.drain()
        assert house.scheduler.state is State.DRAINING
        with pytest.raises(Draining):
            house.scheduler.reserve(1)
        late_comer = places.submit(prepare("c"), time.monotonic() + 60)
    gated.gate.set()
    assert_vectors(await outcomes_of([*running, *waiting, *late_comer]), "a", "b", "c")
    assert not house.failures


async def test_load_is_no_death_however_long_it_takes(start: Start) -> None:
    """Loading is told by the load itself, however long it takes."""
    model = SlowlyLoaded()
    house = await start(model, wait=False, worker_stall=0.01)
    house.scheduler._worker.is_alive = lambda: False
    await house.look()
    assert house.scheduler.state is State.LOADING
    assert not house.failures
    model.may_load.set()
    del house.scheduler._worker.is_alive
    await until(lambda: house.ready)


async def test_state_draining_stays_when_the_model_has_loaded(start: Start) -> None:
    model = SlowlyLoaded()
    house = await start(model, wait=False)
    house.scheduler.drain()
    model.may_load.set()
    await until(lambda: house.scheduler.loaded_model)
    assert house.scheduler.state is State.DRAINING
    with pytest.raises(Draining):
        house.scheduler.check_open()


async def test_state_failed_is_not_undone_by_draining(start: Start) -> None:
    house = await start(FakeModel(load_error=RuntimeError("no weights")))
    house.scheduler.drain()
    assert house.scheduler.state is State.FAILED


# Deadlines


async def test_deadline_fails_what_waits_and_not_what_is_taken(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    running = await house.occupy("a", within=600)
    waiting, patient = house.submit("b", "c", within=600), house.submit("d")
    await until(lambda: house.waiting == 3)
    house.clock.advance(300)
    await house.look()
    assert house.depth == 3 and not any(future.done() for future in waiting)
    house.clock.advance(301)
    assert await kinds_of(waiting) == [DeadlineExceeded] * 2
    assert house.depth == 1
    assert not running[0].done() and not patient[0].done()
    gated.gate.set()
    assert_vectors(await outcomes_of([*running, *patient]), "a", "d")
    assert gated.embedded == 2


async def test_deadline_splits_a_request(start: Start, gated: FakeModel) -> None:
    house = await start(gated, max_batch_size=2)
    futures = house.submit("a", "b", "c", within=600)
    await until(lambda: house.depth == 1)
    house.clock.advance(601)
    assert await kinds_of(futures[2:]) == [DeadlineExceeded]
    gated.gate.set()
    assert_vectors(await outcomes_of(futures[:2]), "a", "b")
    assert gated.embedded == 2


async def test_deadline_that_the_device_finds_passed_is_told_by_its_timer(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    running = await house.occupy("a")
    late, in_time = house.submit("b", within=600), house.submit("c")
    await until(lambda: house.waiting == 2)
    # The device is there before the timer, as when the event loop is held up.
    house.scheduler._queue._clock = lambda: time.monotonic() + 601
    gated.gate.set()
    assert_vectors(await outcomes_of([*running, *in_time]), "a", "c")
    assert house.depth == 0
    assert not late[0].done()
    house.clock.advance(601)
    assert await kinds_of(late) == [DeadlineExceeded]
    assert gated.embedded == 2


async def test_deadline_that_has_passed_already_fails_at_once(start: Start) -> None:
    model = FakeModel()
    house = await start(model)
    assert await kinds_of(house.submit("a", within=-1.0)) == [DeadlineExceeded]
    await until(lambda: house.depth == 0)
    assert model.embedded == 0


# Cancelling


async def test_cancelling_gives_the_places_back_and_nothing_is_computed(start: Start, gated: FakeModel) -> None:
    house = await start(gated, max_queue_size=100)
    running = await house.occupy("a")
    gone, patient = house.submit("b", *(f"b{number}" for number in range(89))), house.submit("c")
    await until(lambda: house.waiting == 91)
    for future in gone[1:]:
        future.cancel()
    await asyncio.sleep(0)
    assert house.depth == 2
    with house.scheduler.reserve(98):
        pass
    gated.gate.set()
    assert_vectors(await outcomes_of([*running, gone[0], *patient]), "a", "b", "c")
    assert gated.embedded == 3


async def test_cancelling_before_the_pump_sees_the_inputs_keeps_them_from_waiting(start: Start) -> None:
    model = FakeModel()
    house = await start(model)
    for future in house.submit("a", "b"):
        future.cancel()
    kept = house.submit("c")
    assert_vectors(await outcomes_of(kept), "c")
    assert model.embedded == 1
    assert house.depth == 0


async def test_cancelling_what_is_taken_leaves_its_neighbours_alone(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    futures = await house.occupy("a", "b", "c")
    futures[1].cancel()
    gated.gate.set()
    assert_vectors(await outcomes_of([futures[0], futures[2]]), "a", "c")


async def test_cancelling_keeps_an_input_of_a_late_request_from_failing_twice(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    await house.occupy("a")
    futures = house.submit("b", "c", within=600)
    futures[0].cancel()
    house.clock.advance(601)
    assert await kinds_of(futures) == [asyncio.CancelledError, DeadlineExceeded]


# Identical inputs, and vectors that are kept


async def test_single_flight_gives_the_places_of_all_back_when_one_is_taken(start: Start, gated: FakeModel) -> None:
    house = await start(gated, max_queue_size=10)
    running = await house.occupy("x")
    waiting = [*house.submit("a", "b", "a"), *house.submit("a")]
    assert house.depth == 4
    gated.gate.set()
    assert_vectors(await outcomes_of([*running, *waiting]), "x", "a", "b", "a", "a")
    assert gated.batches == [1, 2]
    assert house.depth == 0


async def test_single_flight_holds_the_places_of_what_joins_a_running_batch(start: Start, gated: FakeModel) -> None:
    """Else there would be no end to what one batch is waited for by."""
    house = await start(gated, max_queue_size=2)
    running = await house.occupy("a")
    joined = house.submit("a", "a")
    await until(lambda: house.attached == 2)
    assert house.depth == 2
    with pytest.raises(Overloaded):
        house.submit("a")
    gated.gate.set()
    assert_vectors(await outcomes_of([*running, *joined]), *["a"] * 3)
    assert (gated.embedded, house.depth) == (1, 0)


@pytest.mark.parametrize("first", ["thread", "watch"])
async def test_death_fails_all_that_was_held_whoever_tells_of_it_first(
    start: Start, gated: FakeModel, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread and the watch both tell of it, in either order."""
    gated.lose_after = 1
    house = await start(gated)
    worker = house.scheduler._worker
    assert worker is not None
    running = await house.occupy("a", "b", "a")
    waiting = house.submit("c")
    if first == "watch":

        def busy_until_the_thread_is_gone() -> float:
            gated.gate.set()
            worker.join(PATIENCE_S)
            return 0.0

        monkeypatch.setattr(worker, "busy_seconds", busy_until_the_thread_is_gone)
    else:
        monkeypatch.setattr(worker, "is_alive", lambda: True)
        gated.gate.set()
    await house.look()
    assert await kinds_of([*running, *waiting]) == [WorkerDied] * 4
    assert len(house.failures) == 1


async def test_death_is_an_error_after_the_forward_pass_and_loses_nobody(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(device_worker, "_outcome", no_memory)
    house = await start(FakeModel())
    assert await kinds_of(house.submit("a", "b", "a")) == [WorkerDied] * 3
    assert house.scheduler.state is State.FAILED


async def test_single_flight_makes_no_time_negative(start: Start) -> None:
    """An identical input may come when the half of the batch that has it is done, and the other is running."""
    model = FakeModel(most_inputs=1, gate=threading.Event())
    house = await start(model)
    first = await house.occupy("x")
    first += house.submit("a", "b")
    model.gate.set()
    await until(lambda: model.embedded >= 2)
    second = house.submit("a", "b", "a")
    for vector in await outcomes_of([*first, *second]):
        assert vector.device_seconds >= 0 and vector.queue_seconds >= 0


async def test_single_flight_goes_on_without_those_that_are_cancelled_or_late(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    await house.occupy("x")
    gone, late, patient = house.submit("a"), house.submit("a", within=600), house.submit("a")
    gone[0].cancel()
    house.clock.advance(601)
    assert await kinds_of(late) == [DeadlineExceeded]
    assert house.depth == 1
    gated.gate.set()
    assert_vectors(await outcomes_of(patient), "a")
    assert gated.embedded == 2


async def test_deadline_is_not_for_what_joins_a_running_batch(start: Start, gated: FakeModel) -> None:
    """As any other: the deadline is for what the device has not taken."""
    house = await start(gated)
    running = await house.occupy("a")
    joined = house.submit("a", within=600)
    await until(lambda: house.attached)
    house.clock.advance(601)
    await house.look()
    gated.gate.set()
    assert_vectors(await outcomes_of([*running, *joined]), "a", "a")


async def test_single_flight_is_not_held_up_by_a_bulk_requests_copy(start: Start, gated: FakeModel) -> None:
    house = await start(gated, max_batch_size=2)
    await house.occupy("x")
    bulk = house.submit(*(f"bulk {number}" for number in range(10)), "query")
    single = house.submit("query")
    order: list[str] = []
    for name, future in (("single", single[0]), ("copy", bulk[-1]), ("third", bulk[2])):
        future.add_done_callback(lambda _, name=name: order.append(name))
    gated.gate.set()
    await outcomes_of([*bulk, *single])
    assert order == ["single", "copy", "third"] or order == ["copy", "single", "third"]
    assert gated.embedded == 12


async def test_retry_after_counts_identical_inputs_as_worked_off(start: Start, hand_clock: HandClock) -> None:
    house = await start(Timed(hand_clock, 2.0))
    await outcomes_of(house.submit("a", "a", "a", "b"))
    with house.scheduler.reserve(6):
        assert house.scheduler.retry_after() == pytest.approx(3.0)


@pytest.mark.parametrize("how", ["stall", "lost", "gone"])
async def test_death_fails_identical_inputs_wherever_they_are(start: Start, hand_clock: HandClock, how: str) -> None:
    model = FakeModel(gate=threading.Event(), lose_after=1 if how == "lost" else 0)
    house = await start(model, worker_stall=0.5 if how == "stall" else None)
    futures = await house.occupy("a", "b", "a")
    futures += house.submit("a")
    await until(lambda: house.attached)
    # The pump has not moved these when the death is told.
    futures += house.submit("b", "c")
    if how == "lost":
        model.gate.set()
    elif how == "gone":
        house.scheduler._worker.is_alive = lambda: False
    else:
        await until(lambda: busy(house))
        hand_clock.now += 1.0
    await house.look()
    assert await kinds_of(futures) == [WorkerDied] * 6
    assert house.depth == 0


async def test_death_lets_what_arrives_at_that_moment_join_nothing(start: Start, gated: FakeModel) -> None:
    """What is on the intake queue must not be attached to what is lost."""
    house = await start(gated)
    futures = await house.occupy("a")
    futures += house.submit("a")
    house.scheduler._died(WorkerDied("no progress"))
    assert all(future.done() for future in futures)
    assert await kinds_of(futures) == [WorkerDied] * 2


async def test_stop_gives_up_identical_inputs_of_a_batch_that_does_not_end(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    futures = await house.occupy("a", "a")
    futures += house.submit("a")
    await until(lambda: house.attached)
    await house.scheduler.stop(timeout=0.05)
    assert await kinds_of(futures) == [Draining] * 3
    assert house.depth == 0


async def test_single_flight_holds_the_place_of_a_waiter_that_joined_and_left(start: Start, gated: FakeModel) -> None:
    """Else callers that come and go would make the batch's waiters grow without end."""
    house = await start(gated)
    running = await house.occupy("a")
    gone = house.submit("a")
    await until(lambda: house.attached)
    gone[0].cancel()
    await house.look()
    assert house.depth == 1
    gated.gate.set()
    assert_vectors(await outcomes_of(running), "a")
    assert house.depth == 0


async def test_cache_keeps_an_input_out_of_the_queue(start: Start, gated: FakeModel) -> None:
    house = await start(gated, vector_cache_bytes=1 << 20)
    gated.gate.set()
    (first,) = await outcomes_of(house.submit("a"))
    gated.gate.clear()
    await house.occupy("x")
    futures = house.submit("a", "b", "a")
    assert [future.done() for future in futures] == [True, False, True]
    assert house.depth == 1
    hit = futures[0].result()
    assert (hit.queue_seconds, hit.device_seconds, hit.source) == (0.0, 0.0, Source.CACHED)
    assert np.array_equal(hit.row, first.row) and not np.shares_memory(hit.row, first.row)
    gated.gate.set()
    assert_vectors(await outcomes_of(futures), "a", "b", "a")
    assert gated.embedded == 3


async def test_cache_of_a_whole_request_leaves_no_timer(start: Start) -> None:
    house = await start(vector_cache_bytes=1 << 20)
    await outcomes_of(house.submit("a"))
    futures = house.submit("a", "a")
    assert all(future.done() for future in futures)
    timers = [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled() and "_expire" in repr(timer)]
    assert timers == []
    assert house.depth == 0


async def test_cache_of_no_size_has_everything_computed_again(start: Start) -> None:
    model = FakeModel()
    house = await start(model)
    for _ in range(3):
        assert_vectors(await outcomes_of(house.submit("a")), "a")
    assert model.embedded == 3


async def test_cache_gives_nothing_if_no_work_is_taken(start: Start, gated: FakeModel) -> None:
    house = await start(gated, vector_cache_bytes=1 << 20)
    gated.gate.set()
    await outcomes_of(house.submit("a"))
    with house.scheduler.reserve(3) as places:
        house.scheduler.drain()
        # What has its place before the end still gets its vector.
        assert_vectors(await outcomes_of(places.submit(prepare("a"), time.monotonic() + 60)), "a")
        with pytest.raises(Draining):
            house.scheduler.reserve(1)
        house.scheduler.abandon()
        with pytest.raises(Draining):
            places.submit(prepare("a"), time.monotonic() + 60)
        house.scheduler._died(WorkerDied("lost"))
        with pytest.raises(WorkerDied):
            places.submit(prepare("a"), time.monotonic() + 60)


# Stopping


async def test_abandon_fails_what_waits_and_what_comes_later(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    running = await house.occupy("a")
    waiting = house.submit("b")
    await until(lambda: house.waiting)
    with house.scheduler.reserve(1) as places:
        house.scheduler.drain()
        house.scheduler.abandon()
        assert await kinds_of(waiting) == [Draining]
        with pytest.raises(Draining):
            places.submit(prepare("c"), time.monotonic() + 60)
    assert house.depth == 0
    gated.gate.set()
    assert_vectors(await outcomes_of(running), "a")
    assert gated.embedded == 1


async def test_abandon_reaches_what_the_pump_has_not_moved(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    await house.occupy("a")
    futures = house.submit("b", "c")
    house.scheduler.abandon()
    assert all(future.done() for future in futures)
    assert await kinds_of(futures) == [Draining] * 2
    assert house.depth == 0


async def test_stop_lets_the_batch_end_and_ends_the_thread(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    running = await house.occupy("a")
    waiting = house.submit("b")
    asyncio.get_running_loop().call_soon(gated.gate.set)
    await house.scheduler.stop(PATIENCE_S)
    assert not device_threads()
    assert_vectors([future.result() for future in running], "a")
    assert await kinds_of(waiting) == [Draining]
    assert [task for task in asyncio.all_tasks() if task.get_name() in ("intake", "stall-watch")] == []
    assert not house.failures


async def test_stop_gives_up_a_batch_that_does_not_end(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    running = await house.occupy("a", "b")
    await house.scheduler.stop(timeout=0.05)
    assert all(future.done() for future in running)
    assert await kinds_of(running) == [Draining] * 2


async def test_stop_does_not_wait_for_a_model_that_loads(start: Start) -> None:
    model = SlowlyLoaded()
    house = await start(model, wait=False)
    await house.scheduler.stop()
    assert device_threads()
    model.may_load.set()
    await until(lambda: not device_threads())
    await house.look()
    assert house.scheduler.state is State.DRAINING
    assert not house.failures


async def test_stop_before_start_and_stop_again(start: Start) -> None:
    house = await start()
    await house.scheduler.stop()
    await house.scheduler.stop()
    nothing: Any = lambda *_: None  # noqa: E731
    await Scheduler(FakeModel, Limits(), on_ready=nothing, on_batch=nothing, on_failure=nothing).stop()


# Dying


async def test_stall_fails_what_runs_and_what_waits_once(start: Start, gated: FakeModel, hand_clock: HandClock) -> None:
    house = await start(gated, worker_stall=0.5)
    running = await house.occupy("a")
    await until(lambda: busy(house))
    waiting = house.submit("b", "c")
    hand_clock.now += 0.5
    await house.look()
    assert not running[0].done()
    hand_clock.now += 0.1
    await house.look()
    assert await kinds_of([*running, *waiting]) == [WorkerDied] * 3
    assert house.scheduler.state is State.FAILED
    assert house.depth == 0
    ((error, loaded),) = house.failures
    assert isinstance(error, WorkerDied) and loaded
    await house.look()
    # The pass ends after all: nobody waits for it any more.
    gated.gate.set()
    await until(lambda: house.reports)
    assert len(house.failures) == 1
    assert house.scheduler.state is State.FAILED


async def test_stall_refuses_what_was_reserved_before_it(start: Start, gated: FakeModel, hand_clock: HandClock) -> None:
    house = await start(gated, worker_stall=0.5)
    with house.scheduler.reserve(1) as places:
        running = house.submit("a")
        await until(lambda: busy(house))
        hand_clock.now += 1.0
        await kinds_of(running)
        with pytest.raises(WorkerDied):
            places.submit(prepare("b"), time.monotonic() + 60)
        with pytest.raises(WorkerDied):
            house.scheduler.reserve(1)
    assert house.depth == 0


async def test_stall_is_neither_an_idle_device_nor_many_short_passes(start: Start, hand_clock: HandClock) -> None:
    """The watch looks at every pass, of 0.7 s; together they take far more than a stall's 1 s."""
    looked = threading.Semaphore(0)

    class Model(Timed):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            self.clock.now += self.seconds
            while looked.acquire(blocking=False):
                pass
            # One look may have begun before the pass did.
            assert looked.acquire(timeout=PATIENCE_S) and looked.acquire(timeout=PATIENCE_S)
            return FakeModel.embed(self, batch)

    model = Model(hand_clock, 0.7, fail_text="bad")
    house = await start(model, worker_stall=1.0)
    busy_seconds = house.scheduler._worker.busy_seconds

    def look() -> float:
        busy = busy_seconds()
        looked.release()
        return busy

    house.scheduler._worker.busy_seconds = look
    hand_clock.now += 10.0
    await house.look()

    async def outcomes(*texts: str) -> list[Any]:
        futures = house.submit(*texts)
        while not all(future.done() for future in futures):
            await house.look()
        return await outcomes_of(futures)

    texts = [f"text {number}" for number in range(5)]
    found = await outcomes(*texts, "bad")
    assert_vectors(found[:-1], *texts)
    assert {type(outcome) for outcome in await outcomes(*(f"bad {number}" for number in range(4)))} == {BatchFailed}
    assert [report.device_seconds > 3.0 for report in house.reports] == [True] * 2
    assert not house.failures


async def test_death_of_the_device_fails_all_and_is_told_once(start: Start) -> None:
    model = FakeModel(lose_after=1, gate=threading.Event())
    house = await start(model)
    running = await house.occupy("a", "b")
    waiting = house.submit("c")
    model.gate.set()
    assert await kinds_of([*running, *waiting]) == [WorkerDied] * 3
    await house.look()
    assert len(house.failures) == 1
    assert house.failures[0][1]
    assert house.depth == 0


async def test_death_of_a_thread_that_is_told_to_end_fails_all_and_is_told_once(start: Start) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            raise SystemExit(1)

    house = await start(Model())
    futures = house.submit("a", "b")
    assert await kinds_of(futures) == [WorkerDied] * 2
    await house.look()
    ((error, loaded),) = house.failures
    assert isinstance(error, SystemExit) and loaded
    assert house.scheduler.state is State.FAILED


async def test_death_of_a_device_that_stalled_is_not_told_again(start: Start, gated: FakeModel, hand_clock: HandClock) -> None:
    """The pass that stalled ends after all, and with an error that loses the device again."""
    gated.lose_after = 1
    house = await start(gated, worker_stall=0.5)
    running = await house.occupy("a")
    await until(lambda: busy(house))
    hand_clock.now += 1.0
    assert await kinds_of(running) == [WorkerDied]
    gated.gate.set()
    await until(lambda: not device_threads())
    await house.look()
    ((error, _),) = house.failures
    assert isinstance(error, WorkerDied)


async def test_death_of_the_thread_without_a_word_is_noticed(start: Start, gated: FakeModel) -> None:
    house = await start(gated)
    running = await house.occupy("a")
    waiting = house.submit("b")
    house.scheduler._worker.is_alive = lambda: False
    assert await kinds_of([*running, *waiting]) == [WorkerDied] * 2
    assert len(house.failures) == 1


# Limits that follow from the measured rate


class MeasuredModel(FakeModel):
    """A model with a rate and a device of its own."""

    rate = 0.0
    device = "cpu"

    @property
    def info(self) -> ModelInfo:
        return replace(super().info, device=self.device)

    def warm_up(self) -> float:
        return self.rate


@pytest.mark.parametrize(
    ("device", "rate", "limit", "expected"),
    [
        ("cpu", 10_000.0, None, 2500),
        ("cpu", 10.0, None, 256),
        ("cpu", 1e9, None, 8192),
        ("cpu", 10_000.0, 100, 100),
        ("cuda:0", 10_000.0, None, 8192),
        ("cuda:0", 10_000.0, 300, 300),
    ],
)
async def test_limits_tokens_in_a_batch(start: Start, device: str, rate: float, limit: int | None, expected: int) -> None:
    model = MeasuredModel(gate=threading.Event())
    model.rate, model.device = rate, device
    house = await start(model, max_batch_tokens=limit)
    running = await house.occupy("a")
    # Two that fill the batch to the last token, and the smallest that there is.
    waiting = house.submit("x" * (expected - 44), "y" * 36, "")
    model.gate.set()
    await outcomes_of([*running, *waiting])
    assert [(report.size, report.num_tokens) for report in house.reports[1:]] == [(2, expected), (1, 4)]


@pytest.mark.parametrize(
    ("rate", "limits", "expected"),
    [
        (1e6, {}, 60.0),
        (100.0, {"max_batch_tokens": 2000, "max_input_tokens": 1000}, 200.0),
        (100.0, {"max_batch_tokens": 2000, "max_input_tokens": 4000}, 400.0),
        (0.0, {}, 60.0),
        (1.0, {"worker_stall": 7.0}, 7.0),
    ],
)
async def test_limits_how_long_a_pass_may_take(start: Start, rate: float, limits: dict[str, Any], expected: float) -> None:
    model = MeasuredModel()
    model.rate = rate
    house = await start(model, **limits)
    assert house.scheduler.stall_seconds == pytest.approx(expected)


# In general


async def test_report_of_a_batch_is_handed_on(start: Start, hand_clock: HandClock) -> None:
    house = await start(Timed(hand_clock, 2.0))
    await outcomes_of(house.submit("a", "bcd"))
    assert house.reports == [BatchReport(2, 5 + 7, [0.0, 0.0], 2.0, 0)]


async def test_memory_keeps_nothing_of_a_request_that_is_done(start: Start) -> None:
    """No timer waits for its deadline, and nothing holds its inputs or its vectors."""
    arrays: list[weakref.ref[np.ndarray]] = []

    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            rows = super().embed(batch)
            arrays.append(weakref.ref(rows))
            arrays.extend(weakref.ref(item.token_ids) for item in batch)
            return rows

    loop = asyncio.get_running_loop()
    house = await start(Model(fail_text="bad"), max_batch_size=4)
    gone = house.submit("gone")
    gone[0].cancel()
    await outcomes_of([*house.submit("a", "b", "c", "d", "e"), *house.submit("bad")])
    await asyncio.sleep(0)
    timers = [timer for timer in loop._scheduled if not timer.cancelled() and "_expire" in repr(timer)]
    assert timers == []
    assert arrays
    # A text that failed is held by nothing else than the record of its failure, which pytest keeps.
    await until(lambda: all(array() is None for array in arrays))


async def test_futures_are_all_resolved_whatever_happens(start: Start) -> None:
    """Requests of all sizes, cancelled, late, failing and well, against a device that runs out of memory."""
    model = FakeModel(fail_text="bad", most_inputs=20, seconds_per_batch=0.001)
    house = await start(model, max_batch_size=32, max_batch_tokens=400, max_queue_size=500)
    chance = random.Random(7)
    refused = 0
    seen: dict[type, int] = {}

    async def caller(number: int) -> None:
        nonlocal refused
        await asyncio.sleep(chance.random() * 0.6)
        texts = [f"{chance.randrange(number + 1)}/{index}" for index in range(chance.choice([1, 1, 2, 30]))]
        texts = [text if chance.random() > 0.01 else f"bad {text}" for text in texts]
        within = chance.choice([0.0, 0.01, 60.0, 60.0])
        try:
            futures = house.submit(*texts, within=within)
        except Overloaded as error:
            refused += 1
            assert error.retry_after > 0
            return
        for future in futures:
            if (left := chance.random()) < 0.05:
                future.cancel()
            elif left < 0.1:
                asyncio.get_running_loop().call_later(chance.random() * 0.02, future.cancel)
        for text, outcome in zip(texts, await outcomes_of(futures), strict=True):
            seen[type(outcome)] = seen.get(type(outcome), 0) + 1
            if isinstance(outcome, Vector):
                assert_vectors([outcome], text)
            if isinstance(outcome, BatchFailed):
                assert text.startswith("bad")

    await asyncio.gather(*(caller(number) for number in range(400)))
    assert house.depth == len(house.scheduler._in_flight) == 0
    assert not house.failures
    assert set(seen) == {Vector, BatchFailed, DeadlineExceeded, asyncio.CancelledError}
    assert sum(len(report.waits) for report in house.reports) >= seen[Vector] + seen[BatchFailed]
    assert sum(report.size for report in house.reports) < seen[Vector]
    assert sum(report.failed for report in house.reports) >= seen[BatchFailed]
