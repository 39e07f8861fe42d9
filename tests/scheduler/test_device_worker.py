"""The device's thread: loading, one wake-up a batch, failures that stay where they belong, and a death that is told."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.base import DeviceLost, EmbeddingInput, EmbeddingModel, OutOfDeviceMemory, PreparedInput
from scheduler import device_worker
from scheduler.batch_queue import BatchQueue
from scheduler.device_worker import Callbacks, DeviceWorker, Loaded
from scheduler.errors import BatchFailed
from scheduler.places import Places
from scheduler.single_flight import SingleFlight
from scheduler.vector_cache import VectorCache
from scheduler.work import BatchReport, Source, Submission, Vector, Waiter, Work
from tests.conftest import until
from tests.support.fakes import FakeModel
from tests.support.queues import HandClock

# A hang is a failure; a busy machine is none.
PATIENCE_S = 60.0


class CountingLoop:
    """The event loop as the worker knows it, its wake-ups counted."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.wake_ups = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        self.wake_ups += 1
        self.loop.call_soon_threadsafe(callback, *arguments)


@dataclass
class Device:
    """A worker, and all that it has told."""

    worker: DeviceWorker
    queue: BatchQueue
    in_flight: SingleFlight
    loop: Any
    cache: VectorCache
    loaded: list[Loaded] = field(default_factory=list)
    load_errors: list[BaseException] = field(default_factory=list)
    reports: list[BatchReport] = field(default_factory=list)
    deaths: list[BaseException] = field(default_factory=list)

    def submit(self, inputs: Sequence[PreparedInput], at: float | None = None) -> list[Waiter]:
        """Add one request; returns its waiters, who came `at` this time."""
        at = time.monotonic() if at is None else at
        waiters = [Waiter(Work(item), self.loop.loop.create_future(), at, inf) for item in inputs]
        submission = Submission(waiters)
        self.in_flight.join(submission)
        self.queue.add(submission)
        return waiters

    async def embed(self, inputs: Sequence[PreparedInput]) -> list[Vector | BaseException]:
        """Submit the inputs as one request; returns what comes of them."""
        return await outcomes_of(self.submit(inputs))

    async def ended(self) -> None:
        """Wait until the thread has ended, and what it told has been heard."""
        await asyncio.to_thread(self.worker.join, PATIENCE_S)
        assert not self.worker.is_alive()


async def outcomes_of(waiters: Sequence[Waiter]) -> list[Vector | BaseException]:
    return await asyncio.gather(*(waiter.future for waiter in waiters), return_exceptions=True)


class GatedModel(FakeModel):
    """A model whose passes wait for its gate, and take a second each on a clock of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(gate=threading.Event(), **options)
        self.clock = HandClock()
        self.entered = threading.Event()

    def embed(self, batch: Sequence[PreparedInput]) -> Any:
        self.entered.set()
        assert self.gate is not None and self.gate.wait(PATIENCE_S)
        self.clock.now += 1.0
        return super().embed(batch)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> GatedModel:
    """A gated model, by whose clock the worker goes."""
    model = GatedModel(fail_text="bad")
    monkeypatch.setattr(device_worker, "time", SimpleNamespace(monotonic=model.clock))
    return model


Start = Callable[..., Device]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start a worker: `start(model)`. Nothing may go wrong on the event loop, and no thread may be left."""
    devices: list[Device] = []
    errors: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))

    def start(model: EmbeddingModel | Callable[[], EmbeddingModel], size: int = 256) -> Device:
        places = Places(1_000_000)
        queue, in_flight = BatchQueue(places, max_batch_tokens=1_000_000, max_batch_size=size), SingleFlight(places)
        counting: Any = CountingLoop(loop)
        callbacks = Callbacks(
            on_loaded=lambda loaded: device.loaded.append(loaded),
            on_load_failed=lambda error: device.load_errors.append(error),
            on_batch=lambda report: device.reports.append(report),
            on_death=lambda error: device.deaths.append(error),
        )
        cache = VectorCache(1 << 20)
        worker = DeviceWorker(model if callable(model) else lambda: model, queue, in_flight, cache, counting, callbacks)
        device = Device(worker, queue, in_flight, counting, cache)
        devices.append(device)
        worker.start()
        return device

    yield start
    for device in devices:
        device.queue.close()
        await device.ended()
    assert errors == []


