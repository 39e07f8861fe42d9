"""EmbeddingService: one request end to end. Reserve, prepare, submit, finish.

An input fails alone: with `partial` its error takes its row, without it the request is refused and names the input.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from app.dialects.request import EmbeddingRequest
from app.engine.memory import MemoryShare, RequestTooLarge
from app.engine.preparation import Preparation, Tools, expected_bytes
from app.engine.threads import run_on
from app.errors import spec_for
from models.base import Description, PreparedInput
from models.vectors import to_dimension
from scheduler.errors import DeadlineExceeded
from scheduler.scheduler import Scheduler
from scheduler.work import Vector

T = TypeVar("T")

# Replies of more rows are put together off the event loop: about a millisecond of work.
LARGE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that the model read."""

    text_tokens: int
    image_tokens: int

    @property
    def total(self) -> int:
        return self.text_tokens + self.image_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's answer: a unit vector, float32 of shape (dimension,), or an error for each input; timings in seconds."""

    rows: Sequence[npt.NDArray[np.float32] | Exception]
    usage: Usage
    timings: dict[str, float]


class EmbeddingService:
    """The way from a validated request to its vectors. `bodies` are threads for large bodies and replies: not those that prepare
    inputs, so that neither waits for the other."""

    def __init__(self, scheduler: Scheduler, tools: Tools, bodies: Executor) -> None:
        self._scheduler = scheduler
        self._tools = tools
        self._metrics = tools.metrics
        self._bodies = bodies

    def dimension(self) -> int:
        """The components of a vector where a request asks for no other number. Raises NotReady."""
        return self._tools.settings.embedding_dimension or self._scheduler.model.info.width

    async def embed(self, request: EmbeddingRequest, deadline: float, memory: MemoryShare) -> Outcome:
        """Embed every item of a request. `deadline` is on the loop's clock; `memory` gets what is made of the request.

        Raises InputError for an input at fault, the scheduler's errors, and as MemoryShare does.
        """
        started = time.monotonic()
        with self._scheduler.reserve(len(request.items)) as places:
            model = self._scheduler.model
            memory.expect(expected_bytes(request, model.info))
            async with until(deadline):
                prepared = await Preparation(self._tools, model, request, memory).prepare()
            memory.settle()
            prepare_seconds = time.monotonic() - started
            self._metrics.prepare_seconds.observe(prepare_seconds)
            good = [item for item in prepared if isinstance(item, PreparedInput)]
            futures = places.submit(good, deadline) if good else []
        vectors = iter(await self._wait(futures, request))
        answers = [next(vectors) if isinstance(item, PreparedInput) else item for item in prepared]
        finish = partial(self._finish, request, prepared, answers, prepare_seconds)
        return await self.off_loop(finish) if len(answers) > LARGE_ROWS else finish()

    async def describe(self, request: EmbeddingRequest, deadline: float, memory: MemoryShare) -> list[Description | Exception]:
        """What the model would read of every item; an error in the place of an item that cannot be had at all.

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
                return await Preparation(self._tools, self._scheduler.model, request, memory).describe()

    async def off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run the parsing of a large body, or the writing of a large reply, off the event loop."""
        return await run_on(self._bodies, function, *arguments)

    async def _wait(self, futures: Sequence[asyncio.Future[Vector]], request: EmbeddingRequest) -> list[Vector | Exception]:
        """Every input's vector, or its error where the request takes partial results."""
        try:
            return await asyncio.gather(*futures, return_exceptions=request.partial)  # type: ignore[return-value]
        finally:
            for future in futures:
                # Where one has failed, or the caller has gone, nobody waits for the others.
                future.cancel()
                if future.cancelled():
                    self._metrics.dropped.labels("cancelled").inc()
                elif error := future.exception():
                    self._metrics.dropped.labels(spec_for(error).reason).inc()

    def _finish(
        self,
        request: EmbeddingRequest,
        prepared: Sequence[PreparedInput | Exception],
        answers: Sequence[Vector | Exception],
        prepare_seconds: float,
    ) -> Outcome:
        """Cut to the dimension, and count."""
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
            rows = iter(to_dimension(np.stack([vector.row for vector in vectors]), request.dimensions or self.dimension()))
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
    """Raises DeadlineExceeded where what is inside is not done by `deadline`, on the loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed while the inputs were prepared") from None
