"""DeviceWorker: the thread that owns a device. It loads the model, takes batches, runs them and resolves their futures.

It never dies silently. An error fails the inputs that fail alone and no other: a batch that raises, or runs out of memory, is
halved and tried again. `on_death` is called if the device is lost, or after an error in the thread itself.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.base import DeviceLost, EmbeddingModel
from scheduler.batch_queue import BatchQueue
from scheduler.errors import BatchFailed
from scheduler.single_flight import SingleFlight
from scheduler.vector_cache import VectorCache
from scheduler.work import Batch, BatchReport, Source, Vector, Waiter, Work

log = logging.getLogger(__name__)

# A vector, float32 of shape (width,), and several, of shape (inputs, width).
Row = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready, and its measured rate in tokens per second."""

    model: EmbeddingModel
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Computed:
    """A batch that the device is done with. Each Work has a result, its row or its failure, and the time when that was there."""

    batch: Batch
    results: Sequence[tuple[Row | BatchFailed, float]]
    taken_at: float
    device_seconds: float


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the worker tells the event loop; each is called there, never in the worker's thread."""

    on_loaded: Callable[[Loaded], None]
    on_load_failed: Callable[[BaseException], None]
    on_batch: Callable[[BatchReport], None]
    on_death: Callable[[BaseException], None]


class DeviceWorker:
    """One dedicated thread. `load` runs in it, so that everything of the device belongs to one thread.

    `in_flight` and `cache` are the event loop's: only what the worker calls there uses them.
    """

    def __init__(
        self,
        load: Callable[[], EmbeddingModel],
        queue: BatchQueue,
        in_flight: SingleFlight,
        cache: VectorCache,
        loop: asyncio.AbstractEventLoop,
        callbacks: Callbacks,
    ) -> None:
        self._load = load
        self._queue = queue
        self._in_flight = in_flight
        self._cache = cache
        self._loop = loop
        self._callbacks = callbacks
        self._busy_since: float | None = None
        # A daemon: a forward pass that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def busy_seconds(self) -> float:
        """Return for how long the current forward pass has been running; 0 if there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self) -> None:
        try:
            model = self._load()
            loaded = Loaded(model, model.warm_up())
        except BaseException as error:
            self._tell(self._callbacks.on_load_failed, error)
            return
        self._tell(self._callbacks.on_loaded, loaded)
        try:
            while batch := self._queue.next_batch():
                self._run_batch(model, batch)
                # An idle device keeps no inputs in memory.
                batch = None
        except BaseException as error:
            log.critical("the device's thread ends: %s", error, exc_info=True)
            self._tell(self._callbacks.on_death, error)

    def _run_batch(self, model: EmbeddingModel, batch: Batch) -> None:
        taken_at = time.monotonic()
        results: list[tuple[Row | BatchFailed, float]] = []
        for works, result in self._embed(model, batch.works):
            done_at = time.monotonic()
            results += [(one, done_at) for one in ([result] * len(works) if isinstance(result, BatchFailed) else result)]
        self._tell(self._finish, Computed(batch, results, taken_at, time.monotonic() - taken_at))

    def _embed(self, model: EmbeddingModel, works: Sequence[Work]) -> Iterator[tuple[Sequence[Work], Rows | BatchFailed]]:
        """Run works, in halves if they fail together. Yields them in order: each failed one alone, the others with their rows."""
        result = self._attempt(model, works)
        if len(works) == 1 or not isinstance(result, BatchFailed):
            yield works, result
        else:
            middle = len(works) // 2
            yield from self._embed(model, works[:middle])
            yield from self._embed(model, works[middle:])

    def _attempt(self, model: EmbeddingModel, works: Sequence[Work]) -> Rows | BatchFailed:
        """Run one forward pass; returns its rows, float32 of shape (len(works), width), or its failure. Raises DeviceLost."""
        self._busy_since = time.monotonic()
        try:
            rows = model.embed([work.prepared for work in works])
            _check(rows, len(works))
            # A row goes to every waiter of its Work: what one does with it, the others must not see.
            rows = rows.view()
            rows.flags.writeable = False
            return rows
        except DeviceLost:
            raise
        except Exception as error:
            alone = len(works) == 1
            told = ("a batch of %d inputs failed: %s: %s", len(works), type(error).__name__, error)
            # One input that fails is logged under the id of its request.
            context = works[0].waiters[0].context if alone and works[0].waiters else copy_context()
            context.run(log.warning, *told, exc_info=alone)
            # Without tracebacks, its own or a chained error's: they would hold the batch's tensors while the halves are tried.
            error.__cause__ = error.__context__ = None
            failed = BatchFailed("the model could not embed this input")
            failed.__cause__ = error.with_traceback(None)
            return failed
        finally:
            self._busy_since = None

    def _finish(self, computed: Computed) -> None:
        """Resolve all futures of a batch in one wake-up, and report it. Called on the event loop."""
        try:
            report = self._resolve(computed)
        except Exception as error:
            # Those whose futures are still open would wait for good.
            log.critical("the results of a batch are lost: %s", error, exc_info=True)
            self._callbacks.on_death(error)
        else:
            self._callbacks.on_batch(report)

    def _resolve(self, computed: Computed) -> BatchReport:
        batch, taken_at = computed.batch, computed.taken_at
        outcomes: list[tuple[Waiter, Vector | BatchFailed]] = []
        for work, (result, done_at) in zip(batch.works, computed.results, strict=True):
            for waiter in work.waiters:
                source = Source.IN_FLIGHT if waiter is not work.waiters[0] else Source.COMPUTED
                outcomes.append((waiter, _outcome(waiter, source, result, taken_at, done_at)))
            if not isinstance(result, BatchFailed):
                self._cache.put(work.content_hash, result)
        for waiter, outcome in outcomes:
            if waiter.future.done():
                continue
            if isinstance(outcome, BatchFailed):
                waiter.future.set_exception(outcome)
            else:
                waiter.future.set_result(outcome)
        self._in_flight.finish(batch.works)
        return BatchReport(
            size=len(batch.works),
            num_tokens=batch.num_tokens,
            waits=[_waited(waiter, taken_at) for waiter, _ in outcomes],
            device_seconds=computed.device_seconds,
            failed=sum(isinstance(outcome, BatchFailed) for _, outcome in outcomes),
        )

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            log.warning("the event loop has closed; a result of the device's thread is lost")


def _outcome(waiter: Waiter, source: Source, result: Row | BatchFailed, taken_at: float, done_at: float) -> Vector | BatchFailed:
    """Return what a waiter gets of its Work's result: the vector, or an error of its own, since raising one changes it."""
    if isinstance(result, BatchFailed):
        failed = BatchFailed(*result.args)
        failed.__cause__ = result.__cause__
        return failed
    # A waiter may have come when its part of the batch was done.
    device_seconds = max(0.0, done_at - max(taken_at, waiter.enqueued_at))
    return Vector(result, _waited(waiter, taken_at), device_seconds, source)


def _waited(waiter: Waiter, taken_at: float) -> float:
    """Return the seconds until a waiter's Work was taken; 0 if the waiter came after that."""
    return max(0.0, taken_at - waiter.enqueued_at)


def _check(rows: Rows, count: int) -> None:
    """Raise ValueError unless there are `count` vectors, all finite and of length 1: a wrong vector must never leave."""
    if len(rows) != count:
        raise ValueError(f"{len(rows)} vectors for {count} inputs")
    if not np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-2):
        raise ValueError("a vector is not finite, or not of length 1")
