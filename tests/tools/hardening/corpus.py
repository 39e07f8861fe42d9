"""Pillow's own test images, from its source distribution, and files that are broken by chance, the same in every run."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

_DOWNLOAD_S = 300
_PNG = b"\x89PNG\r\n\x1a\n"
# Sizes that readers stumble over.
_SIDES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 4096, 7000, 16_383)


class NoCorpus(Exception):
    """Pillow's source distribution cannot be had. The message says why."""


def pillow_images() -> dict[str, bytes]:
    """Every file of Pillow's Tests/images, by name. Nothing is unpacked."""
    found: dict[str, bytes] = {}
    with tarfile.open(_pillow_sdist()) as archive:
        for member in archive:
            _, tests, name = member.name.partition("/Tests/images/")
            if tests and member.isfile() and (file := archive.extractfile(member)):
                found[name] = file.read()
    return found


def _pillow_sdist() -> Path:
    """The source distribution of the Pillow that is installed: in the folder that PILLOW_SDIST names, or downloaded once."""
    given = os.environ.get("PILLOW_SDIST")
    folder = Path(given) if given else _cache()
    file = folder / f"pillow-{version('pillow')}.tar.gz"
    if not given and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(folder), f"pillow=={version('pillow')}"]
        try:
            ran = subprocess.run(command, text=True, capture_output=True, timeout=_DOWNLOAD_S)
        except subprocess.TimeoutExpired:
            raise NoCorpus(f"pip download took more than {_DOWNLOAD_S} s") from None
        if ran.returncode:
            raise NoCorpus(f"pip download: {ran.stderr.strip()[-300:]}")
    if not file.exists():
        raise NoCorpus(f"no {file.name} there")
    return file


def _cache() -> Path:
    """A folder of the user's, or where that cannot be, one that goes with the next start of the machine."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not os.access(base if base.exists() else base.parent, os.W_OK):
        base = Path(tempfile.gettempdir())
    return base / "embedding-server-tests"


def mutations(files: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """So many files, each broken in one to three ways, most of them lightly."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(files))
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            chance.choice((_flip, _flip, _flip, _flip, _resize, _resize, _cut, _drop, _repeat, _splice))(chance, data, files)
        if data.startswith(_PNG) and chance.random() < 0.5:
            _seal(data)
        yield bytes(data)


def _seal(data: bytearray) -> None:
    """Make the checksums of a PNG's chunks right again: else none of what was changed is read."""
    place = len(_PNG)
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4)
        place = end + 4


def _flip(chance: random.Random, data: bytearray, files: Sequence[bytes]) -> None:
    """Other bytes, half of the time near the beginning."""
    for _ in range(chance.choice((1, 1, 2, 8))):
        if data:
            place = chance.randrange(min(len(data), chance.choice((64, len(data)))))
            data[place] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))


def _resize(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """Another number where a header has its sizes."""
    code = chance.choice(("<H", ">H", "<L", ">L"))
    size = struct.calcsize(code)
    if len(data) > 64:
        place = chance.randrange(4, 60)
        data[place : place + size] = struct.pack(code, chance.choice(_SIDES) & (256**size - 1))


def _cut(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _drop(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place = chance.randrange(len(data) + 1)
    del data[place : place + chance.randint(1, 64)]


def _repeat(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place = chance.randrange(len(data) + 1)
    data[place:place] = data[place : place + chance.randint(1, 64)] * chance.randint(1, 20)


def _splice(chance: random.Random, data: bytearray, files: Sequence[bytes]) -> None:
    """The rest of another file."""
    other = chance.choice(files)
    data[chance.randrange(len(data) + 1) :] = other[chance.randrange(len(other) + 1) :]
