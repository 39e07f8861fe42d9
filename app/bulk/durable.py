"""Files that are complete or absent whenever the power fails: written under a temporary name, synced, renamed, synced again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write; it is renamed to `path` when the context is left without an error."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    move(temporary, path)


def write(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all."""
    with new_file(path) as file:
        file.write(data)


def move(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing a file that is there."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that what was created, removed or renamed in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
