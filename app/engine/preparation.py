"""Preparation: the items of one request -> PreparedInputs, in three stages.

    fetch      an image's file: from the request, or by its URL
    decode     the file -> patches, on a thread, one image a job: no more than one for each thread is ever whole
    assemble   texts and patches -> token ids, on a thread, or in place if the request is one short text

The threads are shared by all requests, which take turns: each has only so many jobs and downloads under way at a time, so that
others' come between its own. What is made is charged to the request's share of the memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from sys import getsizeof
from typing import Any, TypeVar

from app.dialects.contract import EmbeddingRequest, ImageSource, RequestItem
from app.engine.memory import DOWNLOADS_PER_REQUEST, MemoryShare, PixelBudget
from app.engine.metrics import Metrics
from app.engine.threads import PreparationThreads, run_on
from app.media.fetch import ImageFetcher, ImageUnavailable
from app.media.image import ImageInvalid, decode_image
from app.settings import Settings
from models.base import (
    Description,
    EmbeddingInput,
    InvalidInput,
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


class Refused(Exception):
    """A request is refused for one of its items, since it does not take partial results."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Tools:
    """What all requests share. `threads` run what takes the CPU."""

    settings: Settings
    fetcher: ImageFetcher
    metrics: Metrics
    threads: PreparationThreads
    pixels: PixelBudget


@dataclass(slots=True)
class ImageTally:
    """The images of one item as they are decoded: their tokens, no more than `max_tokens` if there is a limit, and the bytes of
    their patches."""

    max_tokens: int | None
    tokens: int = 0
    num_bytes: int = 0

    def check(self) -> None:
        """Raises Refused once the images alone are too many."""
        if self.max_tokens is not None and self.tokens > self.max_tokens:
            most = f"{self.max_tokens:,}"
            raise Refused(Refusal(f"the images alone have more than {most} tokens, which is the limit. Only text is ever cut"))


