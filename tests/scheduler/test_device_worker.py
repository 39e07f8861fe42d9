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
from typing import Any

import numpy as np
import pytest

from models.base import DeviceLost, EmbeddingInput, EmbeddingModel, OutOfDeviceMemory, PreparedInput
from scheduler.batch_queue import BatchQueue
from scheduler.device_worker import Callbacks, DeviceWorker, Loaded
from scheduler.entry import BatchReport, Entry, Source, Submission, Vector
from scheduler.errors import BatchFailed
from scheduler.vector_cache import VectorCache
from tests.support.fakes import FakeModel

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
    loop: Any
    cache: VectorCache
    loaded: list[Loaded] = field(default_factory=list)
    load_errors: list[BaseException] = field(default_factory=list)
    reports: list[BatchReport] = field(default_factory=list)
    deaths: list[tuple[BaseException, Sequence[Entry]]] = field(default_factory=list)

    def submit(self, inputs: Sequence[PreparedInput]) -> list[Entry]:
        """One request; its entries."""
        now = time.monotonic()
        entries = [Entry(item, self.loop.loop.create_future(), now, now + 60) for item in inputs]
        self.queue.add(Submission(entries))
        return entries

    async def embed(self, inputs: Sequence[PreparedInput]) -> list[Vector | BaseException]:
        """What comes of the inputs, submitted as one request."""
        entries = self.submit(inputs)
        return await asyncio.gather(*(entry.future for entry in entries), return_exceptions=True)

    async def ended(self) -> None:
        """The thread has ended, and what it told has been heard."""
        await asyncio.to_thread(self.worker.join, PATIENCE_S)
        assert not self.worker.is_alive()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


