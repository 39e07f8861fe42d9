"""Preparation: the items of one request -> PreparedInputs. URLs fetched, images decoded, everything tokenised and cut.

It runs on threads that all requests share, and takes them in turn: a request has only so many jobs and downloads under way at a
time, so that others' come between its own. What it makes is held against the request's share of the memory. A job decodes one
image and makes it small, so that no more than one for each thread is ever whole. An error that becomes a value sheds its
traceback: its frames would hold the input.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from sys import getsizeof
from typing import Any, TypeVar

from app.dialects.request import EmbeddingRequest, ImageSource, InvalidRequest, RequestItem
from app.engine.memory import MemoryShare, PixelBudget
from app.engine.metrics import Metrics
from app.engine.threads import PreparationThreads, run_on
from app.errors import InputError
from app.media.fetch import ImageFetcher, ImageUnavailable
from app.media.image import ImageInvalid, decode_image
from app.settings import Settings
from models.base import (
    Description,
    EmbeddingInput,
    InputTooLong,
    InvalidInput,
    ModelInfo,
    PreparedImage,
    PreparedInput,
    Preparer,
    Refusal,
)

T = TypeVar("T")

# Short texts are tokenised where they are; the way to a thread and back takes longer than the work.
INLINE_CHARACTERS = 1024
# Items of text that one thread prepares in one go, and their parts and characters in all: some 10 ms, in which other requests'
# items wait.
CHUNK = 64
CHUNK_PARTS = 256
CHUNK_CHARACTERS = 65_536
# Images of one request at a time between the first byte of their download and their patches.
DOWNLOADS_PER_REQUEST = 8
# Bytes that a token takes: its id, and its three positions where there are images. A character is UTF-8 of at most four bytes,
# and a token at least one of them; the template has some tokens too.
ID_BYTES = 8
POSITIONS_BYTES = 24
TOKENS_PER_CHARACTER = 4
TEMPLATE_TOKENS = 128

Prepared = PreparedInput | Exception


@dataclass(frozen=True, slots=True)
class Tools:
    """What all requests share. `threads` run what takes the CPU."""

    settings: Settings
    fetcher: ImageFetcher
    metrics: Metrics
    threads: PreparationThreads
    pixels: PixelBudget


def expected_bytes(request: EmbeddingRequest, info: ModelInfo) -> int:
    """What the request's inputs take once prepared, at most: known before any work is done for them."""
    limit = min(request.max_tokens, info.max_tokens)
    total = 0
    for item in request.items:
        if isinstance(item, InvalidRequest):
            continue
        if item.is_text:
            total += ID_BYTES * min(limit, item.characters * TOKENS_PER_CHARACTER + TEMPLATE_TOKENS)
            continue
        images = sum(isinstance(part, ImageSource) for part in item.parts)
        # However many: once they have more tokens than the limit, those under way are the last.
        most = limit * info.image_token_bytes + DOWNLOADS_PER_REQUEST * info.largest_image
        total += (ID_BYTES + POSITIONS_BYTES) * limit + min(images * info.largest_image, most)
    return total


@dataclass(slots=True)
class Fusion:
    """The images of one item, while they are prepared: they are no more than fit into `max_tokens`, where there is a limit.
    `num_bytes` is the memory that those which are there take."""

    max_tokens: int | None
    tokens: int = 0
    num_bytes: int = 0

    @property
    def is_over(self) -> bool:
        return self.max_tokens is not None and self.tokens > self.max_tokens


