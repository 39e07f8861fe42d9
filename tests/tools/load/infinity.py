"""infinity-emb as a child process, in an environment of its own: infinity-requirements.txt says of which versions.

Its defaults but for what follows. `float32`, as all that are compared; no usage statistics; no log but errors. Its batches are of
32, sorted by the texts' characters among up to four that wait. `infinity` has its default, BetterTransformer: batches as nested
tensors without padding; `infinity-plain` the library's own padded forward, which is what is left with newer transformers.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

from tests.support.paths import ROOT
from tests.tools.load.callers import Server
from tests.tools.load.children import ChildFailed, child
from tests.tools.load.server_process import START_S, ServerProcess

PYTHON = ROOT / ".venv-infinity" / "bin" / "python"
# By the name of its row: options of its command line.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "infinity": ("--bettertransformer",),
    "infinity-plain": ("--no-bettertransformer",),
}
PACKAGES = ("infinity-emb", "sentence-transformers", "transformers", "optimum", "torch")
OPTIONS = ("--engine", "torch", "--no-compile", "--batch-size", "32", "--url-prefix", "/v1", "--log-level", "error")
OWN_SETTINGS = {"INFINITY_ANONYMOUS_USAGE_STATS": "false", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# It computes on for callers that have gone, and cannot be asked whether it has work: idle is who has so little of a core.
IDLE_SHARE, IDLE_S = 0.06, 0.5


class Infinity(ServerProcess):
    """A running one."""

    def wait(self, timeout: float = START_S) -> None:
        """Until it takes traffic. Raises ChildFailed."""
        until = time.monotonic() + timeout
        while not self._is_ready():
            self._check(until)
        self.settle()

    def settle(self) -> None:
        """Wait until it has nothing to do. Raises ChildFailed."""
        until = time.monotonic() + START_S
        while True:
            spent = self.cpu_seconds()
            time.sleep(IDLE_S)
            if self.cpu_seconds() - spent <= IDLE_SHARE * IDLE_S:
                return
            self._check(until)

    def _is_ready(self) -> bool:
        try:
            self.get("/health")
            return True
        except HTTPError as refusal:
            refusal.close()
        except ChildFailed:
            # It listens only once the model is loaded; whether it has ended is looked at between.
            pass
        return False


@contextmanager
def infinity(python: Path, variant: str, path: Path, device: str, dtype: str) -> Iterator[Infinity]:
    """Start it; it loads while its starter goes on."""
    key, port = secrets.token_urlsafe(24), free_port()
    arguments = ["v2", "--model-id", str(path.resolve()), "--device", device, "--dtype", dtype, *OPTIONS, *VARIANTS[variant]]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("INFINITY_") and name != "PYTHONPATH"}
    environment = kept | OWN_SETTINGS | {"INFINITY_API_KEY": key}
    # It writes a cache of its own into the folder that it runs in.
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        log = Path(folder) / "log"
        where = {"cwd": folder, "env": environment, "python": str(python)}
        with log.open("wb") as output, child("infinity_emb.cli", *arguments, **where, stdout=output, stderr=output) as popen:
            yield Infinity(popen, log, Server(port, key), variant)


def free_port() -> int:
    """One that nobody listens on at this moment: infinity does not say which it was given."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def versions(python: Path) -> dict[str, str]:
    """Of PACKAGES, in that environment. Raises ChildFailed where it is not there, or lacks one."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    try:
        said = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ChildFailed(f"{python} is no environment of infinity-emb ({error}); make bench PEER=infinity makes one") from None
    return dict(zip(PACKAGES, said.split(), strict=True))
