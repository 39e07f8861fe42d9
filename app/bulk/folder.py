"""A folder of images: every file with a suffix of an image, in order of its path. The listing is a file, for there may be
millions of them: it is sorted in runs that are merged."""

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

from app.bulk.delimited import readable
from app.bulk.ending import refused
from app.bulk.items import ImageFiles
from app.bulk.lines import Lines
from app.bulk.rows import BadRow, Cursor, Row

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_ENDINGS = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
_RUN = 100_000
# No path is longer on Linux; an escaped one is at most twice that.
_LONGEST_PATH = 2 * 4096 + 64


class Folder:
    """A Source. `listing` is where the paths are kept, a line each; `Cursor.at` is a byte of it. `check` is called for each
    folder, and may raise."""

    def __init__(self, path: Path, listing: Path, files: ImageFiles, check: Callable[[], None]) -> None:
        self._listing = listing
        self._files = files
        digest = hashlib.sha256()
        count = ignored = 0
        with ExitStack() as runs, listing.open("wb") as file:
            sorter = _Sorter(runs, listing.parent)
            for name, stamp in _walked(os.fsencode(path), check):
                if name.lower().endswith(_ENDINGS):
                    sorter.add(_escaped(name) + b"\0" + stamp + b"\n")
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
        """A file that comes or goes meanwhile changes nothing: the listing is what is read."""
        return False

    def rows(self, cursor: Cursor) -> Iterator[Row]:
        number = cursor.row
        with Lines(self._listing, _LONGEST_PATH, cursor.at, is_text=False) as lines:
            for line in lines:
                name = _unescaped(line.removesuffix(b"\n"))
                item, fault = None, None
                try:
                    item = orjson.dumps({"image": self._files.read(os.fsdecode(name))})
                except BadRow as error:
                    fault = error.fault
                yield Row(number, readable(os.fsdecode(name)), item, fault, Cursor(number + 1, lines.at))
                number += 1


class _Sorter:
    """Sorts lines without holding them: runs on disk, merged."""

    def __init__(self, files: ExitStack, folder: Path) -> None:
        self._files = files
        self._folder = folder
        self._runs: list[IO[bytes]] = []
        self._run: list[bytes] = []

    def add(self, line: bytes) -> None:
        self._run.append(line)
        if len(self._run) == _RUN:
            file = self._files.enter_context(tempfile.TemporaryFile(dir=self._folder, prefix="listing"))  # noqa: SIM115 - it is
            file.writelines(sorted(self._run))
            file.seek(0)
            self._runs.append(file)
            self._run = []

    def merged(self) -> Iterable[bytes]:
        return heapq.merge(*self._runs, sorted(self._run))


def _walked(root: bytes, check: Callable[[], None]) -> Iterator[tuple[bytes, bytes]]:
    """Every file below `root`, its path from there, and its size and time. Names that begin with a dot are passed over; links to
    folders are not followed, for they may lead in circles. Raises Stopped."""
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
    """A link that leads nowhere, or in a circle, is none."""
    try:
        return entry.is_file()
    except OSError:
        if entry.is_symlink():
            return False
        raise


def _escaped(name: bytes) -> bytes:
    return name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")


def _unescaped(line: bytes) -> bytes:
    return b"\\".join(piece.replace(b"\\n", b"\n") for piece in line.split(b"\\\\"))