Start = Callable[..., Device]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start a worker: `start(model)`. Nothing may go wrong on the event loop, and no thread may be left."""
    devices: list[Device] = []
    errors: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))

    def start(model: EmbeddingModel | Callable[[], EmbeddingModel], size: int = 256) -> Device:
        queue = BatchQueue(max_batch_tokens=1_000_000, max_batch_size=size)
        counting: Any = CountingLoop(loop)
        callbacks = Callbacks(
            on_loaded=lambda loaded: device.loaded.append(loaded),
            on_load_failed=lambda error: device.load_errors.append(error),
            on_batch=lambda report: device.reports.append(report),
            on_death=lambda error, held: device.deaths.append((error, held)),
        )
        cache = VectorCache(1 << 20)
        worker = DeviceWorker(model if callable(model) else lambda: model, queue, cache, counting, callbacks)
        device = Device(worker, queue, counting, cache)
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


async def test_the_device_belongs_to_one_thread_of_its_own(start: Start) -> None:
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
async def test_a_load_that_fails_is_told(start: Start, error: BaseException) -> None:
    def load() -> EmbeddingModel:
        raise error

    device = start(load)
    await until(lambda: device.load_errors)
    await device.ended()
    assert device.load_errors == [error]
    assert not device.loaded and not device.deaths


async def test_a_warm_up_that_fails_is_a_load_that_fails(start: Start) -> None:
    class Model(FakeModel):
        def warm_up(self) -> float:
            raise OutOfDeviceMemory("too large for this device")

    device = start(Model())
    await until(lambda: device.load_errors)
    assert isinstance(device.load_errors[0], OutOfDeviceMemory)
    assert not device.loaded


# A batch


async def test_every_input_gets_its_own_vector(start: Start) -> None:
    texts = texts_of(50)
    device = start(FakeModel(), size=7)
    assert_vectors(await device.embed(prepare(*texts)), texts)


async def test_one_wake_up_resolves_a_whole_batch(start: Start) -> None:
    model = FakeModel(gate=threading.Event())
    device = start(model, size=8)
    await until(lambda: device.loaded)
    assert device.loop.wake_ups == 1
    entries = device.submit(prepare(*texts_of(24)))
    model.gate.set()
    await asyncio.gather(*(entry.future for entry in entries))
    assert model.batches == [8, 8, 8]
    assert device.loop.wake_ups == 4


async def test_one_wake_up_resolves_a_batch_that_fails_in_part(start: Start) -> None:
    device = start(FakeModel(fail_text="bad"))
    await device.embed([*prepare(*texts_of(5)), FakeModel(fail_text="bad").prepare(EmbeddingInput(("bad",)))])
    assert device.loop.wake_ups == 2


async def test_all_futures_of_a_batch_are_done_together(start: Start) -> None:
    device = start(FakeModel())
    entries = device.submit(prepare(*texts_of(5)))
    done: list[list[bool]] = []
    for entry in entries:
        entry.future.add_done_callback(lambda _: done.append([entry.future.done() for entry in entries]))
    await asyncio.gather(*(entry.future for entry in entries))
    assert done == [[True] * 5] * 5


async def test_a_batch_is_reported(start: Start) -> None:
    model = FakeModel(gate=threading.Event(), seconds_per_batch=0.05, fail_text="bad")
    device = start(model)
    inputs = [*prepare("a", "bcd"), model.prepare(EmbeddingInput(("bad",)))]
    device.submit(prepare("in the way"))
    await until(lambda: device.worker.busy_seconds() > 0)
    entries = device.submit(inputs)
    await asyncio.sleep(0.05)
    model.gate.set()
    outcomes = await asyncio.gather(*(entry.future for entry in entries), return_exceptions=True)
    assert isinstance(outcomes[0], Vector) and isinstance(outcomes[2], BatchFailed)
    report = device.reports[1]
    assert (report.size, report.num_tokens, report.failed) == (3, sum(item.num_tokens for item in inputs), 1)
    assert len(report.waits) == 3 and all(0.05 <= wait < 10 for wait in report.waits)
    # Three fail, one passes, two fail, one passes, one fails: at least five passes of 0.05 s.
    assert 0.2 <= report.device_seconds < 10
    assert outcomes[0].queue_seconds == report.waits[0]
    assert 0.05 <= outcomes[0].device_seconds <= report.device_seconds
    assert device.reports[0].failed == 0


async def test_says_what_it_is_busy_with(start: Start) -> None:
    model = FakeModel(gate=threading.Event())
    device = start(model)
    await until(lambda: device.loaded)
    assert device.worker.busy_seconds() == 0
    entries = device.submit(prepare("a", "b"))
    await until(lambda: device.worker.busy_seconds() > 0.02)
    model.gate.set()
    await asyncio.gather(*(entry.future for entry in entries))
    assert device.worker.busy_seconds() == 0


async def test_an_idle_device_keeps_no_inputs_alive(start: Start) -> None:
    device = start(FakeModel())
    inputs = prepare("a", "b")
    arrays = [weakref.ref(item.token_ids) for item in inputs]
    await device.embed(inputs)
    del inputs
    await until(lambda: all(array() is None for array in arrays))


# Failures


@pytest.mark.parametrize("position", range(8))
async def test_an_exception_fails_its_input_alone(start: Start, position: int) -> None:
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


async def test_every_input_may_fail(start: Start) -> None:
    model = FakeModel(fail_text="bad")
    device = start(model)
    outcomes = await device.embed([model.prepare(EmbeddingInput((f"bad {number}",))) for number in range(5)])
    assert [type(outcome) for outcome in outcomes] == [BatchFailed] * 5
    assert len({id(outcome) for outcome in outcomes}) == 5
    assert device.reports[0].failed == 5
    assert_vectors(await device.embed(prepare("good")), ["good"])


async def test_out_of_memory_splits_until_it_fits(start: Start) -> None:
    model = FakeModel(most_inputs=3)
    device = start(model)
    texts = texts_of(10)
    assert_vectors(await device.embed(prepare(*texts)), texts)
    assert model.batches == [10, 5, 2, 3, 5, 2, 3]
    assert device.reports[0].failed == 0


async def test_what_cannot_fit_alone_fails_alone(start: Start) -> None:
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


async def test_a_stop_iteration_of_the_model_is_a_failure_like_others(start: Start) -> None:
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
async def test_a_failed_batchs_arrays_are_gone_when_its_halves_are_tried(
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


async def test_wrong_rows_are_gone_when_the_halves_are_tried(start: Start, no_collector: None) -> None:
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
async def test_a_wrong_vector_never_leaves(start: Start, wrong: Callable[[np.ndarray], Any]) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            return wrong(super().embed(batch))

    device = start(Model())
    outcomes = await device.embed(prepare("a", "b", "c"))
    assert [type(outcome) for outcome in outcomes] == [BatchFailed] * 3
    assert device.worker.is_alive()


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
async def test_what_goes_wrong_in_a_batch_and_not_alone_is_put_right(start: Start, wrong: Callable[[np.ndarray], Any]) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            rows = super().embed(batch)
            return wrong(rows) if len(batch) > 1 else rows

    device = start(Model())
    texts = texts_of(5)
    assert_vectors(await device.embed(prepare(*texts)), texts)


@pytest.mark.parametrize("value", [np.nan, 0.0])
async def test_one_bad_row_fails_its_input_alone(start: Start, value: float) -> None:
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


# Inputs that are alike


async def occupy(device: Device) -> list[Entry]:
    """Put an input on the device, whose gate is shut."""
    entries = device.submit(prepare("in the way"))
    await until(lambda: device.worker.busy_seconds() > 0)
    return entries


async def test_twins_get_the_vector_of_what_is_computed_once(start: Start) -> None:
    model = FakeModel(gate=threading.Event())
    device = start(model)
    await occupy(device)
    texts = ["a", "b", "a", "c", "a"]
    entries = [*device.submit(prepare(*texts)), *device.submit(prepare("b"))]
    wake_ups = device.loop.wake_ups
    model.gate.set()
    outcomes = await asyncio.gather(*(entry.future for entry in entries))
    assert_vectors(outcomes, [*texts, "b"])
    assert model.batches == [1, 3]
    assert device.loop.wake_ups == wake_ups + 2
    assert [outcome.source for outcome in outcomes].count(Source.IN_FLIGHT) == 3
    report = device.reports[1]
    assert (report.size, len(report.waits), report.failed) == (3, 6, 0)
    assert report.num_tokens == sum(item.num_tokens for item in prepare("a", "b", "c"))


async def test_what_comes_during_the_pass_gets_its_vector_with_the_others(start: Start) -> None:
    model = FakeModel(gate=threading.Event())
    device = start(model)
    entries = [*(await occupy(device))]
    await asyncio.sleep(0.05)
    entries += device.submit(prepare("in the way", "another"))
    model.gate.set()
    first, second, third = await asyncio.gather(*(entry.future for entry in entries))
    assert_vectors([first, second, third], ["in the way", "in the way", "another"])
    assert model.batches == [1, 1]
    assert second.queue_seconds == 0.0 < first.queue_seconds
    assert 0 < second.device_seconds <= first.device_seconds - 0.04
    assert min(device.reports[0].waits) == 0.0
    assert (second.source, third.source) == (Source.IN_FLIGHT, Source.COMPUTED)


async def test_a_leader_whose_caller_has_gone_changes_nothing_for_its_twins(start: Start) -> None:
    model = FakeModel(gate=threading.Event())
    device = start(model)
    await occupy(device)
    leader, twin = device.submit(prepare("a", "a"))
    model.gate.set()
    await until(lambda: leader.twins)
    leader.future.cancel()
    assert_vectors([await twin.future], ["a"])
    assert leader.future.cancelled()
    assert device.cache.get(twin.prepared.content_hash) is not None


async def test_a_failure_is_shared_each_with_an_error_of_its_own(start: Start) -> None:
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


async def test_a_device_that_is_lost_tells_of_twins_too(start: Start) -> None:
    model = FakeModel(gate=threading.Event(), lose_after=1)
    device = start(model)
    entries = device.submit(prepare("a", "b", "a"))
    await until(lambda: device.worker.busy_seconds() > 0)
    entries += device.submit(prepare("b"))
    model.gate.set()
    await until(lambda: device.deaths)
    await device.ended()
    ((_, held),) = device.deaths
    assert sorted(map(id, held)) == sorted(map(id, entries))
    # Nothing joins a device that is lost.
    device.submit(prepare("a"))
    assert len(device.queue) == 1


async def test_a_row_that_several_may_have_cannot_be_changed(start: Start) -> None:
    device = start(FakeModel())
    for outcome in await device.embed(prepare("a", "a", "b")):
        assert isinstance(outcome, Vector)
        with pytest.raises(ValueError, match="read-only"):
            outcome.row *= 2


async def test_what_is_computed_is_cached_and_nothing_that_failed(start: Start) -> None:
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


async def test_futures_that_are_done_already_are_left_alone(start: Start) -> None:
    model = FakeModel(gate=threading.Event(), fail_text="bad")
    device = start(model)
    inputs = [*prepare(*texts_of(4)), *[model.prepare(EmbeddingInput(("bad",)))] * 2]
    entries = device.submit(inputs)
    await until(lambda: device.worker.busy_seconds() > 0)
    futures = [entry.future for entry in entries]
    futures[0].cancel()
    futures[1].set_exception(KeyError("another"))
    futures[4].cancel()
    model.gate.set()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    expected = [asyncio.CancelledError, KeyError, Vector, Vector, asyncio.CancelledError, BatchFailed]
    assert [type(outcome) for outcome in outcomes] == expected
    assert_vectors(outcomes[2:4], texts_of(4)[2:])
    assert len(device.reports) == 1


# Death


async def test_a_lost_device_is_told_with_all_that_it_held(start: Start) -> None:
    """What the halves before had is lost too: nothing that a device says as it goes is to be trusted."""
    model = FakeModel(most_inputs=2, lose_after=3)
    device = start(model, size=4)
    entries = device.submit(prepare(*texts_of(6)))
    await until(lambda: device.deaths)
    await device.ended()
    ((error, held),) = device.deaths
    assert isinstance(error, DeviceLost)
    assert list(held) == entries[:4]
    assert model.batches == [4, 2, 2]
    assert len(device.queue) == 2
    assert not any(entry.future.done() for entry in entries)
    assert not device.reports


async def test_a_lost_device_is_not_tried_again(start: Start) -> None:
    model = FakeModel(lose_after=1)
    device = start(model)
    device.submit(prepare(*texts_of(8)))
    await until(lambda: device.deaths)
    await device.ended()
    assert model.batches == [8]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_a_thread_that_ends_says_so(start: Start, error: BaseException) -> None:
    class Model(FakeModel):
        def embed(self, batch: Sequence[PreparedInput]) -> Any:
            raise error

    device = start(Model())
    entries = device.submit(prepare("a", "b"))
    await until(lambda: device.deaths)
    await device.ended()
    ((told, held),) = device.deaths
    assert told is error
    assert list(held) == entries
    assert device.worker.busy_seconds() == 0


async def test_an_error_of_the_queue_ends_the_thread_with_a_word(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    device = start(FakeModel())
    await until(lambda: device.loaded)

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(device.queue, "_take", fail)
    device.submit(prepare("a"))
    await until(lambda: device.deaths)
    assert isinstance(device.deaths[0][0], ZeroDivisionError)
    assert list(device.deaths[0][1]) == []


async def test_closing_the_queue_ends_the_thread_quietly(start: Start) -> None:
    device = start(FakeModel(), size=2)
    entries = device.submit(prepare(*texts_of(5)))
    device.queue.close()
    await device.ended()
    assert all(entry.future.done() for entry in entries)
    assert not device.deaths


def test_a_closed_event_loop_does_not_break_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    queue = BatchQueue(max_batch_tokens=10, max_batch_size=10)
    nothing: Any = lambda *_: None  # noqa: E731
    worker = DeviceWorker(FakeModel, queue, VectorCache(0), loop, Callbacks(nothing, nothing, nothing, nothing))
    worker.start()
    queue.close()
    worker.join(PATIENCE_S)
    assert not worker.is_alive()
    assert "the event loop has closed" in caplog.text
    assert "the device's thread ends" not in caplog.text
