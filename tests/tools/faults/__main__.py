"""Puts faults into the code by hand, one at a time, and says which of them a lane of tests finds.

    python -m tests.tools.faults [--only WORDS] [--tests ARGUMENTS...]

Each fault is made in a copy of the tree, in which `make test`'s lane runs until its first failure: first the tests of the package
that has the fault, then the rest. A fault that no test finds is a promise that nobody holds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.paths import ROOT
from tests.tools.faults.faults import FAULTS, Fault

TREE = ("app", "scheduler", "models", "tests", "deploy", ".ci", "setup.cfg", "pyproject.toml", "config.env.example", "Makefile")
# Longer than any lane takes: a fault may hang it, which a test's own limit finds.
LIMIT_S = 1200


def main() -> int:
    """Tries every fault; returns 0 if all were found."""
    options = parse_arguments()
    chosen = [fault for fault in FAULTS if all(word in f"{fault.file} {fault.what}" for word in options.only)]
    missed = 0
    for number, fault in enumerate(chosen, start=1):
        started = time.monotonic()
        found_by = try_fault(fault, options.tests)
        missed += found_by is None
        seconds = time.monotonic() - started
        print(f"{number:>3} {seconds:6.0f} s  {fault.file}: {fault.what}  ->  {found_by or 'NOT FOUND'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults found")
    return int(missed > 0)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="faults whose file and words have all of these")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=[], help="pytest's arguments instead of the fast lane's")
    return parser.parse_args()


def try_fault(fault: Fault, arguments: list[str]) -> str | None:
    """Returns the first test that fails with a fault, None if none does."""
    with copy_of_the_tree() as folder:
        fault.put_into(folder)
        near = folder / "tests" / Path(fault.file).parent
        while not near.is_dir():
            near = near.parent
        for where in (near, folder / "tests"):
            if failed := first_failure(folder, [str(where), *(arguments or fast_lane())]):
                return failed
    return None


def fast_lane() -> list[str]:
    """Returns pytest's arguments of `make test`."""
    said = subprocess.run(["make", "--silent", "print-fast-lane"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return shlex.split(said)


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """Yields a copy of what tests need, which is gone in the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".pytest_cache", "demo-checkpoint", "bench-*")
        for part in [*TREE, *(page.name for page in ROOT.glob("*.md"))]:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=ignore)
            elif source.exists():
                shutil.copy(source, folder / part)
        yield folder


def first_failure(folder: Path, arguments: list[str]) -> str | None:
    """Runs tests in a tree until one fails; returns its name."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return "the time limit"
    if done.returncode in (0, 5):
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"exit {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
