"""Lines of a plain or gzip file, read from any byte on: one at a time in memory, and none longer than a limit."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from app.bulk.ending import Stopped, refused

# The rest of a line that is too long is skipped in chunks of this size.
_SKIP_BYTES = 1 << 20
# So much of a file's beginning, and of its end, is hashed for its identity.
_SAMPLE_BYTES = 1 << 20
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class LineTooLong(Exception):
    """Raised for a line of more bytes than the limit. The line is skipped."""


class Lines:
    """An iterator over lines, each with its line ending. `offset` is the byte after the last line, `number` how many lines came
    before that byte.

    If `is_text`, a byte order mark at the beginning of the file is removed from the first line.

    Raises LineTooLong, after which the next line can be read, and Stopped if the file cannot be read on.
    """

    def __init__(self, path: Path, max_bytes: int, offset: int = 0, number: int = 0, *, is_text: bool = True) -> None:
        self.path = path
        self.offset = offset
        self.number = number
        self._max_bytes = max_bytes
        self._is_text = is_text
        with _reading(path, offset):
            self._file: IO[bytes] | gzip.GzipFile = gzip.open(path, "rb") if is_gzip(path) else path.open("rb")  # noqa: SIM115
            self._file.seek(offset)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> bytes:
        may_have_bom = self._is_text and self.offset == 0
        with _reading(self.path, self.offset):
            line = self._file.readline(self._max_bytes + 1)
            self.offset += len(line)
            is_too_long = len(line) > self._max_bytes
            while is_too_long and line and not line.endswith(b"\n"):
                line = self._file.readline(_SKIP_BYTES)
                self.offset += len(line)
        if not line and not is_too_long:
            raise StopIteration
        self.number += 1
        if is_too_long:
            raise LineTooLong
        if may_have_bom and line.startswith(_UTF16_BOMS):
            raise refused(f"{self.path} is UTF-16 text; convert it to UTF-8")
        return line.removeprefix(_UTF8_BOM) if may_have_bom else line


@contextmanager
def _reading(path: Path, offset: int) -> Iterator[None]:
    """Turn every error of reading a file into Stopped, with one line that says where."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        place = f"beyond byte {offset:,}" if offset else "at all"
        raise refused(f"{path} cannot be read {place}: {getattr(error, 'strerror', None) or error}") from None


class LineFile:
    """The base of sources that are one file: its identity, its length, and whether it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = _stat(path)
        # The length of a gzip file's content is not known before its end.
        self.total = None if is_gzip(path) else self._stat[0]

    @property
    def identity(self) -> Mapping[str, Any]:
        size, modified = self._stat
        return {"bytes": size, "modified_ns": modified, "sha256": hash_of_ends(self.path, size)}

    def has_changed(self) -> bool:
        try:
            return _stat(self.path) != self._stat
        except Stopped:
            return True


def is_gzip(path: Path) -> bool:
    """Return whether a file is gzip, by its suffix."""
    return path.suffix.lower() == ".gz"


def hash_of_ends(path: Path, size: int) -> str:
    """Return the SHA-256, as hex, of the first and the last MiB of a file of `size` bytes. Raises Stopped."""
    digest = hashlib.sha256()
    with _reading(path, 0), path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _stat(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its modification time in nanoseconds. Raises Stopped."""
    with _reading(path, 0):
        found = os.stat(path)
    return found.st_size, found.st_mtime_ns
