"""ServerProcess: a server as a child process, what it says, and what it has of the processor."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tests.tools.load.callers import Server
from tests.tools.load.children import ChildFailed

# Loading and warming up, with everything compiled that is compiled.
START_S = 300.0


class ServerProcess:
    """A running one. `server` is where it listens."""

    def __init__(self, popen: subprocess.Popen[str], log: Path, server: Server, name: str) -> None:
        self._popen = popen
        self._log = log
        self._name = name
        self.server = server

    def cpu_seconds(self) -> float:
        """What the process has had of all cores so far. Raises ChildFailed."""
        try:
            fields = Path(f"/proc/{self._popen.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            raise ChildFailed(f"{self._name} is gone\n{self._last_words()}") from None
        # utime and stime: the 14th and 15th field, of which the first two are cut off.
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def get(self, path: str) -> bytes:
        """The body of a GET. Raises HTTPError for a refusal, ChildFailed where it does not answer."""
        request = Request(f"http://{self.server.host}:{self.server.port}{path}")
        try:
            with urlopen(request, timeout=60) as reply:
                content: bytes = reply.read()
                return content
        except HTTPError:
            raise
        except (URLError, OSError) as error:
            raise ChildFailed(f"{self._name} does not answer: {error}\n{self._last_words()}") from None

    def _check(self, until: float) -> None:
        """Let a moment pass. Raises ChildFailed where it has ended, or the time is over."""
        if (code := self._popen.poll()) is not None:
            raise ChildFailed(f"{self._name} has ended with {code}\n{self._last_words()}")
        if time.monotonic() > until:
            raise ChildFailed(f"{self._name} is not there in time\n{self._last_words()}")
        time.sleep(0.05)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")

    def _last_words(self) -> str:
        return "".join(f"  {line}\n" for line in self._said().splitlines()[-15:])
