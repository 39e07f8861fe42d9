"""Scheduler: reserve, submit, start, drain. It owns the intake queue, the BatchQueue and the device's thread.

Not thread-safe: the event loop's thread alone calls it. The way of an input: `reserve` takes a place before any work is done for
it; `submit` puts it on the asyncio intake queue; a pump moves it into the BatchQueue; the DeviceWorker takes it in a batch and
resolves its future. A place is given back when the device takes the input, or its caller gives it up. An input that is identical
to one on the device gets the same result, and keeps its place until then. An input whose vector is cached gets it at `submit`,
and never waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

from models.base import EmbeddingModel, PreparedInput
from scheduler.batch_queue import BatchQueue
from scheduler.device_worker import Callbacks, DeviceWorker, Loaded
from scheduler.errors import DeadlineExceeded, Draining, NotReady, Overloaded, SchedulerError, WorkerDied
from scheduler.places import Places, Reservation
from scheduler.single_flight import SingleFlight
from scheduler.vector_cache import VectorCache
from scheduler.work import BatchReport, Source, Submission, Vector, Waiter, WaiterState, Work

log = logging.getLogger(__name__)

# How much the newest batch weighs in the measured rate.
RATE_WEIGHT = 0.2
WATCH_SECONDS = 0.25
MIN_STALL_SECONDS = 60.0


class State(Enum):
    """Whether work is taken. The values are what /health says."""

    LOADING = "loading"
    READY = "ok"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the scheduler. `max_batch_wait` and `worker_stall` are in seconds; one that is None follows from the rate."""

    max_batch_size: int = 256
    max_batch_tokens: int | None = None
    max_batch_wait: float = 0.0
    max_queue_size: int = 8192
    max_input_tokens: int = 8192
    worker_stall: float | None = None
    vector_cache_bytes: int = 0


