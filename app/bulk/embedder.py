"""Items -> vectors, by embeddings requests over any transport.

Requests are partial, so an item that fails is the error of one row. Other failures are retried: a request that is too large in
halves, a busy or absent service after a backoff. An item that keeps failing alone is given up. It knows no HTTP and no files.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from app.bulk.ending import Ending, Stopped, refused
from app.bulk.rows import Fault, Vector

log = logging.getLogger(__name__)

# Exponential backoff, for a service that names no Retry-After: the first and the longest wait.
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_LOG_INTERVAL_S = 30.0
# How many tries an item has that fails alone with an error of the service, while the service answers others.
_TRIES = 3
# More such items in a row are no accident: the run ends.
_MAX_GIVEN_UP = 10
# The limit that is learnt from a 413 is no lower than this.
_MIN_BODY_BYTES = 64 << 10
_PROBE = b'"a"'

_RETRY_STATUSES = frozenset({408, 429, 502, 503})
_TOO_LARGE_STATUSES = frozenset({413, 504})
_ITEM_STATUSES = frozenset({400, 413, 422})
_INPUT_INDEX = re.compile(r"input\[\d+\]\.?")


@dataclass(frozen=True, slots=True)
class Problem:
    """The API's error object. `retry_after` is in seconds."""

    message: str
    type: str | None = None
    param: str | None = None
    retry_after: float | None = None

    @property
    def is_the_items(self) -> bool:
        """Whether the item of a row is at fault, and not the service."""
        return self.type == "invalid_request_error"


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply. With status 200 it has a row for each item, else a problem."""

    status: int
    rows: Sequence[Vector | Problem] = ()
    problem: Problem = field(default=Problem("no reason is given"))
    fingerprint: str | None = None
    model: str | None = None


class Away(Exception):
    """Raised when the service does not answer, which may pass, so that the request is retried. The message is the reason."""


class Transport(Protocol):
    """The way to a service. `name` is its name in messages."""

    name: str

    async def post(self, body: bytes) -> Answer:
        """Send the body of an embeddings request. Raises Away if a retry may help, and Stopped if none can."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that answers. Vectors of equal fingerprints can be compared."""

    name: str
    fingerprint: str | None
    dimension: int


