"""The service as a child process: `python -m app` with a checkpoint, on a free port of the loopback, with a key of its own."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError

from app.settings import SETTINGS
from tests.support.paths import ROOT
from tests.tools.load.callers import Server
from tests.tools.load.children import child
from tests.tools.load.server_process import START_S, ServerProcess

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


class Service(ServerProcess):
    """A running one. `server` is where it listens."""

    def wait(self, timeout: float = START_S) -> None:
        """Until it takes traffic. Raises ChildFailed."""
        until = time.monotonic() + timeout
        while not (found := re.search(r"listening on \S+ port (\d+)", self._said())):
            self._check(until)
        self.server = replace(self.server, port=int(found[1]))
        while not self._is_ready():
            self._check(until)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics without labels, by name."""
        text = self.get("/metrics").decode()
        return {name: float(value) for name, value in re.findall(r"(?m)^(\w+) (\S+)$", text)}

    def settle(self) -> None:
        """Wait until it has nothing to do. Raises ChildFailed."""
        until = time.monotonic() + START_S
        while self.metrics()["embedding_queue_depth"]:
            self._check(until)
        time.sleep(SETTLE_S)

    def _is_ready(self) -> bool:
        try:
            self.get("/health/ready")
            return True
        except HTTPError as refusal:
            refusal.close()
            return False


@contextmanager
def service(path: Path, device: str, dtype: str) -> Iterator[Service]:
    """Start it, in an empty folder so that no config.env is read; it loads while its starter goes on."""
    key = secrets.token_urlsafe(24)
    own = {"API_KEY": f"bench:{key}", "MODEL_PATH": str(path.resolve()), "DEVICE": device, "DTYPE": dtype}
    environment = clean_environment() | MEASURED | own
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output, child(MODULE, cwd=folder, env=environment, stdout=output, stderr=output) as popen:
            yield Service(popen, log, Server(0, key), "the service")


def clean_environment() -> dict[str, str]:
    """This one without any setting of the service, and with the project on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
