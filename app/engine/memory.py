"""What requests may hold in memory together: MemoryBudget for their bytes, PixelBudget for the images that are being decoded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.dialects.contract import EmbeddingRequest, ImageSource
from models.base import ModelInfo, Refusal
from scheduler.errors import Overloaded

# Images of one request at a time between the first byte of their download and their patches.
DOWNLOADS_PER_REQUEST = 8
# Bytes that a token takes: its id, and its three positions where there are images. A character is UTF-8 of at most four bytes,
# and a token at least one of them; the template has some tokens too.
ID_BYTES = 8
POSITIONS_BYTES = 24
TOKENS_PER_CHARACTER = 4
TEMPLATE_TOKENS = 128


class RequestTooLarge(Exception):
    """A request that would not fit if it were alone. The message is safe to show."""


class MemoryBudget:
    """The bytes that requests under way hold: bodies, and what is made of them. For the event loop's thread alone.

    `retry_after` tells in how many seconds there may be room.
    """

    def __init__(self, max_bytes: int, retry_after: Callable[[], float]) -> None:
        self.max_bytes = max_bytes
        self.held = 0
        self._retry_after = retry_after

    @contextmanager
    def share(self) -> Iterator[MemoryShare]:
        """Opens one request's share. What it holds is given back when the context ends."""
        share = MemoryShare(self)
        try:
            yield share
        finally:
            self.held -= share.held

    @contextmanager
    def occupied(self, num_bytes: int) -> Iterator[None]:
        """Counts bytes that are there whether or not there is room, while the context lasts."""
        self.held += num_bytes
        try:
            yield
        finally:
            self.held -= num_bytes

    def take(self, share: MemoryShare, num_bytes: int) -> None:
        """Takes bytes for a share, or gives them back if `num_bytes` is negative. Raises Overloaded if there is no room now,
        RequestTooLarge if there never is."""
        if share.held + num_bytes > self.max_bytes:
            raise RequestTooLarge(
                f"the request needs more than the {self.max_bytes:,} bytes of memory that all requests may have together; "
                "send fewer inputs at a time"
            )
        if num_bytes > 0 and self.held + num_bytes > self.max_bytes:
            raise Overloaded("the memory for requests is full", self._retry_after())
        self.held += num_bytes


class MemoryShare:
    """What one request holds: the bytes that are there, and those reserved for more to come."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._present = 0
        self._reserved = 0

    @property
    def held(self) -> int:
        return self._present + self._reserved

    def expect(self, num_bytes: int) -> None:
        """Reserves bytes, but no more than a quarter of the budget, nor than the request may have: a guess must not refuse for
        good what may be smaller. Raises Overloaded."""
        num_bytes = min(num_bytes, self._budget.max_bytes // 4, self._budget.max_bytes - self.held)
        self._budget.take(self, num_bytes)
        self._reserved += num_bytes

    def add(self, num_bytes: int) -> None:
        """Adds `num_bytes` (may be negative), using up the reserved ones first. Raises Overloaded, RequestTooLarge."""
        from_reserved = min(max(num_bytes, 0), self._reserved)
        self._budget.take(self, num_bytes - from_reserved)
        self._present += num_bytes
        self._reserved -= from_reserved

    def settle(self) -> None:
        """Gives back what is still reserved: no more is to come."""
        self._budget.take(self, -self._reserved)
        self._reserved = 0


class PixelBudget:
    """Bounds the pixels that are decoded at a time, on all threads. First come, first served, so that a large image is never
    stuck."""

    def __init__(self, max_pixels: int) -> None:
        self._left = max_pixels
        self._max_pixels = max_pixels
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that waits for room for so many pixels, to be called once; the room is given back when the context
        ends."""
        taken = 0

        def take(pixels: int) -> None:
            nonlocal taken
            # An image beyond all bounds has it to itself.
            wanted, ticket = min(pixels, self._max_pixels), object()
            with self._changed:
                self._waiting.append(ticket)
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self._left >= wanted)
                self._waiting.popleft()
                self._left -= wanted
                taken = wanted
                self._changed.notify_all()

        try:
            yield take
        finally:
            with self._changed:
                self._left += taken
                self._changed.notify_all()


def expected_bytes(request: EmbeddingRequest, info: ModelInfo) -> int:
    """Bounds the bytes that a request's inputs take once prepared: known before any work is done for them."""
    limit = min(request.max_tokens, info.max_tokens)
    total = 0
    for item in request.items:
        if isinstance(item, Refusal):
            continue
        if item.is_text:
            total += ID_BYTES * min(limit, item.characters * TOKENS_PER_CHARACTER + TEMPLATE_TOKENS)
            continue
        images = sum(isinstance(part, ImageSource) for part in item.parts)
        # However many: once they have more tokens than the limit, those under way are the last.
        most = limit * info.image_token_bytes + DOWNLOADS_PER_REQUEST * info.largest_image
        total += (ID_BYTES + POSITIONS_BYTES) * limit + min(images * info.largest_image, most)
    return total
