"""A process that runs what it is asked to and is idle between: one JSON line in, one out.

`LineProcess` is the asking side; `answer_lines` is the process's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests.tools.load.children import ChildFailed


class LineProcess:
    """The process from outside. `ready` is what it says first."""

    def __init__(self, popen: subprocess.Popen[str], name: str) -> None:
        self._popen = popen
        self._name = name
        self.ready: dict[str, Any] = {}

    def wait(self) -> None:
        """Until it is ready. Raises ChildFailed."""
        self.ready = self._hear()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Run a command, and hear what it returns. Raises ChildFailed."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            pass  # It has ended: there is no answer to hear.
        return self._hear()

    def _hear(self) -> Any:
        assert self._popen.stdout is not None
        if line := self._popen.stdout.readline():
            return json.loads(line)
        raise ChildFailed(f"{self._name} have ended with {self._popen.wait()}")


def answer_lines(make: Callable[[], tuple[dict[str, Any], Mapping[str, Callable[..., Any]]]]) -> None:
    """Say the first that `make` returns, and answer with the commands that are the second, until nobody asks any more."""
    # Answers alone go to standard output: what a library prints must not be among them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    ready, commands = make()
    answer(ready)
    for line in sys.stdin:
        command = json.loads(line)
        answer(commands[command.pop("do")](**command))
