"""CSV and TSV in UTF-8, with a header. An empty cell counts as missing."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from app.bulk.ending import refused
from app.bulk.items import Columns, ImageFiles, item_of_record
from app.bulk.lines import LineFile, Lines, LineTooLong
from app.bulk.rows import BadRow, BulkRow, Cursor, Fault, Id


class Delimited(LineFile):
    """A Source of CSV or TSV. Raises Stopped if the header is not readable, or lacks the columns."""

    def __init__(self, path: Path, columns: Columns, delimiter: str, files: ImageFiles, max_bytes: int) -> None:
        super().__init__(path)
        self._delimiter = delimiter
        self._files = files
        self._max_bytes = max_bytes
        # The default, 128 KiB, is less than an image in base64 takes.
        csv.field_size_limit(max_bytes)
        with Lines(path, max_bytes) as lines:
            try:
                self._header = next(self._records(lines), [])
            except (csv.Error, LineTooLong) as error:
                raise refused(f"{path} has no readable header: {error or 'its first line is too long'}") from None
            self._first = Cursor(0, lines.offset, lines.number)
        if not self._header:
            raise refused(f"{path} has no header: its first line is empty, or not there")
        if any("\0" in name or without_surrogates(name) != name for name in self._header):
            raise refused(f"{path} has a header that is not UTF-8 text")
        self._columns = columns.find_in(self._header, str(path))

    def rows(self, cursor: Cursor) -> Iterator[BulkRow]:
        begin = cursor if cursor.row else self._first
        number = begin.row
        with Lines(self.path, self._max_bytes, begin.at, begin.line) as lines:
            records = self._records(lines)
            while True:
                row_id: Id = None
                item, fault = None, None
                line = lines.number + 1
                try:
                    if (cells := next(records, None)) is None:
                        return
                    if not cells:
                        continue
                    record = self._record(cells)
                    row_id = without_surrogates(record.get(self._columns.id or ""))
                    item = item_of_record(record, self._columns, self._files)
                except csv.Error as error:
                    fault = Fault(f"the row is not valid CSV: {_reason(error)}{_swallowed(line, lines.number)}")
                except LineTooLong:
                    fault = Fault(f"a line has more than {self._max_bytes:,} bytes, which is the limit (MAX_REQUEST_BYTES)")
                except BadRow as error:
                    fault = error.fault
                yield BulkRow(number, row_id, item, fault, Cursor(number + 1, lines.offset, lines.number), line)
                number += 1

    def _record(self, cells: list[str]) -> dict[str, str]:
        """Return the cells that are not empty, by column. Raises BadRow."""
        if len(cells) > len(self._header):
            raise BadRow(f"the row has {len(cells)} cells, the header {len(self._header)}: is a cell with a delimiter in quotes?")
        return {name: cell for name, cell in zip(self._header, cells, strict=False) if cell}

    def _records(self, lines: Lines) -> Iterator[list[str]]:
        """Return an iterator over the cells of each record. Bytes that are not UTF-8 become lone surrogates, so that they spoil
        no other row. It is no generator: one would end with the first error, and this goes on with the next line."""
        text = map(_decode, lines)
        return iter(csv.reader(text, delimiter=self._delimiter, strict=True))


def without_surrogates(text: str | None) -> str | None:
    """Replace lone surrogates, which UTF-8 cannot encode, by the replacement character."""
    return None if text is None else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _decode(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _swallowed(line: int, last: int) -> str:
    """Say which lines were read as one row: a quote that is not closed takes in everything up to the next quote."""
    return f"; lines {line:,} to {last:,} were read as this row" if last > line else ""


def _reason(error: csv.Error) -> str:
    # A quote that is still open at the end of the file is the only cause of this message.
    return "a quote is never closed" if "unexpected end of data" in str(error) else str(error)
