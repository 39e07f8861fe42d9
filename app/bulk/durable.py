"""Files that are there whole or not at all, whenever the power fails: written beside their place, synced, renamed, synced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes its place at `path` once the context has been left without an error."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    move(temporary, path)


def write(path: Path, data: bytes) -> None:
    """A small file."""
    with new_file(path) as file:
        file.write(data)


def move(source: Path, target: Path) -> None:
    """Rename, over what is there."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """What came, went or was renamed in a folder stays so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
