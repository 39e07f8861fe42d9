"""Items -> vectors, by requests to the API, wherever it answers.

A request is partial, so that an item that fails is one row's error. What fails for another reason is tried again: a request that
is too much, in halves; a service that is busy or away, after a while. An item that fails by itself again and again is given up.
It knows no HTTP and no files.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from app.bulk.ending import Ending, Stopped, refused
from app.bulk.rows import Fault

log = logging.getLogger(__name__)

Vector = npt.NDArray[np.float32]

# Where a service does not say when to come again: from the first to the longest wait.
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_WORD_EVERY_S = 30.0
# An item that fails alone with a fault of the service is asked for so often. So many such items in a row are no accident.
_TRIES = 3
_MOST_GIVEN_UP = 10
_SMALLEST_BODY = 64 << 10
_PROBE = b'"a"'

_WAIT = frozenset({408, 429, 502, 503})
_TOO_MUCH = frozenset({413, 504})
_ITEM_AT_FAULT = frozenset({400, 413, 422})
_PLACE = re.compile(r"input\[\d+\]\.?")


@dataclass(frozen=True, slots=True)
class Problem:
    """The API's error object. `retry_after` is in seconds."""

    message: str
    type: str | None = None
    param: str | None = None
    retry_after: float | None = None

    @property
    def is_the_items(self) -> bool:
        """Of a row: whether the item is at fault, and not the service."""
        return self.type == "invalid_request_error"


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply. Of status 200 it has a row for each item, else a problem."""

    status: int
    rows: Sequence[Vector | Problem] = ()
    problem: Problem = field(default=Problem("no reason is given"))
    fingerprint: str | None = None
    model: str | None = None


class Away(Exception):
    """Nobody answers, which may pass: it is asked again. The message says how that shows."""


class Transport(Protocol):
    """Where requests go. `name` is what to call it in a message."""

    name: str

    async def post(self, body: bytes) -> Answer:
        """Answer the body of an embeddings request. Raises Away, and Stopped where there is no more hope."""


@dataclass(frozen=True, slots=True)
class Model:
    """Whose vectors they are. Those of two models with one fingerprint can be compared."""

    name: str
    fingerprint: str | None
    dimension: int


class Embedder:
    """`fields` are what each request asks for beside its items. `start` comes first."""

    def __init__(self, transport: Transport, fields: dict[str, Any], *, patience: float, most_rows: int, most_bytes: int) -> None:
        self._transport = transport
        self._head = orjson.dumps({**fields, "partial": True, "encoding_format": "base64"})[:-1] + b',"input":['
        self._patience = patience
        # Learnt from what is refused.
        self._most_rows = most_rows
        self._most_bytes = most_bytes
        self._last_good = 0.0
        self._last_word = -_WORD_EVERY_S
        self._given_up = 0
        self._model: Model | None = None

    async def start(self) -> Model:
        """Ask for one vector: whether all that is asked for is accepted, and who answers. Raises Stopped."""
        self._last_good = asyncio.get_running_loop().time()
        answer = await self._ask([_PROBE])
        row = answer.rows[0] if answer.status == 200 else answer.problem
        if isinstance(row, Problem):
            raise refused(f"{self._transport.name} refuses what is asked for: {row.message}")
        self._model = Model(answer.model or "unknown", answer.fingerprint, len(row))
        return self._model

    async def embed(self, items: Sequence[bytes]) -> list[Vector | Fault]:
        """The vector of each item, or why it has none. Raises Stopped."""
        rows: dict[int, Vector | Fault] = {}
        refused_rows = 0
        # Places of items that are asked for together, the next ones last.
        waiting: list[Sequence[int]] = [range(len(items))]
        while waiting:
            places = waiting.pop()
            if len(places) > (most := self._fitting([items[place] for place in places])):
                waiting.append(places[most:])
                places = places[:most]
            if not places:
                continue
            answer = await self._ask([items[place] for place in places])
            if answer.status == 200 and len(places) < refused_rows:
                self._most_rows, refused_rows = min(self._most_rows, len(places)), 0
            if len(places) == 1:
                rows[places[0]] = row = await self._alone(items[places[0]], answer)
                refused_rows = 0 if isinstance(row, Fault) else refused_rows
                continue
            again: Sequence[int] = places
            if answer.status == 200:
                settled = {place: row for place, row in zip(places, answer.rows, strict=True) if is_settled(row)}
                rows |= {place: _fault(row) if isinstance(row, Problem) else row for place, row in settled.items()}
                again = [place for place in places if place not in settled]
            else:
                self._learn(answer, [items[place] for place in places])
                refused_rows = len(places) if _may_be_too_many(answer) else 0
            if len(again) < len(places):
                self._given_up = 0
                waiting.append(again)
            else:
                middle = len(places) // 2
                waiting += [places[middle:], places[:middle]]
        return [rows[place] for place in range(len(items))]

    def _fitting(self, items: Sequence[bytes]) -> int:
        """How many of the first items one request may have."""
        num_bytes = count = 0
        for item in items[: self._most_rows]:
            num_bytes += len(item) + 1
            if count and num_bytes > self._most_bytes:
                break
            count += 1
        return count

    async def _alone(self, item: bytes, answer: Answer) -> Vector | Fault:
        """What comes of an item that was asked for by itself."""
        loop, attempt, is_well = asyncio.get_running_loop(), 0, False
        begun = loop.time()
        while True:
            row = answer.rows[0] if answer.status == 200 else answer.problem
            if not isinstance(row, Problem):
                self._given_up = 0
                return row
            problem = row
            if problem.is_the_items if answer.status == 200 else answer.status in _ITEM_AT_FAULT:
                return _fault(problem)
            if is_well:
                break
            attempt += 1
            if attempt >= _TRIES - 1:
                # Is it the item, or the service? Where it answers others, the last try tells.
                is_well = await self._answers_others()
                if not is_well and loop.time() > begun + self._patience:
                    raise Stopped(f"{self._transport.name} fails for whatever it is asked: {problem.message}", Ending.STOPPED)
            await asyncio.sleep(_backoff(attempt))
            answer = await self._ask([item])
        self._given_up += 1
        if self._given_up > _MOST_GIVEN_UP:
            raise Stopped(f"{self._transport.name} fails for whatever it is asked: {problem.message}", Ending.STOPPED)
        return _fault(problem)

    async def _answers_others(self) -> bool:
        """Whether the item that was accepted at the start still is."""
        answer = await self._ask([_PROBE])
        return answer.status == 200 and not isinstance(answer.rows[0], Problem)

    def _learn(self, answer: Answer, items: Sequence[bytes]) -> None:
        """What was too much is not asked for again. A 400 tells nothing of how many there may be: it may be about some item, or
        about all (numbers are taken for tokens), until fewer are accepted."""
        if answer.status == 413:
            self._most_bytes = min(self._most_bytes, max(_SMALLEST_BODY, sum(map(len, items)) // 2))
        elif answer.status == 504:
            self._most_rows = min(self._most_rows, max(1, len(items) // 2))

    async def _ask(self, items: Sequence[bytes]) -> Answer:
        """The answer to one request, however long it takes to have one. Raises Stopped."""
        loop = asyncio.get_running_loop()
        body = self._head + b",".join(items) + b"]}"
        attempt = 0
        while True:
            wait: float | None = None
            try:
                answer = await self._transport.post(body)
            except Away as away:
                reason = str(away)
            else:
                if answer.status not in _WAIT:
                    self._check(answer, len(items))
                    self._last_good = loop.time()
                    return answer
                reason, wait = f"{answer.status}, {answer.problem.message}", answer.problem.retry_after
            attempt += 1
            given = _backoff(attempt) if wait is None else wait * random.uniform(1.0, 1.2)
            if loop.time() + given > self._last_good + max(self._patience, 2 * given if wait else 0.0):
                raise Stopped(f"{self._transport.name} has not answered for {self._patience:g} s: {reason}", Ending.STOPPED)
            if loop.time() - self._last_word >= _WORD_EVERY_S:
                self._last_word = loop.time()
                log.warning("waiting for %s: %s", self._transport.name, reason)
            await asyncio.sleep(given)

    def _check(self, answer: Answer, count: int) -> None:
        """Raises Stopped for what no other request would change."""
        name = self._transport.name
        if answer.status in (401, 403):
            raise refused(f"{name} refuses the key: {answer.problem.message} (API_KEY, a setting, is the key that is sent)")
        if answer.status != 200:
            if answer.status not in _ITEM_AT_FAULT | _TOO_MUCH and answer.status < 500:
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
    """Whether it would be the same if it were asked for again."""
    return not isinstance(row, Problem) or row.is_the_items


def _fault(problem: Problem) -> Fault:
    """In a row of its own an item has no place among others."""
    message = _PLACE.sub(lambda place: "" if place[0].endswith(".") else "the row", problem.message, count=1)
    return Fault(message, (problem.param and _PLACE.sub("", problem.param)) or None)


def _backoff(attempt: int) -> float:
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1))
    return random.uniform(longest / 2, longest)
