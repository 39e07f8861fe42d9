"""JSON Lines: each line an item as the API's `input` takes it; an object may have an `id`. Empty lines are no rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson

from app.bulk.items import Columns, ImageFiles, id_of, item_of, item_of_record
from app.bulk.lines import LineFile, Lines, LineTooLong
from app.bulk.rows import BadRow, BulkRow, Cursor, Fault, Id


class JsonLines(LineFile):
    """A Source of JSON Lines. If columns are chosen, an object is read as a record of them, else as an item of the API."""

    def __init__(self, path: Path, columns: Columns, files: ImageFiles, max_bytes: int) -> None:
        super().__init__(path)
        # Any key may be missing from any line, so the defaults cannot depend on a header as they do in a table.
        self._columns = Columns(
            columns.text or (None if columns.image else "text"),
            columns.image or (None if columns.text else "image"),
            columns.instruction or "instruction",
            columns.id or "id",
        )
        self._as_records = columns.are_chosen
        self._files = files
        self._max_bytes = max_bytes

    def rows(self, cursor: Cursor) -> Iterator[BulkRow]:
        number = cursor.row
        with Lines(self.path, self._max_bytes, cursor.at, cursor.line) as lines:
            while True:
                row_id: Id = None
                item, fault = None, None
                try:
                    if (line := next(lines, None)) is None:
                        return
                    if not line.strip():
                        continue
                    value = self._parse(line)
                    if isinstance(value, dict):
                        row_id = id_of(value.get(self._columns.id))
                    item = self._item(value)
                except LineTooLong:
                    fault = Fault(f"the line has more than {self._max_bytes:,} bytes, which is the limit (MAX_REQUEST_BYTES)")
                except BadRow as error:
                    fault = error.fault
                yield BulkRow(number, row_id, item, fault, Cursor(number + 1, lines.offset, lines.number), lines.number)
                number += 1

    def _parse(self, line: bytes) -> object:
        try:
            return orjson.loads(line)
        except ValueError as error:
            reason = str(error).partition(":")[0]
        raise BadRow(f"the line is not valid JSON in UTF-8: {reason}")

    def _item(self, value: object) -> bytes:
        if isinstance(value, dict) and self._as_records:
            return item_of_record(value, self._columns, self._files)
        return item_of(value, self._files)
