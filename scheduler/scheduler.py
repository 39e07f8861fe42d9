"""Scheduler: reserve, submit, start, drain. It owns the intake queue, the BatchQueue and the device's thread.

All methods are for the event loop's thread. The way of an input: `reserve` sets a place aside before any work is done for it;
`submit` puts it on the asyncio intake queue; a pump moves it into the BatchQueue; the DeviceWorker takes it in a batch and
resolves its future. A place is given back when the device takes the input, or its caller gives it up. An input whose vector is
cached gets it at `submit`, and never waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from models.base import EmbeddingModel, PreparedInput
from scheduler.batch_queue import BatchQueue
from scheduler.device_worker import Callbacks, DeviceWorker, Loaded
from scheduler.entry import BatchReport, Entry, EntryState, Source, Submission, Vector
from scheduler.errors import DeadlineExceeded, Draining, NotReady, Overloaded, SchedulerError, WorkerDied
from scheduler.vector_cache import VectorCache

log = logging.getLogger(__name__)

# How much the newest batch weighs in the measured rate.
RATE_WEIGHT = 0.2
DEFAULT_BATCH_TOKENS = 8192
# On a CPU a batch of this length keeps the matrix products busy, and a single text need not wait long for it.
CPU_BATCH_SECONDS = 0.25
MIN_CPU_BATCH_TOKENS = 256
WATCH_SECONDS = 0.25
MIN_STALL_SECONDS = 60.0


class State(Enum):
    LOADING = "loading"
    READY = "ok"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the scheduler. `max_batch_wait` and `worker_stall` are in seconds; None follows from the measured rate."""

    max_batch_size: int = 256
    max_batch_tokens: int | None = None
    max_batch_wait: float = 0.0
    max_queue_size: int = 8192
    max_input_tokens: int = 8192
    worker_stall: float | None = None
    vector_cache_bytes: int = 0


class Reservation:
    """Places in the queue for inputs that are not prepared yet. A context manager: what was not submitted is given back."""

    def __init__(self, scheduler: Scheduler, count: int) -> None:
        self._scheduler = scheduler
        self._left = count

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release(self._left)

    def release(self, count: int) -> None:
        """Give back `count` places that will not be used."""
        self._left -= count
        self._scheduler._reserved -= count

    def submit(self, inputs: Sequence[PreparedInput], deadline: float) -> list[asyncio.Future[Vector]]:
        """Queue prepared inputs; one future each, in order. `deadline` is on the monotonic clock.

        A future raises DeadlineExceeded, BatchFailed, Draining or WorkerDied; cancelling it takes its input out of the queue.
        """
        if len(inputs) > self._left:
            raise ValueError(f"{len(inputs)} inputs for {self._left} places")
        self.release(len(inputs))
        return self._scheduler._submit(inputs, deadline)


