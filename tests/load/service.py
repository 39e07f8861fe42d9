"""The service as a child process: `python -m app` with a checkpoint, on a free port of the loopback, with a key of its own."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from app.settings import SETTINGS
from tests.load.callers import Server
from tests.load.children import ChildFailed, child

ROOT = Path(__file__).parent.parent.parent
# Loading and warming up, with everything compiled that is compiled.
START_S = 300.0
# The device may still run one batch when the queue is empty.
SETTLE_S = 0.3

MODULE = "app"
# The defaults but for what would refuse or shrink what is measured.
MEASURED = {
    "HOST": "127.0.0.1",
    "PORT": "0",
    "EMBEDDING_DIMENSION": "native",
    "MAX_IMAGE_SIZE": "0",
    "MAX_QUEUE_SIZE": "65536",
    "MAX_REQUEST_BYTES": "256MiB",
    "MAX_BYTES_IN_FLIGHT": "64GiB",
    "REQUEST_TIMEOUT_S": "600",
    "BODY_TIMEOUT_S": "600",
}


class Service:
    """A running one. `server` is where it listens."""

    def __init__(self, popen: subprocess.Popen[str], log: Path, key: str) -> None:
        self._popen = popen
        self._log = log
        self._key = key
        self.server = Server(0, key)

    def wait(self, timeout: float = START_S) -> None:
        """Until it takes traffic. Raises ChildFailed."""
        until = time.monotonic() + timeout
        while not (found := re.search(r"listening on \S+ port (\d+)", self._said())):
            self._check(until)
        self.server = Server(int(found[1]), self._key)
        while not self._is_ready():
            self._check(until)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics without labels, by name."""
        text = self._get("/metrics").decode()
        return {name: float(value) for name, value in re.findall(r"(?m)^(\w+) (\S+)$", text)}

    def cpu_seconds(self) -> float:
        """What the process has had of all cores so far. Raises ChildFailed."""
        try:
            fields = Path(f"/proc/{self._popen.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            raise ChildFailed(f"the service is gone\n{self._last_words()}") from None
        # utime and stime: the 14th and 15th field, of which the first two are cut off.
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def settle(self) -> None:
        """Wait until it has nothing to do. Raises ChildFailed."""
        until = time.monotonic() + START_S
        while self.metrics()["embedding_queue_depth"]:
            self._check(until)
        time.sleep(SETTLE_S)

    def _get(self, path: str) -> bytes:
        request = Request(f"http://{self.server.host}:{self.server.port}{path}")
        try:
            with urlopen(request, timeout=60) as reply:
                content: bytes = reply.read()
                return content
        except HTTPError:
            raise
        except (URLError, OSError) as error:
            raise ChildFailed(f"the service does not answer: {error}\n{self._last_words()}") from None

    def _is_ready(self) -> bool:
        try:
            self._get("/health/ready")
            return True
        except HTTPError as refusal:
            refusal.close()
            return False

    def _check(self, until: float) -> None:
        """Let a moment pass. Raises ChildFailed where it has ended, or the time is over."""
        if (code := self._popen.poll()) is not None:
            raise ChildFailed(f"the service has ended with {code}\n{self._last_words()}")
        if time.monotonic() > until:
            raise ChildFailed(f"the service is not there in time\n{self._last_words()}")
        time.sleep(0.05)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")

    def _last_words(self) -> str:
        return "".join(f"  {line}\n" for line in self._said().splitlines()[-15:])


@contextmanager
def service(path: Path, device: str, dtype: str) -> Iterator[Service]:
    """Start it, in an empty folder so that no config.env is read; it loads while its starter goes on."""
    key = secrets.token_urlsafe(24)
    own = {"API_KEY": f"bench:{key}", "MODEL_PATH": str(path.resolve()), "DEVICE": device, "DTYPE": dtype}
    environment = clean_environment() | MEASURED | own
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output, child(MODULE, cwd=folder, env=environment, stdout=output, stderr=output) as popen:
            yield Service(popen, log, key)


def clean_environment() -> dict[str, str]:
    """This one without any setting of the service, and with the project on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
