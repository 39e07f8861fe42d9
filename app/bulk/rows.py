"""The data that goes from an input to an output: rows, positions in the input, and faults of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Id = str | int | None

# An embedding, of shape (dimension,).
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position between two rows: `row` rows and `line` lines come before it. `at` is the position in the source's own unit,
    from which it can read on: a byte of a file, or a row of a table."""

    row: int = 0
    at: int = 0
    line: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """The reason why a row has no vector. `param` is the field within the row, as the API names it."""

    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class BulkRow:
    """A row of the input. `item` is JSON as the API's `input` takes it; a row that cannot be read has a fault instead. `line` is
    the number, from 1, of the row's first line in a file of lines."""

    number: int
    id: Id
    item: bytes | None
    fault: Fault | None
    after: Cursor
    line: int | None = None

    @property
    def num_bytes(self) -> int:
        """The bytes that the row's item and id hold in memory."""
        return len(self.item or b"") + (len(self.id) if isinstance(self.id, str) else 0)


class BadRow(Exception):
    """Raised when a row cannot be read. The run goes on with the next row."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.fault = Fault(message, param)


class Source(Protocol):
    """An open input."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """A JSON value that differs between two inputs unless they have the same rows."""

    @property
    def total(self) -> int | None:
        """The value of `Cursor.at` at the end of the input, None if only reading all of it would tell."""

    def rows(self, cursor: Cursor) -> Iterator[BulkRow]:
        """Yield the rows after `cursor`. Raises Stopped if the input cannot be read on."""

    def has_changed(self) -> bool:
        """Return whether the input has changed since it was opened."""
