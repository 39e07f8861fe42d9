"""A run of `python -m app embed` that is killed at every point at which something becomes durable, and resumed.

    python -m tests.support.bulk_crashes FOLDER STEP SUFFIX...

makes an input in FOLDER. For each suffix, at every STEP-th call of fsync, rename, unlink or rmdir, a child process is killed by
SIGKILL at that call; another child resumes the run, and its output is compared with that of a run that was not killed. It ends
with a line that says how many points there were, or with an AssertionError. It is a process of its own, since it forks.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from app.bulk import stream
from app.bulk.ending import Stopped
from tests.support import bulk_runs
from tests.support.fakes import FakeModel

ROWS = 40
BAD = (7, 20, 39)


def in_child(work: Callable[[], int]) -> int:
    """Do some work in a child process. Returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        code = 99
        os.dup2(2, 1)
        try:
            code = work()
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            code = int(stopped.code)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(point: int, work: Callable[[], int]) -> Callable[[], int]:
    """Return the same work, which is killed at its `point`-th call that makes something durable."""

    def dying() -> int:
        left = point

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **more)

            return wrapper

        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        return work()

    return dying


def check(output: Path, code: int) -> None:
    """Assert that the output has every row once, in order, with its vector."""
    assert code == 4, code
    written, model = bulk_runs.read(output), FakeModel()
    assert written.rows == [row for row in range(ROWS) if row not in BAD], written.rows
    assert written.ids == written.rows
    assert np.array_equal(written.vectors, np.stack([model.vector(f"text {row}") for row in written.rows]))
    assert [line["row"] for line in written.bad] == list(BAD), written.bad
    assert (written.meta["rows"], written.meta["vectors"], written.meta["bad_rows"]) == (ROWS, ROWS - len(BAD), len(BAD))
    assert not bulk_runs.leftovers(output), bulk_runs.leftovers(output)


def main(folder: Path, step: int, suffixes: list[str]) -> None:
    stream.COMMIT_ROWS = 10
    source = bulk_runs.write_lines(
        folder / "in.jsonl", [{"id": row} if row in BAD else {"id": row, "text": f"text {row}"} for row in range(ROWS)]
    )
    points = kills = 0
    for suffix in suffixes:
        output = folder / f"out{suffix}"

        def work(output: Path = output) -> int:
            return bulk_runs.run(source, output, request_rows=5, concurrency=1)

        check(output, in_child(work))
        point = 1
        while True:
            for path in folder.glob(f"{output.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if (code := in_child(killed_at(point, work))) != -signal.SIGKILL:
                check(output, code)
                break
            kills += 1
            nothing_left = output.exists() and not list(output.parent.glob(f"{output.name}.parts/*.json"))
            code = in_child(work)
            # Where nothing was left to do, what is there is refused to be replaced.
            assert not nothing_left or code == 2, code
            check(output, 4 if nothing_left else code)
            point += step
        points += point - 1
    print(f"{points} points, {kills} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