class Preparation:
    """Prepares the items of one request, and charges `memory` for what it makes. Raises Refused for the first item at fault
    unless the request takes partial results, and as MemoryShare does."""

    def __init__(self, tools: Tools, preparer: Preparer, request: EmbeddingRequest, memory: MemoryShare) -> None:
        self._tools = tools
        self._preparer = preparer
        self._request = request
        self._memory = memory
        self._max_tokens = min(request.max_tokens, preparer.info.max_tokens)
        self._pool, threads = tools.threads.pool(preparer.info.device)
        self._jobs = asyncio.Semaphore(threads)
        self._downloads = asyncio.Semaphore(DOWNLOADS_PER_REQUEST)
        self._describing = False

    async def prepare(self) -> list[PreparedInput | Refusal]:
        """Prepares every item, or says why not."""
        items = self._request.items
        results: dict[int, PreparedInput | Refusal] = {}
        texts = [index for index, item in enumerate(items) if isinstance(item, RequestItem) and item.is_text]
        jobs = [self._prepare_texts(chunk, results) for chunk in self._chunks(texts)]
        for index, item in enumerate(items):
            if isinstance(item, Refusal):
                results[index] = item
            elif not item.is_text:
                jobs.append(self._prepare_images(index, item, results))
        if len(jobs) == 1:
            await jobs[0]
        else:
            await run_all(jobs)
        return [results[index] for index in range(len(items))]

    async def describe(self) -> list[Description | Refusal]:
        """Describes what the model would read of every item, or says why it cannot be had. No pixels are kept."""
        self._describing = True
        return await run_all([self._describe(item) for item in self._request.items])

    async def _prepare_texts(self, indices: Sequence[int], results: dict[int, PreparedInput | Refusal]) -> None:
        """Prepares items of text alone, several in one go."""
        items = [self._item(index) for index in indices]
        inputs = [self._input(item, item.parts) for item in items]
        prepare = self._preparer.prepare_all
        prepared = prepare(inputs) if self._is_short() else await self._run_job(prepare, inputs)
        for index, item, result in zip(indices, items, prepared, strict=True):
            results[index] = self._checked(result, item)
            if isinstance(result, PreparedInput):
                self._memory.add(result.num_bytes)

    async def _prepare_images(self, index: int, item: RequestItem, results: dict[int, PreparedInput | Refusal]) -> None:
        """Prepares an item with images."""
        tally = ImageTally(self._max_tokens)
        result = await self._all_stages(item, tally, self._preparer.prepare)
        results[index] = self._checked(result, item)
        if isinstance(result, PreparedInput):
            self._memory.add(result.num_bytes)
        else:
            self._memory.add(-tally.num_bytes)  # the others of its images go with it

    async def _describe(self, item: RequestItem | Refusal) -> Description | Refusal:
        if isinstance(item, Refusal):
            return item
        described = await self._all_stages(item, ImageTally(None), self._preparer.describe)
        if isinstance(described, Refusal):
            return located(described, item)
        self._memory.add(getsizeof(described.prompt))
        return described

    async def _all_stages(self, item: RequestItem, tally: ImageTally, assemble: Callable[[EmbeddingInput], T]) -> T | Refusal:
        """Takes an item through the stages. Several images are decoded each in a job of its own; one goes on to `assemble` in
        the same job."""
        sources = [part for part in item.parts if isinstance(part, ImageSource)]
        if sources and not self._preparer.info.supports_images:
            return Refusal("this model embeds text only: send no image", sources[0].param)
        if len(sources) == 1:
            async with self._fetched(sources[0], tally) as file:
                if not isinstance(file, bytes):
                    return file
                image, result = await self._run_job(self._decode_and_assemble, item, sources[0], file, assemble)
                if image is not None:
                    self._charge(image, tally)
                return result
        try:
            images = await run_all([self._fetch_and_decode(source, tally) for source in sources])
        except Refused as error:
            return error.refusal
        return await self._run_job(self._assemble, item, images, assemble)

    async def _fetch_and_decode(self, source: ImageSource, tally: ImageTally) -> PreparedImage:
        """Takes one of several images to its patches. Raises Refused, which ends the work on the others."""
        async with self._fetched(source, tally) as file:
            if not isinstance(file, bytes):
                raise Refused(file)
            async with self._jobs:
                tally.check()
                image = await run_on(self._pool, self._decode, source, file)
        if isinstance(image, Refusal):
            raise Refused(image)
        self._charge(image, tally)
        tally.check()
        return image

    # Stage 1: fetch

    @asynccontextmanager
    async def _fetched(self, source: ImageSource, tally: ImageTally) -> AsyncIterator[bytes | Refusal]:
        """Yields an image's file, or why there is none. A download keeps its slot while the context lasts."""
        async with AsyncExitStack() as stack:
            if source.url is None:
                yield source.data or b""
                return
            await stack.enter_async_context(self._downloads)
            tally.check()
            yield await self._fetch(source.url, source.param, stack)

    async def _fetch(self, url: str, param: str, stack: AsyncExitStack) -> bytes | Refusal:
        started = time.monotonic()
        try:
            fetched: bytes | Refusal = await stack.enter_async_context(self._tools.fetcher.fetched(url))
        except ImageUnavailable as error:
            fetched = Refusal(str(error), param)
        self._tools.metrics.image_fetch_seconds.observe(time.monotonic() - started)
        return fetched

    # Stage 2: decode, on a thread

    def _decode(self, source: ImageSource, file: bytes) -> PreparedImage | Refusal:
        """Decodes an image and makes it small. Its grid is all that is kept if the request is only described."""
        settings, preparer = self._tools.settings, self._preparer
        sizes: list[tuple[int, int]] = []

        def reduced_size(size: tuple[int, int]) -> tuple[int, int] | None:
            sizes.append(size)
            return preparer.reduced_size(size)

        with self._tools.pixels.share() as wait_for_room:
            try:
                image = decode_image(file, settings.max_image_bytes, settings.max_image_pixels, wait_for_room, reduced_size)
                prepared = preparer.prepare_image(image, sizes[0])
            except (ImageInvalid, InvalidInput) as error:
                return Refusal(str(error), source.param)
        return replace(prepared, patches=prepared.patches[:0].copy()) if self._describing else prepared

    def _charge(self, image: PreparedImage, tally: ImageTally) -> None:
        tally.tokens += image.grid.num_tokens
        self._memory.add(image.patches.nbytes)
        tally.num_bytes += image.patches.nbytes

    # Stage 3: assemble, on a thread

    def _assemble(
        self, item: RequestItem, images: Sequence[PreparedImage], assemble: Callable[[EmbeddingInput], T]
    ) -> T | Refusal:
        """Hands an item to the model's preparer, with its images in their places."""
        left = iter(images)
        parts = [part if isinstance(part, str) else next(left) for part in item.parts]
        try:
            return assemble(self._input(item, parts))
        except InvalidInput as error:
            return Refusal(str(error), item.param)

    def _decode_and_assemble(
        self, item: RequestItem, source: ImageSource, file: bytes, assemble: Callable[[EmbeddingInput], T]
    ) -> tuple[PreparedImage | None, T | Refusal]:
        """Runs stages 2 and 3 in one job, for an item with one image: returns its patches, and what is made of the whole."""
        image = self._decode(source, file)
        return (None, image) if isinstance(image, Refusal) else (image, self._assemble(item, [image], assemble))

    # What the stages share

    async def _run_job(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs a function on a thread, as one of the request's jobs."""
        async with self._jobs:
            return await run_on(self._pool, function, *arguments)

    def _input(self, item: RequestItem, parts: Sequence[Any]) -> EmbeddingInput:
        """Makes an item what the model takes, its images decoded to `parts`."""
        return EmbeddingInput(tuple(parts), item.instruction, item.verbatim, self._request.max_tokens, self._request.truncate)

    def _checked(self, result: PreparedInput | Refusal, item: RequestItem) -> PreparedInput | Refusal:
        """Gives a refusal its place in the request. Raises Refused unless the request takes partial results."""
        if isinstance(result, PreparedInput):
            return result
        refusal = located(result, item)
        if not self._request.partial:
            raise Refused(refusal)
        return refusal

    def _is_short(self) -> bool:
        """Tells whether the whole request is one short text, under a short instruction."""
        (item, *more) = self._request.items
        if more or not isinstance(item, RequestItem) or len(item.parts) > 1:
            return False
        return item.is_text and item.characters <= INLINE_CHARACTERS

    def _chunks(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Groups items of text for `_prepare_texts`."""
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


def located(refusal: Refusal, item: RequestItem) -> Refusal:
    """Gives a refusal the item's place in the request, unless it names a part of it."""
    return refusal if refusal.param else replace(refusal, param=item.param)


async def run_all(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Gathers results in order; but when one job fails the others are cancelled, and are over before its error is raised.

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