class Embedder:
    """Embeds items; call `start` first. `fields` are the fields of each request besides its items. `patience` is how many seconds
    to wait for an absent service."""

    def __init__(self, transport: Transport, fields: dict[str, Any], *, patience: float, max_rows: int, max_bytes: int) -> None:
        self._transport = transport
        self._body_prefix = orjson.dumps({**fields, "partial": True, "encoding_format": "base64"})[:-1] + b',"input":['
        self._patience = patience
        # Lowered when the service refuses a request as too large.
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._last_success = 0.0
        self._last_logged = -_LOG_INTERVAL_S
        self._given_up = 0
        self._model: ServedModel | None = None

    async def start(self) -> ServedModel:
        """Ask for one vector, and return the model that answers. Raises Stopped if the service refuses the request's fields."""
        self._last_success = asyncio.get_running_loop().time()
        answer = await self._ask([_PROBE])
        row = answer.rows[0] if answer.status == 200 else answer.problem
        if isinstance(row, Problem):
            raise refused(f"{self._transport.name} refuses what is asked for: {row.message}")
        self._model = ServedModel(answer.model or "unknown", answer.fingerprint, len(row))
        return self._model

    async def embed(self, items: Sequence[bytes]) -> list[Vector | Fault]:
        """Return the vector of each item, or the fault of one that has none. Raises Stopped."""
        rows: dict[int, Vector | Fault] = {}
        refused_rows = 0
        # A stack of requests to send, each as the indexes of its items.
        waiting: list[Sequence[int]] = [range(len(items))]
        while waiting:
            indexes = waiting.pop()
            if len(indexes) > (count := self._count_that_fit([items[index] for index in indexes])):
                waiting.append(indexes[count:])
                indexes = indexes[:count]
            if not indexes:
                continue
            answer = await self._ask([items[index] for index in indexes])
            if answer.status == 200 and len(indexes) < refused_rows:
                self._max_rows, refused_rows = min(self._max_rows, len(indexes)), 0
            if len(indexes) == 1:
                rows[indexes[0]] = row = await self._settle_alone(items[indexes[0]], answer)
                refused_rows = 0 if isinstance(row, Fault) else refused_rows
                continue
            again: Sequence[int] = indexes
            if answer.status == 200:
                settled = {index: row for index, row in zip(indexes, answer.rows, strict=True) if is_settled(row)}
                rows |= {index: _fault(row) if isinstance(row, Problem) else row for index, row in settled.items()}
                again = [index for index in indexes if index not in settled]
            else:
                self._lower_limits(answer, [items[index] for index in indexes])
                refused_rows = len(indexes) if _may_be_too_many(answer) else 0
            if len(again) < len(indexes):
                self._given_up = 0
                waiting.append(again)
            else:
                middle = len(indexes) // 2
                waiting += [indexes[middle:], indexes[:middle]]
        return [rows[index] for index in range(len(items))]

    def _count_that_fit(self, items: Sequence[bytes]) -> int:
        """Return how many items, from the first on, fit into one request."""
        num_bytes = count = 0
        for item in items[: self._max_rows]:
            num_bytes += len(item) + 1
            if count and num_bytes > self._max_bytes:
                break
            count += 1
        return count

    async def _settle_alone(self, item: bytes, answer: Answer) -> Vector | Fault:
        """Return the vector or the fault of an item that was alone in its request, retrying it if the service failed. `answer` is
        the first answer. Raises Stopped if the service fails for other items too."""
        loop, attempt, others_succeed = asyncio.get_running_loop(), 0, False
        started = loop.time()
        while True:
            row = answer.rows[0] if answer.status == 200 else answer.problem
            if not isinstance(row, Problem):
                self._given_up = 0
                return row
            problem = row
            if problem.is_the_items if answer.status == 200 else answer.status in _ITEM_STATUSES:
                return _fault(problem)
            if others_succeed:
                break
            attempt += 1
            if attempt >= _TRIES - 1:
                # The item is only given up if the service answers others, and then fails for the item once more.
                others_succeed = await self._probe_succeeds()
                if not others_succeed and loop.time() > started + self._patience:
                    raise Stopped(f"{self._transport.name} fails for whatever it is asked: {problem.message}", Ending.STOPPED)
            await asyncio.sleep(_backoff(attempt))
            answer = await self._ask([item])
        self._given_up += 1
        if self._given_up > _MAX_GIVEN_UP:
            raise Stopped(f"{self._transport.name} fails for whatever it is asked: {problem.message}", Ending.STOPPED)
        return _fault(problem)

    async def _probe_succeeds(self) -> bool:
        """Return whether the item of `start` is still embedded."""
        answer = await self._ask([_PROBE])
        return answer.status == 200 and not isinstance(answer.rows[0], Problem)

    def _lower_limits(self, answer: Answer, items: Sequence[bytes]) -> None:
        """Lower the limits if the answer says that the request was too large. A 400 does not lower them here, since it may be
        about an item or about all of them (numbers are taken for tokens); `embed` does once fewer rows are accepted."""
        if answer.status == 413:
            self._max_bytes = min(self._max_bytes, max(_MIN_BODY_BYTES, sum(map(len, items)) // 2))
        elif answer.status == 504:
            self._max_rows = min(self._max_rows, max(1, len(items) // 2))

    async def _ask(self, items: Sequence[bytes]) -> Answer:
        """Send one request, again after a backoff as long as the service is busy or absent. Raises Stopped if patience runs
        out."""
        loop = asyncio.get_running_loop()
        body = self._body_prefix + b",".join(items) + b"]}"
        attempt = 0
        while True:
            retry_after: float | None = None
            try:
                answer = await self._transport.post(body)
            except Away as away:
                reason = str(away)
            else:
                if answer.status not in _RETRY_STATUSES:
                    self._check_answer(answer, len(items))
                    self._last_success = loop.time()
                    return answer
                reason, retry_after = f"{answer.status}, {answer.problem.message}", answer.problem.retry_after
            attempt += 1
            wait = _backoff(attempt) if retry_after is None else retry_after * random.uniform(1.0, 1.2)
            if loop.time() + wait > self._last_success + max(self._patience, 2 * wait if retry_after else 0.0):
                raise Stopped(f"{self._transport.name} has not answered for {self._patience:g} s: {reason}", Ending.STOPPED)
            if loop.time() - self._last_logged >= _LOG_INTERVAL_S:
                self._last_logged = loop.time()
                log.warning("waiting for %s: %s", self._transport.name, reason)
            await asyncio.sleep(wait)

    def _check_answer(self, answer: Answer, count: int) -> None:
        """Raise Stopped if an answer to `count` items means that no other request would succeed either."""
        name = self._transport.name
        if answer.status in (401, 403):
            raise refused(f"{name} refuses the key: {answer.problem.message} (API_KEY, a setting, is the key that is sent)")
        if answer.status != 200:
            if answer.status not in _ITEM_STATUSES | _TOO_LARGE_STATUSES and answer.status < 500:
                raise refused(f"{name} answers {answer.status}: {answer.problem.message}")
            return
        if len(answer.rows) != count:
            raise refused(f"{name} answers {len(answer.rows)} rows for {count} inputs: it is no embeddings API")
        if self._model is None:
            return
        if answer.fingerprint != self._model.fingerprint:
            raise refused(f"{name} has another model now: its fingerprint is {answer.fingerprint}, not {self._model.fingerprint}")
        if any(not isinstance(row, Problem) and len(row) != self._model.dimension for row in answer.rows):
            raise refused(f"{name} answers vectors of another length than {self._model.dimension}")


def _may_be_too_many(answer: Answer) -> bool:
    return answer.status == 400 and answer.problem.param == "input"


def is_settled(row: Vector | Problem) -> bool:
    """Return whether a retry would give the same row: a vector, or a fault of the item."""
    return not isinstance(row, Problem) or row.is_the_items


def _fault(problem: Problem) -> Fault:
    """Return the fault of a row. The item's index within its request, which says nothing of the row, is left out."""
    message = _INPUT_INDEX.sub(lambda index: "" if index[0].endswith(".") else "the row", problem.message, count=1)
    return Fault(message, (problem.param and _INPUT_INDEX.sub("", problem.param)) or None)


def _backoff(attempt: int) -> float:
    """Return the seconds to wait before a retry, from the first (1) on: exponential, with jitter."""
    longest = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (attempt - 1))
    return random.uniform(longest / 2, longest)
