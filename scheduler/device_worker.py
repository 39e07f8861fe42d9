"""DeviceWorker: the thread that owns a device. It loads the model, takes batches, runs them and resolves their futures.

It never dies silently. An error fails the inputs that fail alone and no other: a batch that raises, or runs out of memory, is
halved and tried again. A device that is lost, or an error in the thread itself, is told to `on_death`, with all that it held.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.base import DeviceLost, EmbeddingModel
from scheduler.batch_queue import BatchQueue
from scheduler.entry import Batch, BatchReport, Entry, Source, Vector
from scheduler.errors import BatchFailed
from scheduler.vector_cache import VectorCache

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.float32]
# Entries that are through, with what came of each.
Outcomes = Sequence[tuple[Entry, Vector | BatchFailed]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready, and its measured rate in tokens per second."""

    model: EmbeddingModel
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the worker tells the event loop; each is called there, never in the worker's thread."""

    on_loaded: Callable[[Loaded], None]
    on_load_failed: Callable[[BaseException], None]
    on_batch: Callable[[BatchReport], None]
    on_death: Callable[[BaseException, Sequence[Entry]], None]


class DeviceWorker:
    """One dedicated thread. `load` runs in it, so that everything of the device belongs to one thread. `cache` gets what is
    computed, on the event loop."""

    def __init__(
        self,
        load: Callable[[], EmbeddingModel],
        queue: BatchQueue,
        cache: VectorCache,
        loop: asyncio.AbstractEventLoop,
        callbacks: Callbacks,
    ) -> None:
        self._load = load
        self._queue = queue
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
        """How long the forward pass that is running has been running; 0 where none is."""
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
        batch: Batch | None = None
        try:
            while batch := self._queue.next_batch():
                self._run_batch(model, batch)
                # An idle device keeps no inputs alive.
                batch = None
        except BaseException as error:
            log.critical("the device's thread ends: %s", error, exc_info=True)
            self._queue.finish()
            held = [entry for leader in (batch.entries if batch else ()) for entry in (leader, *leader.twins)]
            self._tell(self._callbacks.on_death, error, held)

    def _run_batch(self, model: EmbeddingModel, batch: Batch) -> None:
        taken_at = time.monotonic()
        results: list[tuple[npt.NDArray[np.float32] | BatchFailed, float]] = []
        for entries, result in self._embed(model, batch.entries):
            done_at = time.monotonic()
            results += [(one, done_at) for one in ([result] * len(entries) if isinstance(result, BatchFailed) else result)]
        self._queue.finish()
        outcomes = [
            (one, _outcome(one, one is not leader, result, taken_at, done_at))
            for leader, (result, done_at) in zip(batch.entries, results, strict=True)
            for one in (leader, *leader.twins)
        ]
        report = BatchReport(
            size=len(batch.entries),
            num_tokens=batch.num_tokens,
            waits=[_waited(entry, taken_at) for entry, _ in outcomes],
            device_seconds=time.monotonic() - taken_at,
            failed=sum(isinstance(outcome, BatchFailed) for _, outcome in outcomes),
        )
        self._tell(self._resolve, outcomes, report)

    def _embed(self, model: EmbeddingModel, entries: Sequence[Entry]) -> Iterator[tuple[Sequence[Entry], Rows | BatchFailed]]:
        """Run entries, in halves where the whole fails; yields them in order, with their rows, or alone with their error."""
        result = self._attempt(model, entries)
        if len(entries) == 1 or not isinstance(result, BatchFailed):
            yield entries, result
        else:
            middle = len(entries) // 2
            yield from self._embed(model, entries[:middle])
            yield from self._embed(model, entries[middle:])

    def _attempt(self, model: EmbeddingModel, entries: Sequence[Entry]) -> Rows | BatchFailed:
        """One forward pass: its rows, or its failure. Raises DeviceLost."""
        self._busy_since = time.monotonic()
        try:
            rows = model.embed([entry.prepared for entry in entries])
            _check(rows, len(entries))
            # A row goes to all callers of its input: what one does with it, the others must not see.
            rows = rows.view()
            rows.flags.writeable = False
            return rows
        except DeviceLost:
            raise
        except Exception as error:
            alone = len(entries) == 1
            log.warning("a batch of %d inputs failed: %s: %s", len(entries), type(error).__name__, error, exc_info=alone)
            # Without tracebacks, its own or a chained error's: they would hold the batch's tensors while the halves are tried.
            error.__cause__ = error.__context__ = None
            failed = BatchFailed("the model could not embed this input")
            failed.__cause__ = error.with_traceback(None)
            return failed
        finally:
            self._busy_since = None

    def _resolve(self, outcomes: Outcomes, report: BatchReport) -> None:
        """On the loop: all futures of a batch in one wake-up."""
        for entry, outcome in outcomes:
            if isinstance(outcome, Vector) and outcome.source is Source.COMPUTED:
                self._cache.put(entry.prepared.content_hash, outcome.row)
            if entry.future.done():
                continue
            if isinstance(outcome, BatchFailed):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)
        self._callbacks.on_batch(report)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            log.warning("the event loop has closed; a result of the device's thread is lost")


def _outcome(
    entry: Entry, is_twin: bool, result: npt.NDArray[np.float32] | BatchFailed, taken_at: float, done_at: float
) -> Vector | BatchFailed:
    """What an entry gets of its batch's result for its input. A twin gets an error of its own: raising one changes it."""
    if not isinstance(result, BatchFailed):
        source = Source.IN_FLIGHT if is_twin else Source.COMPUTED
        # A twin may have come when its leader's part of the batch was done.
        device_seconds = max(0.0, done_at - max(taken_at, entry.enqueued_at))
        return Vector(result, _waited(entry, taken_at), device_seconds, source)
    if not is_twin:
        return result
    failed = BatchFailed(*result.args)
    failed.__cause__ = result.__cause__
    return failed


def _waited(entry: Entry, taken_at: float) -> float:
    """Seconds; 0 for one that came while its twin was being computed."""
    return max(0.0, taken_at - entry.enqueued_at)


def _check(rows: Rows, count: int) -> None:
    """As many vectors as inputs, all of them finite and of length 1: a wrong vector must never leave. Raises ValueError."""
    if len(rows) != count:
        raise ValueError(f"{len(rows)} vectors for {count} inputs")
    if not np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-2):
        raise ValueError("a vector is not finite, or not of length 1")
