"""EmbeddingService: one request end to end. Reserve, fetch, decode, prepare, submit, finish.

An input fails alone: with `partial` its error takes its row, without it the request is refused and names the input.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.dialects import EmbeddingRequest, ImageSource, InvalidRequest, RequestItem
from app.errors import InputError, row_for
from app.image_decode import ImageInvalid, decode_image
from app.image_fetch import ImageFetcher, ImageUnavailable
from app.metrics import Metrics
from app.replies import Usage
from app.settings import Settings
from models.base import Description, EmbeddingInput, EmbeddingModel, InvalidInput, PreparedInput
from models.pooling import to_dimension
from scheduler.entry import Vector
from scheduler.errors import DeadlineExceeded
from scheduler.scheduler import Scheduler

T = TypeVar("T")

# Short texts are tokenised where they are; the way to a thread and back takes longer than the work.
INLINE_CHARACTERS = 1024
# Texts that one thread prepares in one go.
CHUNK = 64
# Items with image URLs from the start of their downloads to their patches: what arrives must not pile up before the pool.
DOWNLOADS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's answer: a unit vector, float32 of shape (dimension,), or an error for each input; timings in seconds."""

    rows: Sequence[npt.NDArray[np.float32] | Exception]
    usage: Usage
    timings: dict[str, float]


class EmbeddingService:
    """The way from a validated request to its vectors. `pool` runs what takes the CPU: decoding, resizing, tokenising."""

    def __init__(self, settings: Settings, scheduler: Scheduler, fetcher: ImageFetcher, metrics: Metrics, pool: Executor) -> None:
        self._settings = settings
        self._scheduler = scheduler
        self._fetcher = fetcher
        self._metrics = metrics
        self._pool = pool
        self._download_slots = asyncio.Semaphore(DOWNLOADS_AT_ONCE)

    def dimension(self) -> int:
        """The components of a vector where a request asks for no other number. Raises NotReady."""
        return self._settings.embedding_dimension or self._scheduler.model.info.width

    async def embed(self, request: EmbeddingRequest, deadline: float) -> Outcome:
        """Embed every item of a request. `deadline` is on the loop's clock.

        Raises InputError for an input at fault, and the scheduler's errors.
        """
        started = time.monotonic()
        with self._scheduler.reserve(len(request.items)) as places:
            async with until(deadline):
                prepared = await self._prepare_all(request)
            prepare_seconds = time.monotonic() - started
            self._metrics.prepare_seconds.observe(prepare_seconds)
            good = [item for item in prepared if isinstance(item, PreparedInput)]
            futures = places.submit(good, deadline) if good else []
        vectors = iter(await self._wait(futures, request))
        answers = [next(vectors) if isinstance(item, PreparedInput) else item for item in prepared]
        return self._finish(request, prepared, answers, prepare_seconds)

    async def describe(self, request: EmbeddingRequest, deadline: float) -> list[Description | Exception]:
        """What the model would read of every item; an error in the place of an item that cannot be had at all."""
        with self._scheduler.reserve(len(request.items)):
            async with until(deadline):
                return await run_all([self._describe_one(item, request) for item in request.items])

    async def in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what takes the CPU off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _prepare_all(self, request: EmbeddingRequest) -> list[PreparedInput | Exception]:
        """Every item prepared, or its error: raised for the first at fault unless the request takes partial results."""
        results: dict[int, PreparedInput | Exception] = {}
        jobs: list[Coroutine[Any, Any, None]] = []
        texts: list[int] = []
        for index, item in enumerate(request.items):
            if isinstance(item, InvalidRequest):
                results[index] = item
            elif all(isinstance(part, str) for part in item.parts):
                texts.append(index)
            else:
                jobs.append(self._prepare_images(item, index, request, results))
        for start in range(0, len(texts), CHUNK):
            jobs.append(self._prepare_texts(texts[start : start + CHUNK], request, results))
        if len(jobs) == 1:
            await jobs[0]
        else:
            await run_all(jobs)
        return [results[index] for index in range(len(request.items))]

    async def _prepare_texts(
        self, indices: Sequence[int], request: EmbeddingRequest, results: dict[int, PreparedInput | Exception]
    ) -> None:
        """Items of text alone, several in one go."""
        items = [item for index in indices if isinstance(item := request.items[index], RequestItem)]
        inputs = [embedding_input(item, item.parts, request) for item in items]
        inline = len(items) == 1 and sum(len(part) for part in items[0].parts if isinstance(part, str)) <= INLINE_CHARACTERS
        prepare = partial(prepare_each, self._scheduler.model, inputs)
        for index, result in zip(indices, prepare() if inline else await self.in_pool(prepare), strict=True):
            results[index] = placed(result, index, request)

    async def _prepare_images(
        self, item: RequestItem, index: int, request: EmbeddingRequest, results: dict[int, PreparedInput | Exception]
    ) -> None:
        """An item with images: its URLs fetched, then everything else in one go."""
        try:
            result: PreparedInput | Exception = await self._with_images(self._scheduler.model.prepare, item, request)
        except (InputError, InvalidInput) as error:
            result = error
        results[index] = placed(result, index, request)

    async def _describe_one(self, item: RequestItem | InvalidRequest, request: EmbeddingRequest) -> Description | Exception:
        if isinstance(item, InvalidRequest):
            return item
        try:
            return await self._with_images(self._scheduler.model.describe, item, request)
        except (InputError, InvalidInput) as error:
            return error if isinstance(error, InputError) else InputError(error, item.param)

    async def _with_images(self, then: Callable[[EmbeddingInput], T], item: RequestItem, request: EmbeddingRequest) -> T:
        """Fetch and decode an item's images, and hand the whole to the model. Raises InputError, InvalidInput."""
        # A slow host may hold up other downloads, never what came with the request.
        downloads = any(isinstance(part, ImageSource) and part.url for part in item.parts)
        async with self._download_slots if downloads else nullcontext():
            parts = await self._fetch_parts(item)
            return await self.in_pool(self._decode_and, then, item, parts, request)

    async def _fetch_parts(self, item: RequestItem) -> list[str | bytes]:
        """An item's parts, each image as its file's bytes. Raises InputError."""

        async def fetch(part: str | ImageSource) -> str | bytes:
            if isinstance(part, str):
                return part
            if part.url is None:
                return part.data or b""
            started = time.monotonic()
            try:
                return await self._fetcher.fetch(part.url)
            except ImageUnavailable as error:
                raise InputError(error, part.param) from None
            finally:
                self._metrics.image_fetch_seconds.observe(time.monotonic() - started)

        return [await fetch(item.parts[0])] if len(item.parts) == 1 else await run_all([fetch(part) for part in item.parts])

    def _decode_and(
        self, then: Callable[[EmbeddingInput], T], item: RequestItem, parts: Sequence[str | bytes], request: EmbeddingRequest
    ) -> T:
        """In the pool: decode an item's images, and hand the whole to the model. Raises InputError, InvalidInput."""
        decoded: list[str | Image.Image] = []
        for source, part in zip(item.parts, parts, strict=True):
            if isinstance(part, str):
                decoded.append(part)
                continue
            try:
                decoded.append(decode_image(part, self._settings.max_image_bytes, self._settings.max_image_pixels))
            except ImageInvalid as error:
                raise InputError(error, source.param if isinstance(source, ImageSource) else item.param) from None
        return then(embedding_input(item, decoded, request))

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
                    self._metrics.dropped.labels(row_for(error).reason).inc()

    def _finish(
        self,
        request: EmbeddingRequest,
        prepared: Sequence[PreparedInput | Exception],
        answers: Sequence[Vector | Exception],
        prepare_seconds: float,
    ) -> Outcome:
        """Cut to the dimension, and count."""
        done = [item for item, answer in zip(prepared, answers, strict=True) if isinstance(answer, Vector)]
        inputs = [item for item in done if isinstance(item, PreparedInput)]
        vectors = [answer for answer in answers if isinstance(answer, Vector)]
        usage = Usage(sum(item.text_tokens for item in inputs), sum(item.image_tokens for item in inputs))
        self._metrics.count_inputs(inputs)
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


