"""Parquet: columns of text, and of images as bytes, strings, or `{"bytes", "path"}`. Row groups are read in batches, however
large they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.bulk.delimited import readable
from app.bulk.ending import refused
from app.bulk.items import Columns, ImageFiles, id_of, item_of_record
from app.bulk.lines import LineFile
from app.bulk.rows import BadRow, Cursor, Fault, Id, Row

# A batch is as many rows as fill so many bytes, by the row group's average, which tells little of a single row: one large value
# that many rows share is in the file once. So a batch is small whatever the average.
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 16
_BUFFER = 1 << 20


class Parquet(LineFile):
    """A Source. `Cursor.at` is a row's number."""

    def __init__(self, path: Path, columns: Columns, files: ImageFiles) -> None:
        super().__init__(path)
        self._files = files
        try:
            with self._opened() as file:
                self._metadata = file.metadata
                names = list(file.schema_arrow.names)
        except (pa.ArrowException, OSError) as error:
            raise refused(f"{path} is not readable Parquet: {_reason(error)}") from None
        self.total = self._metadata.num_rows
        self._columns = columns.found_in(names, str(path))
        chosen = (self._columns.text, self._columns.image, self._columns.instruction, self._columns.id)
        self._names = list(dict.fromkeys(name for name in chosen if name is not None))

    def rows(self, cursor: Cursor) -> Iterator[Row]:
        first = 0
        try:
            opened = self._opened()
        except (pa.ArrowException, OSError) as error:
            raise refused(f"{self.path} is not readable any more: {_reason(error)}") from None
        with opened as file:
            if self.has_changed():
                raise refused(f"{self.path} has changed since it was opened")
            for group in range(self._metadata.num_row_groups):
                past = first + self._metadata.row_group(group).num_rows
                if cursor.at < past:
                    yield from self._group(file, group, first, past, max(first, cursor.at))
                first = past

    def _group(self, file: pq.ParquetFile, group: int, first: int, past: int, begin: int) -> Iterator[Row]:
        """The rows of a row group, which are first .. past - 1, from `begin` on. What is damaged ends with the group."""
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
        for number in range(max(at, begin), past):
            yield _row(number, None, None, Fault(f"row group {group} cannot be read on: {reason}"))

    def _batch(self, batch: pa.RecordBatch, first: int) -> Iterator[Row]:
        columns = {name: _values(batch.column(name)) for name in self._names}
        for index in range(batch.num_rows):
            identity: Id = None
            item, fault = None, None
            try:
                record = {name: _checked(values[index], name) for name, values in columns.items()}
                for name in (self._columns.text, self._columns.instruction):
                    if name is not None:
                        record[name] = _text(record[name], name)
                if self._columns.id is not None:
                    identity = _id(record[self._columns.id])
                item = item_of_record(record, self._columns, self._files)
            except BadRow as error:
                fault = error.fault
            yield _row(first + index, identity, item, fault)

    def _batch_rows(self, group: int) -> int:
        metadata = self._metadata.row_group(group)
        columns = map(metadata.column, range(metadata.num_columns))
        wanted = [column for column in columns if any(_is_within(column.path_in_schema, name) for name in self._names)]
        average = sum(column.total_uncompressed_size for column in wanted) / max(1, metadata.num_rows)
        return int(min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, average))))

    def _opened(self) -> pq.ParquetFile:
        # Buffered beforehand, a row group would be in memory whole.
        return pq.ParquetFile(pa.OSFile(os.fsencode(self.path)), pre_buffer=False, buffer_size=_BUFFER)


def _row(number: int, identity: Id, item: bytes | None, fault: Fault | None) -> Row:
    return Row(number, identity, item, fault, Cursor(number + 1, number + 1))


@dataclass(frozen=True)
class _Unreadable:
    """In the place of a value that Python has not: no UTF-8, a date after the year 9999, nanoseconds."""

    error: Exception


def _values(column: pa.Array) -> list[Any]:
    """A column's values; a text that is no UTF-8 is an error in its own place."""
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


def _checked(value: Any, name: str) -> Any:
    if isinstance(value, _Unreadable):
        text = isinstance(value.error, UnicodeDecodeError)
        raise BadRow("the row is not valid UTF-8 text" if text else f"{name} cannot be read: {_reason(value.error)}", name)
    return value


def _text(value: Any, name: str) -> Any:
    """Some writers of Parquet do not say of a text that it is one."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRow("the row is not valid UTF-8 text", name) from None


def _is_within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _id(value: Any) -> Id:
    if isinstance(value, bytes):
        return readable(value.decode("utf-8", "surrogateescape"))
    # Dates, decimals and the like have one spelling.
    return id_of(value if value is None or isinstance(value, (int, str)) else str(value))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