class Scheduler:
    """`load` makes the model, in the device's thread; the callbacks are called on the event loop.

    `on_failure(error, loaded)` is told of a model that cannot be loaded, or of a device that is lost, its futures resolved.
    """

    def __init__(
        self,
        load: Callable[[], EmbeddingModel],
        limits: Limits,
        *,
        on_ready: Callable[[EmbeddingModel], None],
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
        self._reserved = 0
        self._arriving = 0
        self._abandoned = False
        self._intake: asyncio.Queue[Submission] = asyncio.Queue()
        self._queue = BatchQueue(
            max_batch_tokens=limits.max_batch_tokens or DEFAULT_BATCH_TOKENS,
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
        self._worker = DeviceWorker(self._load, self._queue, self._cache, loop, callbacks)
        self._worker.start()
        self._tasks = [loop.create_task(self._pump(), name="intake"), loop.create_task(self._watch(), name="stall-watch")]

    def drain(self) -> None:
        """Refuse new work from here on; what is reserved or queued goes on."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    def abandon(self) -> None:
        """Fail all that the device has not taken, and what is submitted later, with Draining."""
        self._abandoned = True
        self._fail(self._unstarted(), Draining, "the server is stopping")

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
            self._fail(self._queue.finish(), Draining, "the server is stopping")

    @property
    def model(self) -> EmbeddingModel:
        """The loaded model. Raises NotReady."""
        if self._model is None:
            raise NotReady("the model is loading")
        return self._model

    @property
    def loaded_model(self) -> EmbeddingModel | None:
        return self._model

    @property
    def queue_depth(self) -> int:
        """Inputs that hold a place: reserved, arriving, waiting for the device, or for one like them that it has taken before."""
        return self._reserved + self._arriving + len(self._queue) + self._queue.joined

    def retry_after(self) -> float:
        """Seconds until the backlog of this moment is worked off, at the measured rate."""
        return self.queue_depth / self._inputs_per_second if self._inputs_per_second else 1.0

    def check_open(self) -> None:
        """Raises NotReady, Draining or WorkerDied where no new work is taken."""
        match self.state:
            case State.LOADING:
                raise NotReady("the model is loading")
            case State.DRAINING:
                raise Draining("the server is stopping")
            case State.FAILED:
                raise WorkerDied("the device is lost")

    def reserve(self, count: int) -> Reservation:
        """Set `count` places aside. Raises as `check_open` does, or Overloaded."""
        self.check_open()
        if self.queue_depth + count > self._limits.max_queue_size:
            raise Overloaded("the queue is full", self.retry_after())
        self._reserved += count
        return Reservation(self, count)

    def _submit(self, inputs: Sequence[PreparedInput], deadline: float) -> list[asyncio.Future[Vector]]:
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        if self.state is State.FAILED:
            raise WorkerDied("the device is lost")
        if self._abandoned:
            raise Draining("the server is stopping")
        futures: list[asyncio.Future[Vector]] = []
        entries: list[Entry] = []
        for prepared in inputs:
            futures.append(loop.create_future())
            if (row := self._cache.get(prepared.content_hash)) is not None:
                futures[-1].set_result(Vector(row, 0.0, 0.0, Source.CACHED))
            else:
                entries.append(Entry(prepared, futures[-1], now, deadline))
        if entries:
            self._queue_up(entries, deadline)
        return futures

    def _queue_up(self, entries: Sequence[Entry], deadline: float) -> None:
        """Put a request's entries on the intake queue, to be dropped when they are cancelled or late."""
        loop = asyncio.get_running_loop()
        timer = loop.call_at(deadline, self._expire, entries)
        unsettled = len(entries)

        def settle(entry: Entry) -> None:
            nonlocal unsettled
            unsettled -= 1
            if not unsettled:
                timer.cancel()
            if entry.future.cancelled():
                self._queue.drop(entry)

        for entry in entries:
            entry.future.add_done_callback(lambda _, entry=entry: settle(entry))  # type: ignore[misc]
        self._arriving += len(entries)
        self._intake.put_nowait(Submission(entries))

    async def _pump(self) -> None:
        while True:
            submission = await self._intake.get()
            self._arriving -= len(submission.entries)
            self._queue.add(submission)

    async def _watch(self) -> None:
        """A forward pass that does not end, or a thread that has gone without a word, is a lost device."""
        worker = self._worker
        assert worker is not None
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._model is None or self.state is State.FAILED:
                continue
            if (busy := worker.busy_seconds()) > self.stall_seconds:
                self._died(WorkerDied(f"no progress on the device for {busy:.0f} s"), self._queue.finish())
            elif not worker.is_alive():
                self._died(WorkerDied("the device's thread has ended"), self._queue.finish())

    @property
    def stall_seconds(self) -> float:
        """How long one forward pass may take: as set, or ten times what the longest should take at the measured rate."""
        if self._limits.worker_stall is not None:
            return self._limits.worker_stall
        longest = max(self._queue.max_batch_tokens, self._limits.max_input_tokens)
        return max(MIN_STALL_SECONDS, 10 * longest / self.tokens_per_second) if self.tokens_per_second else MIN_STALL_SECONDS

    def _loaded(self, loaded: Loaded) -> None:
        self._model, self.tokens_per_second = loaded.model, loaded.tokens_per_second
        if self._limits.max_batch_tokens is None and loaded.model.info.device == "cpu":
            tokens = int(loaded.tokens_per_second * CPU_BATCH_SECONDS)
            self._queue.max_batch_tokens = min(max(tokens, MIN_CPU_BATCH_TOKENS), DEFAULT_BATCH_TOKENS)
        if self.state is State.LOADING:
            self.state = State.READY
        log.info(
            "ready: %.0f tokens/s in the warm-up, batches of at most %d tokens, stalled after %.0f s",
            self.tokens_per_second,
            self._queue.max_batch_tokens,
            self.stall_seconds,
        )
        self._on_ready(loaded.model)

    def _load_failed(self, error: BaseException) -> None:
        self.state = State.FAILED
        self._on_failure(error, False)

    def _batch_done(self, report: BatchReport) -> None:
        # What fails at once says nothing of how fast the backlog is worked off; a twin is worked off like any other.
        if done := len(report.waits) - report.failed:
            rate = done / max(report.device_seconds, 1e-6)
            self._inputs_per_second += (rate - self._inputs_per_second) * (RATE_WEIGHT if self._inputs_per_second else 1.0)
        self._on_batch(report)

    def _died(self, error: BaseException, held: Sequence[Entry]) -> None:
        # The thread and the watch may both tell of one death, and only the first of them to ask was given what it held.
        self._fail(held, WorkerDied, "the device is lost")
        if self.state is State.FAILED:
            return
        self.state = State.FAILED
        self._fail(self._unstarted(), WorkerDied, "the device is lost")
        self._on_failure(error, True)

    def _unstarted(self) -> list[Entry]:
        """Empty intake and queue."""
        while not self._intake.empty():
            submission = self._intake.get_nowait()
            self._arriving -= len(submission.entries)
            self._queue.add(submission)
        return self._queue.take_all()

    def _expire(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._queue.drop(entry)
        late = [entry for entry in entries if entry.state is EntryState.DROPPED]
        self._fail(late, DeadlineExceeded, "the deadline passed before the device was free")

    @staticmethod
    def _fail(entries: Sequence[Entry], error: type[SchedulerError], message: str) -> None:
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(error(message))