def embedding_input(item: RequestItem, parts: Sequence[Any], request: EmbeddingRequest) -> EmbeddingInput:
    """An item as the model takes it, its images decoded to `parts`."""
    return EmbeddingInput(tuple(parts), item.instruction, item.verbatim, request.max_tokens, request.truncate)


def prepare_each(model: EmbeddingModel, inputs: Sequence[EmbeddingInput]) -> list[PreparedInput | Exception]:
    """Every input prepared, or what is wrong with it."""
    results: list[PreparedInput | Exception] = []
    for item in inputs:
        try:
            results.append(model.prepare(item))
        except InvalidInput as error:
            results.append(error)
    return results


def placed(result: PreparedInput | Exception, index: int, request: EmbeddingRequest) -> PreparedInput | Exception:
    """The result, an error with its place: raised unless the request takes partial results."""
    if isinstance(result, PreparedInput):
        return result
    item = request.items[index]
    error = result if isinstance(result, InputError) else InputError(result, item.param)
    if not request.partial:
        raise error
    return error


@asynccontextmanager
async def until(deadline: float) -> AsyncIterator[None]:
    """Raises DeadlineExceeded where what is inside is not done by `deadline`, on the loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed while the inputs were prepared") from None


async def run_all(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order, like gather; but when one fails the others are cancelled, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
