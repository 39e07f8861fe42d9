"""EmbeddingService: one request end to end. Reserve, prepare, submit, finish.

An input fails alone: with `partial` a Refusal takes its row, without it the request is refused and names the input.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.dialects.contract import EmbeddingRequest, Usage
from app.engine.memory import MemoryShare, RequestTooLarge, expected_bytes
from app.engine.preparation import Preparation, Tools
from app.engine.threads import BodyThreads
from models.base import Description, PreparedInput, Preparer, Refusal
from models.vectors import to_dimension
from scheduler.errors import BatchFailed, DeadlineExceeded, SchedulerError
from scheduler.scheduler import Scheduler
from scheduler.work import Vector

log = logging.getLogger(__name__)

# Replies of more rows are put together off the event loop: about a millisecond of work.
LARGE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's answer: a unit vector, float32 of shape (dimension,), or a Refusal for each input; timings in seconds."""

    rows: Sequence[npt.NDArray[np.float32] | Refusal]
    usage: Usage
    timings: dict[str, float]


class EmbeddingService:
    """The way from a validated request to its vectors. `preparer` raises NotReady while the model loads."""

    def __init__(self, scheduler: Scheduler, preparer: Callable[[], Preparer], tools: Tools, bodies: BodyThreads) -> None:
        self._scheduler = scheduler
        self._preparer = preparer
        self._tools = tools
        self._metrics = tools.metrics
        self._bodies = bodies

    async def embed(self, request: EmbeddingRequest, deadline: float, memory: MemoryShare) -> Outcome:
        """Embeds every item of a request. `deadline` is on the loop's clock; `memory` is charged for what is made.

        Raises Refused for an input at fault, the scheduler's errors, and as MemoryShare does.
        """
        started = time.monotonic()
        with self._scheduler.reserve(len(request.items)) as places:
            preparer = self._preparer()
            memory.expect(expected_bytes(request, preparer.info))
            async with until(deadline):
                prepared = await Preparation(self._tools, preparer, request, memory).prepare()
            memory.settle()
            prepare_seconds = time.monotonic() - started
            self._metrics.prepare_seconds.observe(prepare_seconds)
            good = [item for item in prepared if isinstance(item, PreparedInput)]
            futures = places.submit(good, deadline) if good else []
        answers = await self._wait(futures, request, prepared)
        return await self._bodies.run(len(answers) > LARGE_ROWS, self._finish, request, prepared, answers, prepare_seconds)

    async def describe(self, request: EmbeddingRequest, deadline: float, memory: MemoryShare) -> list[Description | Refusal]:
        """Describes what the model would read of every item, or says why an item cannot be had at all.

        Raises the scheduler's errors, RequestTooLarge for prompts that are longer together than a body may be, as those of a
        long instruction for many items are, and as MemoryShare does.
        """
        if request.characters > (most := self._tools.settings.max_request_bytes):
            raise RequestTooLarge(
                f"the prompts would have more than {most:,} characters together, with the instruction in each; "
                "send fewer inputs at a time, or a shorter instruction"
            )
        with self._scheduler.reserve(len(request.items)):
            async with until(deadline):
                return await Preparation(self._tools, self._preparer(), request, memory).describe()

    async def _wait(
        self, futures: Sequence[asyncio.Future[Vector]], request: EmbeddingRequest, prepared: Sequence[PreparedInput | Refusal]
    ) -> list[Vector | Refusal]:
        """Waits for the vector of every prepared input, or for its error if the request takes partial results."""
        try:
            results: Iterator[Any] = iter(await asyncio.gather(*futures, return_exceptions=request.partial))
        finally:
            for future in futures:
                # If one has failed, or the caller has gone, nobody waits for the others.
                future.cancel()
                if future.cancelled():
                    self._metrics.dropped.labels("cancelled").inc()
                elif isinstance(error := future.exception(), SchedulerError):
                    self._metrics.dropped.labels(error.reason).inc()
        answers: list[Any] = [item if isinstance(item, Refusal) else next(results) for item in prepared]
        faults = [answer for answer in answers if isinstance(answer, BatchFailed)]
        if faults:
            log.error("%d of %d inputs failed", len(faults), len(answers), exc_info=faults[0])
        return [Refusal(str(one), reason=one.reason) if isinstance(one, SchedulerError) else one for one in answers]

    def _finish(
        self,
        request: EmbeddingRequest,
        prepared: Sequence[PreparedInput | Refusal],
        answers: Sequence[Vector | Refusal],
        prepare_seconds: float,
    ) -> Outcome:
        """Cuts vectors to the dimension, and counts."""
        done = [
            (item, answer)
            for item, answer in zip(prepared, answers, strict=True)
            if isinstance(item, PreparedInput) and isinstance(answer, Vector)
        ]
        vectors = [vector for _, vector in done]
        usage = Usage(sum(item.text_tokens for item, _ in done), sum(item.image_tokens for item, _ in done))
        self._metrics.count_inputs(done)
        rows: Iterator[npt.NDArray[np.float32]] = iter(())
        if vectors:
            dimension = request.dimensions or self._tools.settings.embedding_dimension or self._preparer().info.width
            rows = iter(to_dimension(np.stack([vector.row for vector in vectors]), dimension))
        return Outcome(
            rows=[next(rows) if isinstance(answer, Vector) else answer for answer in answers],
            usage=usage,
            timings={
                "queue": max((vector.queue_seconds for vector in vectors), default=0.0),
                "prepare": prepare_seconds,
                "device": max((vector.device_seconds for vector in vectors), default=0.0),
            },
        )


@asynccontextmanager
async def until(deadline: float) -> AsyncIterator[None]:
    """Raises DeadlineExceeded if what is inside is not done by `deadline`, on the loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed while the inputs were prepared") from None
