"""What travels from an input to an output: rows, where they end, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Id = str | int | None


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place between two rows: `row` rows and `line` lines come before it. `at` is the source's own measure, from which it can
    go on: a byte of a file, or a row of a table."""

    row: int = 0
    at: int = 0
    line: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row has no vector. `param` is the place within the row, as the API names it."""

    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `item` is what the API's `input` takes, as JSON; a row that could not be read has a fault instead. `line` is where
    it begins in a file of lines, from 1."""

    number: int
    id: Id
    item: bytes | None
    fault: Fault | None
    after: Cursor
    line: int | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.item or b"") + (len(self.id) if isinstance(self.id, str) else 0)


class BadRow(Exception):
    """A row that cannot be read. The run goes on with the next."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.fault = Fault(message, param)


class Source(Protocol):
    """An input, opened."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells it from another: equal ones have the same rows. A value of JSON."""

    @property
    def total(self) -> int | None:
        """What `Cursor.at` is at the end, where that is known without reading everything."""

    def rows(self, cursor: Cursor) -> Iterator[Row]:
        """The rows after `cursor`, one at a time. Raises Stopped where it cannot be read on."""

    def has_changed(self) -> bool:
        """Whether it is no longer what it was when it was opened."""
