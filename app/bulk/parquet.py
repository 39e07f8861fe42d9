"""Parquet: columns of text, and of images as bytes, strings, or `{"bytes", "path"}`. Row groups of any size are read in small
batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.bulk.delimited import without_surrogates
from app.bulk.ending import refused
from app.bulk.items import Columns, ImageFiles, id_of, item_of_record
from app.bulk.lines import LineFile
from app.bulk.rows import BadRow, BulkRow, Cursor, Fault, Id

# A batch has as many rows as fill _BATCH_BYTES at the row group's average size, and _BATCH_ROWS at most: the average says little
# of a single row, since a large value that many rows share is in the file once.
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20


class Parquet(LineFile):
    """A Source of Parquet. `Cursor.at` is the number of a row. Raises Stopped if the file is not readable Parquet, or lacks the
    columns."""

    def __init__(self, path: Path, columns: Columns, files: ImageFiles) -> None:
        super().__init__(path)
        self._files = files
        try:
            with self._open() as file:
                self._metadata = file.metadata
                names = list(file.schema_arrow.names)
        except (pa.ArrowException, OSError) as error:
            raise refused(f"{path} is not readable Parquet: {_reason(error)}") from None
        self.total = self._metadata.num_rows
        self._columns = columns.find_in(names, str(path))
        chosen = (self._columns.text, self._columns.image, self._columns.instruction, self._columns.id)
        self._names = list(dict.fromkeys(name for name in chosen if name is not None))

    def rows(self, cursor: Cursor) -> Iterator[BulkRow]:
        first = 0
        try:
            opened = self._open()
        except (pa.ArrowException, OSError) as error:
            raise refused(f"{self.path} is not readable any more: {_reason(error)}") from None
        with opened as file:
            if self.has_changed():
                raise refused(f"{self.path} has changed since it was opened")
            for group in range(self._metadata.num_row_groups):
                end = first + self._metadata.row_group(group).num_rows
                if cursor.at < end:
                    yield from self._group(file, group, first, end, max(first, cursor.at))
                first = end

    def _group(self, file: pq.ParquetFile, group: int, first: int, end: int, begin: int) -> Iterator[BulkRow]:
        """Yield the rows of a row group, which has first .. end - 1, from `begin` on. If it is damaged, the rest of its rows are
        bad; the next row group can still be read."""
        at = first
        try:
            for batch in file.iter_batches(self._batch_rows(group), row_groups=[group], columns=self._names):
                skipped = max(0, begin - at)
                if skipped < batch.num_rows:
                    yield from self._batch(batch.slice(skipped), at + skipped)
                at += batch.num_rows
            reason = "it has fewer rows than it says"
        except (pa.ArrowException, OSError) as error:
            reason = _reason(error)
        for number in range(max(at, begin), end):
            yield _row(number, None, None, Fault(f"row group {group} cannot be read on: {reason}"))

    def _batch(self, batch: pa.RecordBatch, first: int) -> Iterator[BulkRow]:
        columns = {name: _values(batch.column(name)) for name in self._names}
        for index in range(batch.num_rows):
            row_id: Id = None
            item, fault = None, None
            try:
                record = {name: _check_readable(values[index], name) for name, values in columns.items()}
                for name in (self._columns.text, self._columns.instruction):
                    if name is not None:
                        record[name] = _decode(record[name], name)
                if self._columns.id is not None:
                    row_id = _id(record[self._columns.id])
                item = item_of_record(record, self._columns, self._files)
            except BadRow as error:
                fault = error.fault
            yield _row(first + index, row_id, item, fault)

    def _batch_rows(self, group: int) -> int:
        """Return how many rows of a row group to read at a time."""
        metadata = self._metadata.row_group(group)
        columns = map(metadata.column, range(metadata.num_columns))
        wanted = [column for column in columns if any(_is_within(column.path_in_schema, name) for name in self._names)]
        average = sum(column.total_uncompressed_size for column in wanted) / max(1, metadata.num_rows)
        return int(min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, average))))

    def _open(self) -> pq.ParquetFile:
        # pre_buffer would hold a whole row group in memory.
        return pq.ParquetFile(pa.OSFile(os.fsencode(self.path)), pre_buffer=False, buffer_size=_BUFFER_BYTES)


def _row(number: int, row_id: Id, item: bytes | None, fault: Fault | None) -> BulkRow:
    return BulkRow(number, row_id, item, fault, Cursor(number + 1, number + 1))


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a value that Python cannot hold: text that is not UTF-8, a date after the year 9999, nanoseconds."""

    error: Exception


def _values(column: pa.Array) -> list[Any]:
    """Return a column's values, with _Unreadable in place of each that Python cannot hold."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(column[index]) for index in range(len(column))]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return _Unreadable(error)


def _check_readable(value: Any, name: str) -> Any:
    """Return a value. Raises BadRow if it is _Unreadable."""
    if isinstance(value, _Unreadable):
        is_text = isinstance(value.error, UnicodeDecodeError)
        raise BadRow("the row is not valid UTF-8 text" if is_text else f"{name} cannot be read: {_reason(value.error)}", name)
    return value


def _decode(value: Any, name: str) -> Any:
    """Return bytes as text, since some writers of Parquet do not mark text as such; any other value as it is. Raises BadRow."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRow("the row is not valid UTF-8 text", name) from None


def _is_within(path: str, name: str) -> bool:
    """Return whether a path in the schema is the column `name`, or a field of it."""
    return path == name or path.startswith(f"{name}.")


def _id(value: Any) -> Id:
    if isinstance(value, bytes):
        return without_surrogates(value.decode("utf-8", "surrogateescape"))
    # str() of a date, a decimal and the like is unambiguous.
    return id_of(value if value is None or isinstance(value, (int, str)) else str(value))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
