"""The journal of a run: the folder OUTPUT.parts, to which rows are committed part by part until the output is written.

A part is a file with the vectors of consecutive rows, and the position in the input after them. It is complete or absent, so a
run is resumed from the end of the last part. The folder has:

    lock             held by the process that works on the run
    manifest.json    input, options and model: written before the first part, never changed
    listing          the paths of a folder of images
    part-FIRST-END.arrow
    bad.jsonl        the bad rows so far; lines beyond the last part are dropped when the run is resumed. If OUTPUT is called
                     bad.jsonl, this is bad.ndjson.
    complete.json    written when every row is committed
    finished.json    written when the output is, into this folder; it only has to be moved to its place

A run passes three states, each marked by a file: begun (manifest.json), embedded (complete.json), written (finished.json).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
from filelock import FileLock, Timeout

from app.bulk import durable
from app.bulk.ending import Stopped, refused
from app.bulk.rows import BulkRow, Cursor, Fault, Id, Vector

_PART_NAME = re.compile(r"part-(\d+)-(\d+)\.arrow")
_FILE_NAMES = frozenset({"lock", "manifest.json", "bad.jsonl", "bad.ndjson", "complete.json", "finished.json"})
_COLUMNS = ["id", "good", "embedding"]
_INT64_RANGE = range(-(1 << 63), 1 << 63)


class Part(NamedTuple):
    """A committed part: rows first .. end - 1."""

    path: Path
    first: int
    end: int


class Journal:
    """The journal of the run that makes `output`. All but `locked` is for the process that holds the lock."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")
        # The output is written into the same folder, under its own name.
        self.bad_rows = self.folder / ("bad.ndjson" if output.name == "bad.jsonl" else "bad.jsonl")
        self.listing = self.folder / "listing"
        self.manifest_file = self.folder / "manifest.json"
        self._embedded_file = self.folder / "complete.json"
        self._result_file = self.folder / "finished.json"
        self._lock_file = self.folder / "lock"
        self.cursor = Cursor()
        self.vectors = 0
        self._removed = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, and make the folder. On leaving, the folder is removed if no run has begun. Raises Stopped if another
        process holds the lock, or if the folder has files of others."""
        try:
            self.folder.mkdir(exist_ok=True)
            if foreign := next((name for name in os.listdir(self.folder) if not self._is_own(name)), None):
                raise refused(
                    f"{self.folder} holds {foreign!r}, which is of no run of this command: move it, or choose another OUTPUT"
                )
            lock = FileLock(self._lock_file)
            lock.acquire(timeout=0)
        except Timeout:
            raise refused(f"another process is writing {self.output}") from None
        except OSError as error:
            raise refused(f"{self.folder} cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            # While the lock is still held, so that the next process to take one has a folder of its own.
            if not self._removed and not self.has_begun():
                self.remove()
            lock.release()

    # The state of the run

    def has_begun(self) -> bool:
        """Return whether there is a run to resume, or whose output is left to move."""
        return self.manifest_file.exists() or self._result_file.exists()

    def has_progress(self) -> bool:
        """Return whether a row is committed, or the input was found to have none."""
        return self.rows_committed() > 0 or self.is_embedded()

    def is_embedded(self) -> bool:
        """Return whether every row is committed."""
        return self._embedded_file.exists()

    def manifest(self) -> dict[str, Any] | None:
        """Return what `begin` has written, None if no run has begun. Raises Stopped if it is damaged."""
        return _read(self.manifest_file)

    def result(self) -> dict[str, Any] | None:
        """Return what `mark_written` has written, None before that. Raises Stopped if it is damaged."""
        return _read(self._result_file)

    def rows_committed(self) -> int:
        """Return how many rows are committed, by the names of the parts."""
        found = (_PART_NAME.fullmatch(name) for name in os.listdir(self.folder))
        return max((int(match[2]) for match in found if match), default=0)

    def parts(self) -> list[Part]:
        """Return the parts in order. Raises Stopped if one is missing."""
        found = []
        for name in os.listdir(self.folder):
            if match := _PART_NAME.fullmatch(name):
                found.append(Part(self.folder / name, int(match[1]), int(match[2])))
        found.sort(key=lambda part: part.first)
        if any(part.first != end for part, end in zip(found, [0, *(part.end for part in found)], strict=False)):
            raise refused(f"{self.folder} lacks a part; --restart begins anew")
        return found

    # From one state to the next

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Discard an earlier run, and begin a new one."""
        self.clear()
        durable.write(self.manifest_file, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))

    def resume(self) -> None:
        """Set `cursor` and `vectors` to the end of the last part. Raises Stopped if anything is missing or damaged."""
        parts = self.parts()
        self.cursor, self.vectors = _end_of(parts[-1].path) if parts else (Cursor(), 0)
        if (embedded := _read(self._embedded_file)) is not None and embedded.get("rows") != self.cursor.row:
            raise refused(f"{self.folder} lacks its last part; --restart begins anew")
        if self._drop_bad_rows(self.cursor.row) != self.cursor.row - self.vectors:
            raise refused(f"{self.bad_rows} lacks rows, or is damaged; --restart begins anew")

    def commit(self, rows: Sequence[tuple[BulkRow, Vector | Fault]], dimension: int) -> None:
        """Write the next rows, from the cursor on, as a part. When this returns, they outlast a kill or a power failure."""
        bad = [(row, answer) for row, answer in rows if isinstance(answer, Fault)]
        if bad:
            with self.bad_rows.open("ab") as file:
                file.writelines(_bad_line(row, fault) for row, fault in bad)
                file.flush()
                os.fsync(file.fileno())
        first, cursor, vectors = self.cursor.row, rows[-1][0].after, self.vectors + len(rows) - len(bad)
        table = _table(rows, dimension)
        end = {"cursor": orjson.dumps(asdict(cursor)), "vectors": b"%d" % vectors}
        with (
            durable.new_file(self.folder / f"part-{first:012d}-{cursor.row:012d}.arrow") as part,
            pa.ipc.new_file(part, table.schema.with_metadata(end)) as writer,
        ):
            writer.write_table(table)
        self.cursor, self.vectors = cursor, vectors

    def mark_embedded(self) -> None:
        """Mark every row of the input as committed."""
        durable.write(self._embedded_file, orjson.dumps({"rows": self.cursor.row}))

    def mark_written(self, result: Mapping[str, Any]) -> None:
        """Mark the output as written to this folder. `result` is what is needed to move it to its place."""
        durable.write(self._result_file, orjson.dumps(result))

    def clear(self) -> None:
        """Discard the run, but keep the folder. The files that mark its state go first, so that no half of it is resumed."""
        for path in (self._result_file, self._embedded_file, self.manifest_file):
            path.unlink(missing_ok=True)
        durable.sync_folder(self.folder)
        self._unlink_all_but({self._lock_file, self.listing})
        self.cursor, self.vectors = Cursor(), 0

    def remove(self) -> None:
        """Remove the folder. The file that marks the output as written goes last, so that a removal that is cut off is
        resumed."""
        self._unlink_all_but({self._result_file, self._lock_file})
        durable.sync_folder(self.folder)
        self._removed = True
        self._result_file.unlink(missing_ok=True)
        self._lock_file.unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            return  # another process waits for the lock, with a lock file of its own
        durable.sync_folder(self.folder.parent)

    def _unlink_all_but(self, kept: set[Path]) -> None:
        for name in os.listdir(self.folder):
            if (path := self.folder / name) not in kept and self._is_own(name):
                path.unlink()

    def _is_own(self, name: str) -> bool:
        """Return whether a run writes a file of this name. No other file is ever removed."""
        name = name.removesuffix(".tmp")
        return name in _FILE_NAMES or name.startswith((".", "listing", self.output.name)) or bool(_PART_NAME.fullmatch(name))

    def _drop_bad_rows(self, end: int) -> int:
        """Remove the bad rows from row `end` on, which belong to a commit that was cut off and will be written again, and lines
        that a power failure has torn. Returns how many bad rows are left."""
        if not self.bad_rows.exists():
            return 0
        num_bytes = count = 0
        with self.bad_rows.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n") or (row := _row_number(line)) is None or row >= end:
                    break
                num_bytes += len(line)
                count += 1
            file.truncate(num_bytes)
            os.fsync(file.fileno())
        return count