class Preparation:
    """One request's; what it makes is added to `memory`. Raises, of `prepare`, InputError for the first item at fault unless the
    request takes partial results, and as MemoryShare does."""

    def __init__(self, tools: Tools, preparer: Preparer, request: EmbeddingRequest, memory: MemoryShare) -> None:
        self._tools = tools
        self._preparer = preparer
        self._request = request
        self._memory = memory
        self._max_tokens = min(request.max_tokens, preparer.info.max_tokens)
        self._pool, threads = tools.threads.pool(preparer.info.device)
        self._jobs = asyncio.Semaphore(threads)
        self._downloads = asyncio.Semaphore(DOWNLOADS_PER_REQUEST)

    async def prepare(self) -> list[Prepared]:
        """Every item prepared, or its error."""
        items = self._request.items
        texts = [index for index, item in enumerate(items) if isinstance(item, RequestItem) and item.is_text]
        images = [index for index, item in enumerate(items) if isinstance(item, RequestItem) and not item.is_text]
        results: dict[int, Prepared] = {index: item for index, item in enumerate(items) if isinstance(item, InvalidRequest)}
        jobs = [self._prepare_texts(chunk, results) for chunk in self._chunks(texts)]
        jobs += [self._prepare_images(index, results) for index in images]
        if len(jobs) == 1:
            await jobs[0]
        else:
            await run_all(jobs)
        return [results[index] for index in range(len(items))]

    async def describe(self) -> list[Description | Exception]:
        """What the model would read of every item, or why it cannot be had."""
        return await run_all([self._describe(item) for item in self._request.items])

    async def _prepare_texts(self, indices: Sequence[int], results: dict[int, Prepared]) -> None:
        """Items of text alone, several in one go."""
        items = [self._item(index) for index in indices]
        prepare = partial(self._preparer.prepare_all, [self._input(item, item.parts) for item in items])
        for index, result in zip(indices, prepare() if self._is_short() else await self._in_pool(prepare), strict=True):
            found = InvalidInput(result.message) if isinstance(result, Refusal) else result
            results[index] = self._placed(found, index)
            if isinstance(result, PreparedInput):
                self._memory.add(result.num_bytes)

    async def _prepare_images(self, index: int, results: dict[int, Prepared]) -> None:
        """An item with images."""
        fusion = Fusion(self._max_tokens)
        try:
            result: Prepared = await self._with_images(self._preparer.prepare, self._item(index), fusion)
        except (InputError, InvalidInput) as error:
            result = error.with_traceback(None)
            self._memory.add(-fusion.num_bytes)  # the others of its images go with it
        try:
            results[index] = self._placed(result, index)
            if isinstance(result, PreparedInput):
                self._memory.add(result.num_bytes)
        finally:
            del result

    async def _describe(self, item: RequestItem | InvalidRequest) -> Description | Exception:
        if isinstance(item, InvalidRequest):
            return item
        try:
            described = await self._with_images(self._preparer.describe, item, Fusion(None))
        except (InputError, InvalidInput) as error:
            bare = error.with_traceback(None)
            return bare if isinstance(bare, InputError) else InputError(bare, item.param)
        self._memory.add(getsizeof(described.prompt))
        return described

    async def _with_images(self, then: Callable[[EmbeddingInput], T], item: RequestItem, fusion: Fusion) -> T:
        """Prepare an item's images, each in a job of its own, and hand the whole to the model: in the same job where there is but
        one. Raises InputError, InvalidInput."""
        sources = [part for part in item.parts if isinstance(part, ImageSource)]
        if sources and not self._preparer.info.supports_images:
            raise InputError(InvalidInput("this model embeds text only: send no image"), sources[0].param)
        if len(sources) == 1:
            done = await self._on_file(sources[0], fusion, partial(self._prepare_whole, then, item, sources[0], fusion))
            assert done is not None
            self._count(done[0], fusion)
            return done[1]
        images = iter(await run_all([self._image(source, fusion) for source in sources]))
        if fusion.is_over:
            raise InputTooLong(
                f"the images alone have more than {fusion.max_tokens:,} tokens, which is the limit. Only text is ever cut"
            )
        parts = [part if isinstance(part, str) else next(images) for part in item.parts]
        return await self._in_pool(then, self._input(item, parts))

    async def _image(self, source: ImageSource, fusion: Fusion) -> PreparedImage | None:
        """One image, prepared; None where the others are too many already. Raises InputError."""
        image = await self._on_file(source, fusion, partial(self._prepare_image, source, fusion))
        if image is not None:
            self._count(image, fusion)
        return image

    async def _on_file(self, source: ImageSource, fusion: Fusion, job: Callable[[bytes], T]) -> T | None:
        """Do a job with an image's file, on a thread; None where the images are too many already. Raises InputError."""
        async with self._downloads if source.url else nullcontext():
            if fusion.is_over:
                return None
            async with self._file(source) as data, self._jobs:
                return None if fusion.is_over else await self._on_thread(job, data)

    def _count(self, image: PreparedImage, fusion: Fusion) -> None:
        fusion.tokens += image.grid.num_tokens
        self._memory.add(image.patches.nbytes)
        fusion.num_bytes += image.patches.nbytes

    @asynccontextmanager
    async def _file(self, source: ImageSource) -> AsyncIterator[bytes]:
        """An image's file. Raises InputError."""
        if source.url is None:
            yield source.data or b""
            return
        started = time.monotonic()
        try:
            async with self._tools.fetcher.fetched(source.url) as data:
                self._tools.metrics.image_fetch_seconds.observe(time.monotonic() - started)
                yield data
        except ImageUnavailable as error:
            self._tools.metrics.image_fetch_seconds.observe(time.monotonic() - started)
            raise InputError(error.with_traceback(None), source.param) from None

    def _prepare_whole(
        self, then: Callable[[EmbeddingInput], T], item: RequestItem, source: ImageSource, fusion: Fusion, data: bytes
    ) -> tuple[PreparedImage, T]:
        """On a thread: an item's one image, and what the model makes of the whole. Raises InputError, InvalidInput."""
        image = self._prepare_image(source, fusion, data)
        return image, then(self._input(item, [part if isinstance(part, str) else image for part in item.parts]))

    def _prepare_image(self, source: ImageSource, fusion: Fusion, data: bytes) -> PreparedImage:
        """On a thread: decode an image and make it small; without a limit of tokens its grid is all that is kept.

        Raises InputError.
        """
        settings, model = self._tools.settings, self._preparer
        original_size: tuple[int, int] | None = None

        def reduced_size(size: tuple[int, int]) -> tuple[int, int] | None:
            nonlocal original_size
            original_size = size
            return model.reduced_size(size)

        with self._tools.pixels.share() as wait_for_room:
            try:
                image = decode_image(data, settings.max_image_bytes, settings.max_image_pixels, wait_for_room, reduced_size)
                prepared = model.prepare_image(image, original_size)
            except (ImageInvalid, InvalidInput) as error:
                raise InputError(error.with_traceback(None), source.param) from None
        return replace(prepared, patches=prepared.patches[:0].copy()) if fusion.max_tokens is None else prepared

    async def _in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        async with self._jobs:
            return await self._on_thread(function, *arguments)

    async def _on_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await run_on(self._pool, function, *arguments)

    def _is_short(self) -> bool:
        """Whether the whole request is one short text, under a short instruction."""
        (item, *more) = self._request.items
        if more or not isinstance(item, RequestItem) or len(item.parts) > 1:
            return False
        return item.is_text and item.characters <= INLINE_CHARACTERS

    def _chunks(self, indices: Sequence[int]) -> Iterator[list[int]]:
        chunk: list[int] = []
        parts = characters = 0
        for index in indices:
            item = self._item(index)
            parts, characters = parts + len(item.parts), characters + item.characters
            if chunk and (len(chunk) == CHUNK or parts > CHUNK_PARTS or characters > CHUNK_CHARACTERS):
                yield chunk
                chunk, parts, characters = [], len(item.parts), item.characters
            chunk.append(index)
        if chunk:
            yield chunk

    def _item(self, index: int) -> RequestItem:
        item = self._request.items[index]
        assert isinstance(item, RequestItem)
        return item

    def _input(self, item: RequestItem, parts: Sequence[Any]) -> EmbeddingInput:
        """An item as the model takes it, its images decoded to `parts`."""
        return EmbeddingInput(tuple(parts), item.instruction, item.verbatim, self._request.max_tokens, self._request.truncate)

    def _placed(self, result: Prepared, index: int) -> Prepared:
        """The result, an error with its place: raised unless the request takes partial results."""
        if isinstance(result, PreparedInput):
            return result
        error = result if isinstance(result, InputError) else InputError(result, self._item(index).param)
        if self._request.partial:
            return error
        try:
            raise error
        finally:
            # A frame that holds the error whose traceback holds the frame: a cycle, and all that was prepared in it.
            del error, result


async def run_all(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order, like gather; but when one fails the others are cancelled, and are over before its error is raised.

    Not a TaskGroup: its exception group holds itself, and with it the frames of all jobs, until the garbage collector comes.
    """
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        if unfinished := [task for task in tasks if not task.done()]:
            for task in unfinished:
                task.cancel()
            await asyncio.wait(unfinished)
            unfinished.clear()
        # A task holds its error, whose traceback holds this frame.
        tasks.clear()
