"""The journal of a run: the folder OUTPUT.parts, where what is done is committed part by part, and nothing else is kept.

A part is one file with the vectors of rows that follow each other, and the place in the input after them. It is there whole or
not at all, so the last part's end is where the run goes on. In it lie:

    lock             held by the process that works here
    manifest.json    input, options and model: written before the first part, never changed
    listing          the paths of a folder of images
    part-FIRST-NEXT.arrow
    bad.jsonl        the bad rows so far; lines beyond the last part are dropped when the run goes on. Where OUTPUT is called
                     bad.jsonl, this is bad.ndjson.
    complete.json    there are no more rows
    finished.json    the output is written, beside this file; what is left is to move it to its place
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
import numpy.typing as npt
import orjson
import pyarrow as pa
from filelock import FileLock, Timeout

from app.bulk import durable
from app.bulk.ending import Stopped, refused
from app.bulk.rows import Cursor, Fault, Id, Row

_PART = re.compile(r"part-(\d+)-(\d+)\.arrow")
_NAMES = frozenset({"lock", "manifest.json", "bad.jsonl", "bad.ndjson", "complete.json", "finished.json"})
_COLUMNS = ["id", "good", "embedding"]
_INT64 = range(-(1 << 63), 1 << 63)

Vector = npt.NDArray[np.float32]


class Part(NamedTuple):
    """A committed part: rows first .. past - 1."""

    path: Path
    first: int
    past: int


class Journal:
    """`output` is the file that the run makes. All is for who holds the lock."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")
        # The output is written into the same folder, under its own name.
        self.bad_rows = self.folder / ("bad.ndjson" if output.name == "bad.jsonl" else "bad.jsonl")
        self.listing = self.folder / "listing"
        self.manifest_file = self.folder / "manifest.json"
        self._complete = self.folder / "complete.json"
        self._finished = self.folder / "finished.json"
        self._lock = self.folder / "lock"
        self.cursor = Cursor()
        self.vectors = 0
        self._removed = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder. Where no run has begun it is gone afterwards. Raises Stopped where another process has it."""
        try:
            self.folder.mkdir(exist_ok=True)
            if foreign := next((name for name in os.listdir(self.folder) if not self._is_own(name)), None):
                raise refused(
                    f"{self.folder} holds {foreign!r}, which is of no run of this command: move it, or choose another OUTPUT"
                )
            lock = FileLock(self._lock)
            lock.acquire(timeout=0)
        except Timeout:
            raise refused(f"another process is writing {self.output}") from None
        except OSError as error:
            raise refused(f"{self.folder} cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            # Before the lock is given up: who comes next has a folder of its own.
            if not self._removed and not self.has_begun():
                self.remove()
            lock.release()

    # What there is

    def has_begun(self) -> bool:
        return self.manifest_file.exists() or self._finished.exists()

    def rows_kept(self) -> int:
        """How many rows are committed, as the names of the parts tell."""
        found = (_PART.fullmatch(name) for name in os.listdir(self.folder))
        return max((int(match[2]) for match in found if match), default=0)

    def has_work(self) -> bool:
        """Whether a run has come to anything: to a row, or to the end of an input without any."""
        return self.rows_kept() > 0 or self.complete()

    def manifest(self) -> dict[str, Any] | None:
        return _read(self.manifest_file)

    def complete(self) -> bool:
        return self._complete.exists()

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run whose output is written."""
        return _read(self._finished)

    def parts(self) -> list[Part]:
        """All of them, in order. Raises Stopped where one is missing."""
        found = []
        for name in os.listdir(self.folder):
            if match := _PART.fullmatch(name):
                found.append(Part(self.folder / name, int(match[1]), int(match[2])))
        found.sort(key=lambda part: part.first)
        if any(part.first != past for part, past in zip(found, [0, *(part.past for part in found)], strict=False)):
            raise refused(f"{self.folder} lacks a part; --restart begins anew")
        return found

    def resume(self) -> None:
        """Take up where the last part ends: `cursor`, and `vectors` so far. Raises Stopped."""
        parts = self.parts()
        self.cursor, self.vectors = _end_of(parts[-1].path) if parts else (Cursor(), 0)
        if (end := _read(self._complete)) is not None and end.get("rows") != self.cursor.row:
            raise refused(f"{self.folder} lacks its last part; --restart begins anew")
        if self._drop_bad_rows(self.cursor.row) != self.cursor.row - self.vectors:
            raise refused(f"{self.bad_rows} lacks rows, or is damaged; --restart begins anew")

    # What is added

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """A new run."""
        self.clear()
        durable.write(self.manifest_file, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))

    def commit(self, rows: Sequence[tuple[Row, Vector | Fault]], dimension: int) -> None:
        """Rows that follow each other, from the cursor on: once this returns they are done, whatever happens."""
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

    def end(self) -> None:
        """There are no more rows."""
        durable.write(self._complete, orjson.dumps({"rows": self.cursor.row}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The output is written."""
        durable.write(self._finished, orjson.dumps(summary))

    # What goes

    def clear(self) -> None:
        """Forget what was done. What says that there is something goes first."""
        for path in (self._finished, self._complete, self.manifest_file):
            path.unlink(missing_ok=True)
        durable.sync_folder(self.folder)
        self._unlink_but({self._lock, self.listing})
        self.cursor, self.vectors = Cursor(), 0

    def remove(self) -> None:
        """The folder, and what says that it is finished last."""
        self._unlink_but({self._finished, self._lock})
        durable.sync_folder(self.folder)
        self._removed = True
        self._finished.unlink(missing_ok=True)
        self._lock.unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            return  # somebody waits for the lock, in a file of its own
        durable.sync_folder(self.folder.parent)

    def _unlink_but(self, kept: set[Path]) -> None:
        for name in os.listdir(self.folder):
            if (path := self.folder / name) not in kept and self._is_own(name):
                path.unlink()

    def _is_own(self, name: str) -> bool:
        """Whether a run puts a file of that name into the folder: nothing else is ever removed from it."""
        name = name.removesuffix(".tmp")
        return name in _NAMES or name.startswith((".", "listing", self.output.name)) or bool(_PART.fullmatch(name))

    def _drop_bad_rows(self, past: int) -> int:
        """Bad rows from `past` on were written by a commit that did not come to its end: they come again. So do lines that the
        failing of the power has torn. How many are left."""
        if not self.bad_rows.exists():
            return 0
        keep = count = 0
        with self.bad_rows.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n") or (row := _row_of(line)) is None or row >= past:
                    break
                keep += len(line)
                count += 1
            file.truncate(keep)
            os.fsync(file.fileno())
        return count


def open_part(path: Path) -> pa.ipc.RecordBatchFileReader:
    """A part's columns: `id`, `good`, `embedding`. Raises Stopped."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(os.fsencode(path)))
        names = reader.schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if names != _COLUMNS:
        raise _damaged(path, "it has other columns")
    return reader


def read_part(part: Part) -> pa.Table:
    """All of a part. Raises Stopped."""
    reader = open_part(part.path)
    try:
        table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(part.path, error) from None
    if table.num_rows != part.past - part.first:
        raise _damaged(part.path, f"it has {table.num_rows:,} rows")
    return table


def _damaged(path: Path, why: object) -> Stopped:
    return refused(f"{path} is damaged ({str(why).partition(chr(10))[0]}); --restart begins anew")


def _end_of(path: Path) -> tuple[Cursor, int]:
    metadata = open_part(path).schema.metadata or {}
    try:
        return Cursor(**orjson.loads(metadata[b"cursor"])), int(metadata[b"vectors"])
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, "it does not say where it ends") from None


def _table(rows: Sequence[tuple[Row, Vector | Fault]], dimension: int) -> pa.Table:
    """A line for every row: a bad one is not `good`, and its vector NaN."""
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
    """Whole numbers as such where there are no others, of 64 bits; else text; of type null where there are none."""
    given = [value for value in ids if value is not None]
    if not given:
        return pa.nulls(len(ids))
    if all(isinstance(value, int) and value in _INT64 for value in given):
        return pa.array(ids, pa.int64())
    return pa.array([None if value is None else str(value) for value in ids], pa.string())


def _bad_line(row: Row, fault: Fault) -> bytes:
    place = {} if row.line is None else {"line": row.line}
    bad = {"row": row.number, **place, "id": row.id, "reason": fault.message, "param": fault.param}
    return orjson.dumps(bad, option=orjson.OPT_APPEND_NEWLINE)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no object")
    return found


def _row_of(line: bytes) -> int | None:
    """The row of a line of bad rows; None of what is no such line."""
    try:
        row = orjson.loads(line)["row"]
    except (ValueError, KeyError, TypeError):
        return None
    return row if isinstance(row, int) else None