def open_part(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Open a part, whose columns are `id`, `good` and `embedding`. Raises Stopped if it is damaged."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(os.fsencode(path)))
        names = reader.schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if names != _COLUMNS:
        raise _damaged(path, "it has other columns")
    return reader


def read_part(part: Part) -> pa.Table:
    """Read a part. Raises Stopped if it is damaged."""
    reader = open_part(part.path)
    try:
        table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(part.path, error) from None
    if table.num_rows != part.end - part.first:
        raise _damaged(part.path, f"it has {table.num_rows:,} rows")
    return table


def _damaged(path: Path, why: object) -> Stopped:
    return refused(f"{path} is damaged ({str(why).partition(chr(10))[0]}); --restart begins anew")


def _end_of(path: Path) -> tuple[Cursor, int]:
    """Return the cursor after a part, and the number of vectors up to there. Raises Stopped if the part is damaged."""
    metadata = open_part(path).schema.metadata or {}
    try:
        return Cursor(**orjson.loads(metadata[b"cursor"])), int(metadata[b"vectors"])
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, "it does not say where it ends") from None


def _table(rows: Sequence[tuple[BulkRow, Vector | Fault]], dimension: int) -> pa.Table:
    """Return a table with a line for each row. That of a bad row is not `good`, and its vector is NaN."""
    nothing = np.full(dimension, np.nan, dtype=np.float32)
    flat = np.concatenate([nothing if isinstance(answer, Fault) else answer for _, answer in rows])
    return pa.table(
        {
            "id": _ids([row.id for row, _ in rows]),
            "good": pa.array([not isinstance(answer, Fault) for _, answer in rows], pa.bool_()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), dimension),
        }
    )


def _ids(ids: Sequence[Id]) -> pa.Array:
    """Return ids as int64 if all are integers of 64 bits or missing, as null if all are missing, else as text."""
    given = [value for value in ids if value is not None]
    if not given:
        return pa.nulls(len(ids))
    if all(isinstance(value, int) and value in _INT64_RANGE for value in given):
        return pa.array(ids, pa.int64())
    return pa.array([None if value is None else str(value) for value in ids], pa.string())


def _bad_line(row: BulkRow, fault: Fault) -> bytes:
    """Return the line of bad.jsonl for a bad row."""
    place = {} if row.line is None else {"line": row.line}
    bad = {"row": row.number, **place, "id": row.id, "reason": fault.message, "param": fault.param}
    return orjson.dumps(bad, option=orjson.OPT_APPEND_NEWLINE)


def _read(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, None if the file is missing. Raises Stopped if it is damaged."""
    try:
        found = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no object")
    return found


def _row_number(line: bytes) -> int | None:
    """Return the number of the row in a line of bad.jsonl, None if the line is damaged."""
    try:
        row = orjson.loads(line)["row"]
    except (ValueError, KeyError, TypeError):
        return None
    return row if isinstance(row, int) else None
