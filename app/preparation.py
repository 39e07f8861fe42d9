"""Preparation: the items of one request -> PreparedInputs. URLs fetched, images decoded, everything tokenised and cut.

It runs on threads that all requests share, and takes them in turn: a request has only so many jobs and downloads under way at a
time, so that others' come between its own. An error that becomes a value sheds its traceback: its frames would hold the input.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from app.dialects import EmbeddingRequest, ImageSource, InvalidRequest, RequestItem
from app.errors import InputError
from app.image_decode import ImageInvalid, decode_image
from app.image_fetch import ImageFetcher, ImageUnavailable
from app.metrics import Metrics
from app.preparation_threads import PreparationThreads
from app.settings import Settings
from models.base import Description, EmbeddingInput, EmbeddingModel, InvalidInput, PreparedInput

T = TypeVar("T")

# Short texts are tokenised where they are; the way to a thread and back takes longer than the work.
INLINE_CHARACTERS = 1024
# Items of text that one thread prepares in one go, and their parts and characters in all: some 10 ms, in which other requests'
# items wait.
CHUNK = 64
CHUNK_PARTS = 256
CHUNK_CHARACTERS = 65_536
# Downloads of one request at a time, and items between the first byte of theirs and their patches.
DOWNLOADS_PER_REQUEST = 8

Prepared = PreparedInput | Exception


@dataclass(frozen=True, slots=True)
class Tools:
    """What all requests share. `threads` run what takes the CPU."""

    settings: Settings
    fetcher: ImageFetcher
    metrics: Metrics
    threads: PreparationThreads


class Preparation:
    """One request's. Raises, of `prepare`, InputError for the first item at fault unless the request takes partial results."""

    def __init__(self, tools: Tools, model: EmbeddingModel, request: EmbeddingRequest) -> None:
        self._tools = tools
        self._model = model
        self._request = request
        self._pool, threads = tools.threads.pool(model.info.device)
        self._jobs = asyncio.Semaphore(threads)
        self._items_downloading = asyncio.Semaphore(DOWNLOADS_PER_REQUEST)
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
        prepare = partial(self._model.prepare_all, [self._input(item, item.parts) for item in items])
        for index, result in zip(indices, prepare() if self._is_short() else await self._in_pool(prepare), strict=True):
            results[index] = self._placed(result, index)

    async def _prepare_images(self, index: int, results: dict[int, Prepared]) -> None:
        """An item with images."""
        try:
            result: Prepared = await self._with_images(self._model.prepare, self._item(index))
        except (InputError, InvalidInput) as error:
            result = error.with_traceback(None)
        try:
            results[index] = self._placed(result, index)
        finally:
            del result

    async def _describe(self, item: RequestItem | InvalidRequest) -> Description | Exception:
        if isinstance(item, InvalidRequest):
            return item
        try:
            return await self._with_images(self._model.describe, item)
        except (InputError, InvalidInput) as error:
            bare = error.with_traceback(None)
            return bare if isinstance(bare, InputError) else InputError(bare, item.param)

    async def _with_images(self, then: Callable[[EmbeddingInput], T], item: RequestItem) -> T:
        """Fetch and decode an item's images, and hand the whole to the model. Raises InputError, InvalidInput."""
        downloads = any(isinstance(part, ImageSource) and part.url for part in item.parts)
        # What arrives must not pile up before the threads; what came with the request is there already.
        async with self._items_downloading if downloads else nullcontext():
            parts = [await self._bytes(item.parts[0])] if len(item.parts) == 1 else await run_all([*map(self._bytes, item.parts)])
            return await self._in_pool(self._decode_and, then, item, parts)

    async def _bytes(self, part: str | ImageSource) -> str | bytes:
        """A text as it is, an image as its file's bytes. Raises InputError."""
        if isinstance(part, str):
            return part
        if part.url is None:
            return part.data or b""
        async with self._downloads:
            started = time.monotonic()
            try:
                return await self._tools.fetcher.fetch(part.url)
            except ImageUnavailable as error:
                raise InputError(error.with_traceback(None), part.param) from None
            finally:
                self._tools.metrics.image_fetch_seconds.observe(time.monotonic() - started)

    def _decode_and(self, then: Callable[[EmbeddingInput], T], item: RequestItem, parts: Sequence[str | bytes]) -> T:
        """On a thread: decode an item's images, and hand the whole to the model. Raises InputError, InvalidInput."""
        settings = self._tools.settings
        decoded: list[str | Image.Image] = []
        for source, part in zip(item.parts, parts, strict=True):
            if isinstance(part, str):
                decoded.append(part)
                continue
            try:
                decoded.append(decode_image(part, settings.max_image_bytes, settings.max_image_pixels))
            except ImageInvalid as error:
                place = source.param if isinstance(source, ImageSource) else item.param
                raise InputError(error.with_traceback(None), place) from None
        return then(self._input(item, decoded))

    async def _in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        async with self._jobs:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

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
