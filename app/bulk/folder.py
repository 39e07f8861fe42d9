"""A folder of images: every file whose suffix is that of an image, sorted by path. The listing is kept in a file and sorted
externally, since a folder may hold millions of images."""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import orjson

from app.bulk.delimited import without_surrogates
from app.bulk.ending import refused
from app.bulk.items import ImageFiles
from app.bulk.lines import Lines
from app.bulk.rows import BadRow, BulkRow, Cursor

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SUFFIX_BYTES = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
# So many lines are sorted in memory at a time.
_RUN_LINES = 100_000
# Linux allows 4096 bytes; escaping doubles them at most.
_MAX_PATH_BYTES = 2 * 4096 + 64


class Folder:
    """A Source of the images in a folder and its subfolders. `listing` is the file to write their paths to, a line each;
    `Cursor.at` is a byte of it. `check` is called for each folder, and may raise. Raises Stopped if a folder cannot be read."""

    def __init__(self, path: Path, listing: Path, files: ImageFiles, check: Callable[[], None]) -> None:
        self._listing = listing
        self._files = files
        digest = hashlib.sha256()
        count = ignored = 0
        with ExitStack() as runs, listing.open("wb") as file:
            sorter = _Sorter(runs, listing.parent)
            for name, stamp in _walk(os.fsencode(path), check):
                if name.lower().endswith(_SUFFIX_BYTES):
                    sorter.add(_escape(name) + b"\0" + stamp + b"\n")
                else:
                    ignored += 1
            for line in sorter.merged():
                digest.update(line)
                file.write(line.partition(b"\0")[0] + b"\n")
                count += 1
        if ignored:
            log.warning("%s: %d files are ignored, for their names end in none of %s", path, ignored, " ".join(SUFFIXES))
        self._count = count
        self.total: int | None = listing.stat().st_size
        self._digest = digest.hexdigest()

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"images": self._count, "sha256": self._digest}

    def has_changed(self) -> bool:
        """Return False: the rows come from the listing, which files that are added or removed later do not change."""
        return False

    def rows(self, cursor: Cursor) -> Iterator[BulkRow]:
        number = cursor.row
        with Lines(self._listing, _MAX_PATH_BYTES, cursor.at, is_text=False) as lines:
            for line in lines:
                name = _unescape(line.removesuffix(b"\n"))
                item, fault = None, None
                try:
                    item = orjson.dumps({"image": self._files.read(os.fsdecode(name))})
                except BadRow as error:
                    fault = error.fault
                yield BulkRow(number, without_surrogates(os.fsdecode(name)), item, fault, Cursor(number + 1, lines.offset))
                number += 1


class _Sorter:
    """An external merge sort of lines: sorted runs in temporary files of `folder`, merged at the end."""

    def __init__(self, files: ExitStack, folder: Path) -> None:
        self._files = files
        self._folder = folder
        self._runs: list[IO[bytes]] = []
        self._run: list[bytes] = []

    def add(self, line: bytes) -> None:
        self._run.append(line)
        if len(self._run) == _RUN_LINES:
            file = self._files.enter_context(tempfile.TemporaryFile(dir=self._folder, prefix="listing"))  # noqa: SIM115 - it is
            file.writelines(sorted(self._run))
            file.seek(0)
            self._runs.append(file)
            self._run = []

    def merged(self) -> Iterable[bytes]:
        return heapq.merge(*self._runs, sorted(self._run))


def _walk(root: bytes, check: Callable[[], None]) -> Iterator[tuple[bytes, bytes]]:
    """Yield every file below `root`: its path from there, and its size and modification time as bytes. Skips names that begin
    with a dot, and links to folders, which may form a cycle. Raises Stopped."""
    folders = [b""]
    while folders:
        check()
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = os.path.join(folder, entry.name)
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                    elif _is_file(entry):
                        found = entry.stat()
                        yield name, b"%d %d" % (found.st_size, found.st_mtime_ns)
        except OSError as error:
            raise refused(f"the folder {os.fsdecode(os.path.join(root, folder))} cannot be read: {error.strerror}") from None


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    """Return whether an entry is a file. A dangling or a circular link is not."""
    try:
        return entry.is_file()
    except OSError:
        if entry.is_symlink():
            return False
        raise


def _escape(name: bytes) -> bytes:
    """Escape a path so that it takes one line."""
    return name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")


def _unescape(line: bytes) -> bytes:
    return b"\\".join(piece.replace(b"\\n", b"\n") for piece in line.split(b"\\\\"))
