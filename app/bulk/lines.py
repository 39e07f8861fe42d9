"""The lines of a file, plain or gzip, from any byte on: never more than one in memory, and none longer than a limit."""

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

_SKIPPED_AT_ONCE = 1 << 20
# The beginning and the end of a file that are part of its identity.
_SAMPLE = 1 << 20
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class LineTooLong(Exception):
    """A line of more bytes than the limit. It is passed over."""


class Lines:
    """An iterator over lines, their ends included. `at` is the byte after the last one, `number` how many came before it in all.

    Of what `is_text` the first line may begin with a mark of its encoding, which is no part of it.

    Raises LineTooLong, after which the next line can be had, and Stopped where the file cannot be read on.
    """

    def __init__(self, path: Path, max_bytes: int, at: int = 0, number: int = 0, *, is_text: bool = True) -> None:
        self.path = path
        self.at = at
        self.number = number
        self._max_bytes = max_bytes
        self._is_text = is_text
        with _reading(path, at):
            self._file: IO[bytes] | gzip.GzipFile = gzip.open(path, "rb") if is_gzip(path) else path.open("rb")  # noqa: SIM115
            self._file.seek(at)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> bytes:
        may_be_marked = self._is_text and self.at == 0
        with _reading(self.path, self.at):
            line = self._file.readline(self._max_bytes + 1)
            self.at += len(line)
            is_too_long = len(line) > self._max_bytes
            while is_too_long and line and not line.endswith(b"\n"):
                line = self._file.readline(_SKIPPED_AT_ONCE)
                self.at += len(line)
        if not line and not is_too_long:
            raise StopIteration
        self.number += 1
        if is_too_long:
            raise LineTooLong
        if may_be_marked and line.startswith(_UTF16_MARKS):
            raise refused(f"{self.path} is UTF-16 text; convert it to UTF-8")
        return line.removeprefix(_UTF8_MARK) if may_be_marked else line


@contextmanager
def _reading(path: Path, at: int) -> Iterator[None]:
    """Turns what a file can fail with into one line that says where."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        place = f"beyond byte {at:,}" if at else "at all"
        raise refused(f"{path} cannot be read {place}: {getattr(error, 'strerror', None) or error}") from None


class LineFile:
    """What sources that are one file share: who they are, how far they go, and whether they changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = _stat(path)
        # Of what is inflated the size is not known.
        self.total = None if is_gzip(path) else self._stat[0]

    @property
    def identity(self) -> Mapping[str, Any]:
        size, modified = self._stat
        return {"bytes": size, "modified_ns": modified, "sha256": sampled(self.path, size)}

    def has_changed(self) -> bool:
        try:
            return _stat(self.path) != self._stat
        except Stopped:
            return True


def is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def sampled(path: Path, size: int) -> str:
    """A hash of a file's beginning and end."""
    digest = hashlib.sha256()
    with _reading(path, 0), path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _stat(path: Path) -> tuple[int, int]:
    with _reading(path, 0):
        found = os.stat(path)
    return found.st_size, found.st_mtime_ns
