"""The libraries that only `python -m app embed` needs: the extra `bulk` of setup.cfg. Light: the command line imports it."""

from __future__ import annotations

from importlib.util import find_spec

LIBRARIES = ("pyarrow", "tqdm")


def missing_libraries() -> list[str]:
    """Return those of the libraries that are not installed, without importing any. Every input and output needs them all."""
    return [name for name in LIBRARIES if find_spec(name) is None]