def prepare(*texts: str) -> list[PreparedInput]:
    return [FakeModel().prepare(EmbeddingInput((text,))) for text in texts]


def texts_of(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


def assert_vectors(outcomes: Sequence[object], texts: Sequence[str]) -> None:
    """Every text got its own vector."""
    for outcome, text in zip(outcomes, texts, strict=True):
        assert isinstance(outcome, Vector), outcome
        assert np.array_equal(outcome.row, FakeModel().vector(text))


# Loading


async def test_load_runs_in_the_one_thread_that_owns_the_device(start: Start) -> None:
    threads = []

    class Model(FakeModel):
        def load(self) -> FakeModel:
            threads.append(threading.current_thread())
            return super().load()

        def warm_up(self) -> float:
            threads.append(threading.current_thread())
            return 123.0

        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            threads.append(threading.current_thread())
            return super().embed(batch)

    model = Model()
    device = start(model.load)
    await device.embed(prepare("a"))
    assert len(threads) == 3
    assert len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()
    assert threads[0].daemon
    assert device.loaded == [Loaded(model, 123.0)]


@pytest.mark.parametrize("error", [RuntimeError("no weights"), SystemExit(1), MemoryError()])
async def test_load_that_fails_is_told(start: Start, error: BaseException) -> None:
    def load() -> EmbeddingModel:
        raise error

    device = start(load)
    await until(lambda: device.load_errors)
    await device.ended()
    assert device.load_errors == [error]
    assert not device.loaded and not device.deaths


async def test_load_fails_if_the_warm_up_does(start: Start) -> None:
    class Model(FakeModel):
        def warm_up(self) -> float:
            raise OutOfDeviceMemory("too large for this device")

    device = start(Model())
    await until(lambda: device.load_errors)
    assert isinstance(device.load_errors[0], OutOfDeviceMemory)
    assert not device.loaded


# A batch


async def test_batch_gives_every_input_its_own_vector(start: Start) -> None:
    texts = texts_of(50)
    device = start(FakeModel(), size=7)
    assert_vectors(await device.embed(prepare(*texts)), texts)


async def test_wake_up_of_the_loop_is_one_for_a_whole_batch(start: Start) -> None:
    model = FakeModel(gate=threading.Event())
    device = start(model, size=8)
    await until(lambda: device.loaded)
    assert device.loop.wake_ups == 1
    waiters = device.submit(prepare(*texts_of(24)))
    model.gate.set()
    await outcomes_of(waiters)
    assert model.batches == [8, 8, 8]
    assert device.loop.wake_ups == 4


async def test_wake_up_of_the_loop_is_one_for_a_batch_that_fails_in_part(start: Start) -> None:
    device = start(FakeModel(fail_text="bad"))
    await device.embed([*prepare(*texts_of(5)), FakeModel(fail_text="bad").prepare(EmbeddingInput(("bad",)))])
    assert device.loop.wake_ups == 2


async def test_wake_up_of_the_loop_finds_all_futures_of_a_batch_done(start: Start) -> None:
    device = start(FakeModel())
    waiters = device.submit(prepare(*texts_of(5)))
    done: list[list[bool]] = []
    for waiter in waiters:
        waiter.future.add_done_callback(lambda _: done.append([waiter.future.done() for waiter in waiters]))
    await outcomes_of(waiters)
    assert done == [[True] * 5] * 5


async def test_report_tells_what_a_batch_took(start: Start, gated: GatedModel) -> None:
    device = start(gated)
    device.submit(prepare("in the way"), at=100.0)
    await until(gated.entered.is_set)
    inputs = [*prepare("a", "bcd"), gated.prepare(EmbeddingInput(("bad",)))]
    waiters = [waiter for item, at in zip(inputs, (97.5, 98.5, 99.5), strict=True) for waiter in device.submit([item], at)]
    gated.gate.set()
    outcomes = await outcomes_of(waiters)
    assert isinstance(outcomes[0], Vector) and isinstance(outcomes[2], BatchFailed)
    first, report = device.reports
    assert (first.size, list(first.waits), first.device_seconds, first.failed) == (1, [0.0], 1.0, 0)
    # Taken at 101; three fail, one passes, two fail, one passes, one fails: five passes of a second.
    assert report == BatchReport(3, sum(item.num_tokens for item in inputs), [3.5, 2.5, 1.5], 5.0, 1)
    assert (outcomes[0].queue_seconds, outcomes[0].device_seconds) == (3.5, 2.0)


async def test_busy_seconds_are_those_of_the_forward_pass(start: Start, gated: GatedModel) -> None:
    device = start(gated)
    await until(lambda: device.loaded)
    assert device.worker.busy_seconds() == 0
    waiters = device.submit(prepare("a", "b"))
    await until(gated.entered.is_set)
    gated.clock.now += 5.0
    assert device.worker.busy_seconds() == 5.0
    gated.gate.set()
    await outcomes_of(waiters)
    assert device.worker.busy_seconds() == 0


async def test_memory_of_the_inputs_is_freed_by_an_idle_device(start: Start, no_collector: None) -> None:
    device = start(FakeModel())
    inputs = prepare("a", "b")
    arrays = [weakref.ref(item.token_ids) for item in inputs]
    await device.embed(inputs)
    del inputs
    await until(lambda: all(array() is None for array in arrays))


# Failures


@pytest.mark.parametrize("position", range(8))
async def test_halving_lets_an_exception_fail_its_input_alone(start: Start, position: int) -> None:
    model = FakeModel(fail_text="bad")
    device = start(model)
    texts = texts_of(8)
    texts[position] = "bad"
    outcomes = await device.embed([model.prepare(EmbeddingInput((text,))) for text in texts])
    failed = outcomes.pop(position)
    assert isinstance(failed, BatchFailed)
    assert isinstance(failed.__cause__, RuntimeError) and str(failed.__cause__) == "this input breaks the model"
    texts.pop(position)
    assert_vectors(outcomes, texts)
    # Halves: 8, 4 and 4, 2 and 2, 1 and 1.
    assert sorted(model.batches) == [1, 1, 2, 2, 4, 4, 8]


async def test_halving_lets_every_input_fail_by_itself(start: Start) -> None:
    model = FakeModel(fail_text="bad")
    device = start(model)
    outcomes = await device.embed([model.prepare(EmbeddingInput((f"bad {number}",))) for number in range(5)])
    assert [type(outcome) for outcome in outcomes] == [BatchFailed] * 5
    assert len({id(outcome) for outcome in outcomes}) == 5
    assert device.reports[0].failed == 5
    assert_vectors(await device.embed(prepare("good")), ["good"])


async def test_halving_goes_on_until_a_batch_fits_into_memory(start: Start) -> None:
    model = FakeModel(most_inputs=3)
    device = start(model)
    texts = texts_of(10)
    assert_vectors(await device.embed(prepare(*texts)), texts)
    assert model.batches == [10, 5, 2, 3, 5, 2, 3]
    assert device.reports[0].failed == 0


async def test_halving_lets_what_cannot_fit_alone_fail_alone(start: Start) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            if sum(item.num_tokens for item in batch) > 100:
                raise OutOfDeviceMemory("100 tokens is all that fits")
            return super().embed(batch)

    device = start(Model())
    texts = [*texts_of(6), "x" * 200, *texts_of(30)]
    outcomes = await device.embed(prepare(*texts))
    failed = outcomes.pop(6)
    assert isinstance(failed, BatchFailed) and isinstance(failed.__cause__, OutOfDeviceMemory)
    assert_vectors(outcomes, [*texts_of(6), *texts_of(30)])


async def test_halving_takes_a_stop_iteration_of_the_model_for_a_failure_like_others(start: Start) -> None:
    """A future refuses one, and a generator would end quietly with it."""

    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            raise StopIteration

    device = start(Model())
    outcomes = await device.embed(prepare("a", "b"))
    assert [type(outcome) for outcome in outcomes] == [BatchFailed] * 2


def _plainly(array: np.ndarray) -> None:
    raise OutOfDeviceMemory("does not fit")


def _with_a_cause(array: np.ndarray) -> None:
    try:
        _plainly(array)
    except OutOfDeviceMemory as error:
        raise RuntimeError("translated") from error


def _in_a_handler(array: np.ndarray) -> None:
    try:
        _plainly(array)
    except OutOfDeviceMemory:
        raise RuntimeError("while another was handled")  # noqa: B904


@pytest.fixture
def no_collector() -> Iterator[None]:
    """References alone decide what lives."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("fail", [_plainly, _with_a_cause, _in_a_handler])
async def test_halving_frees_a_failed_batchs_arrays_before_its_halves_are_tried(
    start: Start, fail: Callable[[np.ndarray], None], no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps log records, and the traceback in the record of an input that failed alone.
    monkeypatch.setattr(logging.getLogger("scheduler.device_worker"), "disabled", True)
    arrays: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            alive.append(sum(array() is not None for array in arrays))
            scratch = np.zeros(1000)
            arrays.append(weakref.ref(scratch))
            if len(batch) > 1 or batch[0].num_tokens == 5:
                fail(scratch)
            return super().embed(batch)

    device = start(Model())
    outcomes = await device.embed(prepare("1", "22", "3", "44"))
    assert [type(outcome) for outcome in outcomes] == [BatchFailed, Vector] * 2
    assert alive == [0] * 7


async def test_halving_frees_wrong_rows_before_the_halves_are_tried(start: Start, no_collector: None) -> None:
    arrays: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            alive.append(sum(array() is not None for array in arrays))
            rows = super().embed(batch)
            if len(batch) > 1:
                rows = rows * 2
                arrays.append(weakref.ref(rows))
            return rows

    device = start(Model())
    texts = texts_of(2)
    assert_vectors(await device.embed(prepare(*texts)), texts)
    assert alive == [0, 0, 0]


def _spoil(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(rows: np.ndarray) -> np.ndarray:
        rows[index] = value
        return rows

    return spoil


WRONG = {
    "one too few": lambda rows: rows[1:],
    "one too many": lambda rows: np.concatenate([rows, rows[:1]]),
    "none": lambda rows: rows[:0],
    "nothing": lambda rows: None,
    "flat": lambda rows: rows[:, 0],
    "a number that is none": _spoil(0, np.nan),
    "infinite": _spoil(-1, np.inf),
    "zero": _spoil(0, 0.0),
    "not of length 1": lambda rows: rows * 1.1,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
async def test_check_lets_no_wrong_vector_leave(start: Start, wrong: Callable[[np.ndarray], Any]) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            return wrong(super().embed(batch))

    device = start(Model())
    outcomes = await device.embed(prepare("a", "b", "c"))
    assert [type(outcome) for outcome in outcomes] == [BatchFailed] * 3
    assert device.worker.is_alive()


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
async def test_check_of_a_batch_has_what_is_right_alone_put_right(start: Start, wrong: Callable[[np.ndarray], Any]) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            rows = super().embed(batch)
            return wrong(rows) if len(batch) > 1 else rows

    device = start(Model())
    texts = texts_of(5)
    assert_vectors(await device.embed(prepare(*texts)), texts)


@pytest.mark.parametrize("value", [np.nan, 0.0])
async def test_check_fails_the_input_of_a_bad_row_alone(start: Start, value: float) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            rows = super().embed(batch)
            rows[[item.num_tokens > 100 for item in batch]] = value
            return rows

    device = start(Model())
    texts = texts_of(4)
    outcomes = await device.embed(prepare(*texts[:2], "x" * 200, *texts[2:]))
    assert isinstance(outcomes.pop(2), BatchFailed)
    assert_vectors(outcomes, texts)


# Identical inputs


async def occupy(device: Device, model: GatedModel) -> list[Waiter]:
    """Put an input on the device, whose gate is shut."""
    waiters = device.submit(prepare("in the way"), at=99.0)
    await until(model.entered.is_set)
    return waiters


async def test_single_flight_gives_all_waiters_the_vector_of_what_is_computed_once(start: Start, gated: GatedModel) -> None:
    device = start(gated)
    await occupy(device, gated)
    texts = ["a", "b", "a", "c", "a"]
    waiters = [*device.submit(prepare(*texts)), *device.submit(prepare("b"))]
    wake_ups = device.loop.wake_ups
    gated.gate.set()
    outcomes = await outcomes_of(waiters)
    assert_vectors(outcomes, [*texts, "b"])
    assert gated.batches == [1, 3]
    assert device.loop.wake_ups == wake_ups + 2
    assert [outcome.source for outcome in outcomes].count(Source.IN_FLIGHT) == 3
    report = device.reports[1]
    assert (report.size, len(report.waits), report.failed) == (3, 6, 0)
    assert report.num_tokens == sum(item.num_tokens for item in prepare("a", "b", "c"))


async def test_single_flight_gives_what_comes_during_the_pass_its_vector_too(start: Start, gated: GatedModel) -> None:
    device = start(gated)
    waiters = await occupy(device, gated)
    gated.clock.now = 100.25
    waiters += device.submit(prepare("in the way", "another"), at=100.25)
    gated.gate.set()
    first, second, third = await outcomes_of(waiters)
    assert_vectors([first, second, third], ["in the way", "in the way", "another"])
    assert gated.batches == [1, 1]
    assert (first.queue_seconds, first.device_seconds) == (1.0, 1.25)
    assert (second.queue_seconds, second.device_seconds) == (0.0, 1.0)
    assert device.reports[0].waits == [1.0, 0.0]
    assert [vector.source for vector in (first, second, third)] == [Source.COMPUTED, Source.IN_FLIGHT, Source.COMPUTED]


async def test_single_flight_gives_what_comes_after_the_pass_and_before_the_wake_up_its_vector_too(
    start: Start, gated: GatedModel
) -> None:
    device = start(gated)
    waiters = await occupy(device, gated)
    gated.gate.set()
    # The event loop is held up until the result is on its way to it.
    while device.loop.wake_ups < 2:
        time.sleep(0.001)
    waiters += device.submit(prepare("in the way"), at=150.0)
    first, second = await outcomes_of(waiters)
    assert_vectors([first, second], ["in the way"] * 2)
    assert (second.queue_seconds, second.device_seconds) == (0.0, 0.0)
    assert gated.batches == [1]


async def test_single_flight_goes_on_for_the_others_if_the_first_caller_has_gone(start: Start, gated: GatedModel) -> None:
    device = start(gated)
    first, second = device.submit(prepare("a", "a"))
    await until(gated.entered.is_set)
    first.future.cancel()
    gated.gate.set()
    assert_vectors([await second.future], ["a"])
    assert first.future.cancelled()
    assert device.cache.get(second.work.content_hash) is not None


async def test_single_flight_gives_every_waiter_of_a_failure_an_error_of_its_own(start: Start) -> None:
    model = FakeModel(fail_text="bad")
    device = start(model)
    inputs = [model.prepare(EmbeddingInput((text,))) for text in ("bad", "good", "bad", "good", "bad")]
    outcomes = await device.embed(inputs)
    assert [type(outcome) for outcome in outcomes] == [BatchFailed, Vector] * 2 + [BatchFailed]
    failures = outcomes[::2]
    assert len({id(failure) for failure in failures}) == 3
    assert {str(failure) for failure in failures} == {"the model could not embed this input"}
    assert {str(failure.__cause__) for failure in failures if failure} == {"this input breaks the model"}
    assert_vectors(outcomes[1::2], ["good"] * 2)
    assert (device.reports[0].size, device.reports[0].failed) == (2, 3)


async def test_single_flight_ends_with_the_batch_and_keeps_nothing(start: Start) -> None:
    device = start(FakeModel(fail_text="bad"))
    model = FakeModel(fail_text="bad")
    waiters = device.submit([model.prepare(EmbeddingInput((text,))) for text in ("a", "bad", "a")])
    works = [waiter.work for waiter in waiters]
    await outcomes_of(waiters)
    assert len(device.in_flight) == 0
    assert [work.waiters for work in works] == [[]] * 3, "a cycle, which keeps the input in memory"


async def test_single_flight_keeps_all_that_a_lost_device_held(start: Start, gated: GatedModel) -> None:
    gated.lose_after = 1
    device = start(gated)
    waiters = device.submit(prepare("a", "b", "a"))
    await until(gated.entered.is_set)
    waiters += device.submit(prepare("b"))
    gated.gate.set()
    await until(lambda: device.deaths)
    await device.ended()
    assert sorted(map(id, device.in_flight.finish_all())) == sorted(map(id, waiters))
    # Nothing joins what is lost.
    device.submit(prepare("a"))
    assert len(device.queue) == 1


async def test_single_flight_rows_cannot_be_changed(start: Start) -> None:
    device = start(FakeModel())
    for outcome in await device.embed(prepare("a", "a", "b")):
        assert isinstance(outcome, Vector)
        with pytest.raises(ValueError, match="read-only"):
            outcome.row *= 2


async def test_cache_gets_what_is_computed_and_nothing_that_failed(start: Start) -> None:
    model = FakeModel(fail_text="bad")
    device = start(model)
    inputs = [model.prepare(EmbeddingInput((text,))) for text in ("a", "bad", "b", "a")]
    await device.embed(inputs)
    assert len(device.cache) == 2
    for item, text in ((inputs[0], "a"), (inputs[2], "b")):
        row = device.cache.get(item.content_hash)
        assert row is not None and np.array_equal(row, model.vector(text))
        assert row.base is None, "a row keeps its batch alive"


# Futures that nobody waits for


async def test_futures_that_are_done_already_are_left_alone(start: Start, gated: GatedModel) -> None:
    device = start(gated)
    inputs = [*prepare(*texts_of(4)), *[gated.prepare(EmbeddingInput(("bad",)))] * 2]
    futures = [waiter.future for waiter in device.submit(inputs)]
    await until(gated.entered.is_set)
    futures[0].cancel()
    futures[1].set_exception(KeyError("another"))
    futures[4].cancel()
    gated.gate.set()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    expected = [asyncio.CancelledError, KeyError, Vector, Vector, asyncio.CancelledError, BatchFailed]
    assert [type(outcome) for outcome in outcomes] == expected
    assert_vectors(outcomes[2:4], texts_of(4)[2:])
    assert len(device.reports) == 1


# Death


async def test_death_of_the_device_resolves_nothing_that_it_held(start: Start) -> None:
    """What the halves before had is lost too: nothing that a device says as it goes is to be trusted."""
    model = FakeModel(most_inputs=2, lose_after=3)
    device = start(model, size=4)
    waiters = device.submit(prepare(*texts_of(6)))
    await until(lambda: device.deaths)
    await device.ended()
    (error,) = device.deaths
    assert isinstance(error, DeviceLost)
    assert model.batches == [4, 2, 2]
    assert not any(waiter.future.done() for waiter in waiters)
    assert not device.reports
    assert device.queue.drop_all() == waiters[4:]
    assert device.in_flight.finish_all() == waiters[:4]


async def test_death_of_the_device_is_not_tried_again(start: Start) -> None:
    model = FakeModel(lose_after=1)
    device = start(model)
    device.submit(prepare(*texts_of(8)))
    await until(lambda: device.deaths)
    await device.ended()
    assert model.batches == [8]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_death_of_the_thread_is_told(start: Start, error: BaseException) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            raise error

    device = start(Model())
    waiters = device.submit(prepare("a", "b"))
    await until(lambda: device.deaths)
    await device.ended()
    assert device.deaths == [error]
    assert device.in_flight.finish_all() == waiters
    assert device.worker.busy_seconds() == 0


async def test_death_is_told_of_an_error_of_the_queue(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    device = start(FakeModel())
    await until(lambda: device.loaded)

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(device.queue, "_take", fail)
    device.submit(prepare("a"))
    await until(lambda: device.deaths)
    assert isinstance(device.deaths[0], ZeroDivisionError)


async def test_close_of_the_queue_ends_the_thread_quietly(start: Start) -> None:
    device = start(FakeModel(), size=2)
    waiters = device.submit(prepare(*texts_of(5)))
    device.queue.close()
    await device.ended()
    assert all(waiter.future.done() for waiter in waiters)
    assert not device.deaths


def test_close_of_the_event_loop_does_not_break_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    places = Places(10)
    queue = BatchQueue(places, max_batch_tokens=10, max_batch_size=10)
    nothing: Any = lambda *_: None  # noqa: E731
    callbacks = Callbacks(nothing, nothing, nothing, nothing)
    worker = DeviceWorker(FakeModel, queue, SingleFlight(places), VectorCache(0), loop, callbacks)
    worker.start()
    queue.close()
    worker.join(PATIENCE_S)
    assert not worker.is_alive()
    assert "the event loop has closed" in caplog.text
    assert "the device's thread ends" not in caplog.text