class Scheduler:
    """The way from prepared inputs to their vectors. `load` makes the model, in the device's thread.

    The callbacks are called on the event loop. `on_failure(error, loaded)` is called if the model cannot be loaded, or after the
    futures have failed of a device that is lost.
    """

    def __init__(
        self,
        load: Callable[[], EmbeddingModel],
        limits: Limits,
        *,
        on_ready: Callable[[], None],
        on_batch: Callable[[BatchReport], None],
        on_failure: Callable[[BaseException, bool], None],
    ) -> None:
        self._load = load
        self._limits = limits
        self._on_ready = on_ready
        self._on_batch = on_batch
        self._on_failure = on_failure
        self.state = State.LOADING
        self.tokens_per_second = 0.0
        self._inputs_per_second = 0.0
        self._model: EmbeddingModel | None = None
        self._abandoned = False
        self._intake: asyncio.Queue[Submission] = asyncio.Queue()
        self._places = Places(limits.max_queue_size)
        self._in_flight = SingleFlight(self._places)
        self._queue = BatchQueue(
            self._places,
            max_batch_tokens=limits.max_batch_tokens,
            max_batch_size=limits.max_batch_size,
            max_batch_wait=limits.max_batch_wait,
        )
        self._cache = VectorCache(limits.vector_cache_bytes)
        self._worker: DeviceWorker | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the device's thread, which loads the model; `state` says when it is ready."""
        loop = asyncio.get_running_loop()
        callbacks = Callbacks(self._loaded, self._load_failed, self._batch_done, self._died)
        self._worker = DeviceWorker(self._load, self._queue, self._in_flight, self._cache, loop, callbacks)
        self._worker.start()
        self._tasks = [loop.create_task(self._pump(), name="intake"), loop.create_task(self._watch(), name="stall-watch")]

    def drain(self) -> None:
        """Refuse new work from here on; what is reserved or queued goes on."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    def abandon(self) -> None:
        """Fail all that the device has not taken, and what is submitted later, with Draining."""
        self._abandoned = True
        self._fail(self._drop_backlog(), Draining, "the server is stopping")

    async def stop(self, timeout: float = 5.0) -> None:
        """Abandon what waits, let the running batch end, and end the thread; a batch is given up after `timeout` seconds."""
        self.drain()
        self.abandon()
        self._queue.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._worker and self._model:
            await asyncio.to_thread(self._worker.join, timeout)
            self._fail(self._in_flight.finish_all(), Draining, "the server is stopping")

    @property
    def loaded_model(self) -> EmbeddingModel | None:
        return self._model

    @property
    def queue_depth(self) -> int:
        """Inputs that hold a place."""
        return self._places.in_use

    def retry_after(self) -> float:
        """Seconds until the backlog is worked off at the measured rate; 1 before the first batch."""
        return self.queue_depth / self._inputs_per_second if self._inputs_per_second else 1.0

    def check_open(self) -> None:
        """Raises NotReady, Draining or WorkerDied if no new work is taken."""
        match self.state:
            case State.LOADING:
                raise NotReady("the model is loading")
            case State.DRAINING:
                raise Draining("the server is stopping")
            case State.FAILED:
                raise WorkerDied("the device is lost")

    def reserve(self, count: int) -> Reservation:
        """Take `count` places for inputs that are not prepared yet. Raises as `check_open` does, or Overloaded."""
        self.check_open()
        if not self._places.take(count):
            raise Overloaded("the queue is full", self.retry_after())
        return Reservation(self._places, count, self._submit)

    def _submit(self, inputs: Sequence[PreparedInput], deadline: float) -> list[asyncio.Future[Vector]]:
        """Queue inputs, each with a place of its own; those whose vector is cached get it now, and give their place back."""
        if self.state is State.FAILED:
            raise WorkerDied("the device is lost")
        if self._abandoned:
            raise Draining("the server is stopping")
        loop, now = asyncio.get_running_loop(), time.monotonic()
        futures: list[asyncio.Future[Vector]] = []
        waiters: list[Waiter] = []
        for prepared in inputs:
            futures.append(loop.create_future())
            if (row := self._cache.get(prepared.content_hash)) is not None:
                futures[-1].set_result(Vector(row, 0.0, 0.0, Source.CACHED))
            else:
                waiters.append(Waiter(Work(prepared), futures[-1], now, deadline))
        self._places.give(len(inputs) - len(waiters))
        if waiters:
            self._queue_up(waiters, deadline)
        return futures

    def _queue_up(self, waiters: Sequence[Waiter], deadline: float) -> None:
        """Put a request's waiters on the intake queue, to be dropped when they are cancelled or late."""
        timer = asyncio.get_running_loop().call_at(deadline, self._expire, waiters)
        unsettled = len(waiters)

        def settle(waiter: Waiter, future: asyncio.Future[Vector]) -> None:
            nonlocal unsettled
            unsettled -= 1
            if not unsettled:
                timer.cancel()
            if future.cancelled():
                self._queue.drop(waiter)
            if waiter.state is WaiterState.DROPPED:
                self._in_flight.forget(waiter.work)

        for waiter in waiters:
            waiter.future.add_done_callback(partial(settle, waiter))
        self._intake.put_nowait(Submission(waiters))

    async def _pump(self) -> None:
        while True:
            submission = await self._intake.get()
            self._in_flight.join(submission)
            self._queue.add(submission)

    async def _watch(self) -> None:
        """Report a lost device if a forward pass does not end, or the thread has ended without a word."""
        worker = self._worker
        assert worker is not None
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._model is None or self.state is State.FAILED:
                continue
            if (busy := worker.busy_seconds()) > self.stall_seconds:
                self._died(WorkerDied(f"no progress on the device for {busy:.0f} s"))
            elif not worker.is_alive():
                self._died(WorkerDied("the device's thread has ended"))

    @property
    def stall_seconds(self) -> float:
        """Seconds that one forward pass may take: as set, or ten times what the longest should take at the measured rate."""
        if self._limits.worker_stall is not None:
            return self._limits.worker_stall
        longest = max(self._queue.max_batch_tokens, self._limits.max_input_tokens)
        return max(MIN_STALL_SECONDS, 10 * longest / self.tokens_per_second) if self.tokens_per_second else MIN_STALL_SECONDS

    def _loaded(self, loaded: Loaded) -> None:
        self._model, self.tokens_per_second = loaded.model, loaded.tokens_per_second
        if loaded.model.device == "cpu":
            self._queue.fit_to_cpu(loaded.tokens_per_second)
        if self.state is State.LOADING:
            self.state = State.READY
        log.info(
            "ready: %.0f tokens/s in the warm-up, batches of at most %d tokens, stalled after %.0f s",
            self.tokens_per_second,
            self._queue.max_batch_tokens,
            self.stall_seconds,
        )
        self._on_ready()

    def _load_failed(self, error: BaseException) -> None:
        self.state = State.FAILED
        self._on_failure(error, False)

    def _batch_done(self, report: BatchReport) -> None:
        # What fails at once says nothing of how fast the backlog is worked off; identical inputs are worked off like others.
        if done := len(report.waits) - report.failed:
            rate = done / max(report.device_seconds, 1e-6)
            self._inputs_per_second += (rate - self._inputs_per_second) * (RATE_WEIGHT if self._inputs_per_second else 1.0)
        self._on_batch(report)

    def _died(self, error: BaseException) -> None:
        # The thread and the watch may both tell of one death.
        if self.state is State.FAILED:
            return
        self.state = State.FAILED
        self._fail([*self._drop_backlog(), *self._in_flight.finish_all()], WorkerDied, "the device is lost")
        self._on_failure(error, True)

    def _drop_backlog(self) -> list[Waiter]:
        """Empty intake and queue; returns the waiters that were in them."""
        waiters: list[Waiter] = []
        while not self._intake.empty():
            waiters += filter(self._queue.drop, self._intake.get_nowait().waiters)
        return [*waiters, *self._queue.drop_all()]

    def _expire(self, waiters: Sequence[Waiter]) -> None:
        for waiter in waiters:
            self._queue.drop(waiter)
        # Those that the device's thread found late are told here too.
        late = [waiter for waiter in waiters if waiter.state is WaiterState.DROPPED]
        self._fail(late, DeadlineExceeded, "the deadline passed before the device was free")

    @staticmethod
    def _fail(waiters: Sequence[Waiter], error: type[SchedulerError], message: str) -> None:
        for waiter in waiters:
            if not waiter.future.done():
                waiter.future.set_exception(error(message))
