"""bench(): `make bench` as a command. What measures is among the tests, which an installed package does not bring."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from app.lifecycle import ExitCode


def bench(arguments: Sequence[str]) -> int:
    """The exit code of tests/load/bench.py with these arguments."""
    try:
        module = importlib.import_module("tests.load.bench")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("tests"):
            raise
        print("bench is a part of the project's tests, which are not here: run it in a checkout of the project", file=sys.stderr)
        return ExitCode.START_FAILED
    code: int = module.command(arguments)
    return code
