"""A process that has imported what our programs import, and forks for each of them: seconds of imports become milliseconds.

    python -m tests.support.forkserver DESCRIPTOR    (of a listening socket; standard input is a pipe)

A connection is one program: a request as JSON, answered by its pid and in the end by its exit code. Who closes the connection
before that kills the program. Closing standard input ends the server and all that it has forked.

What libraries read from the environment when they are imported is what the server was started with: see `takes`. Nothing is
computed here, so that no thread pool exists that a fork would leave behind.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from tests.support.paths import ROOT

# All that a server imports up to its first reply, but for what is run as __main__.
PRELOADED = (
    "app.http.server",
    "app.main",
    "app.process",
    "app.settings",
    "models.qwen3_vl.model",
    "models.qwen3_vl.preparer",
    "models.registry",
    "models.text_encoder.model",
    "models.text_encoder.preparer",
)
# Names of variables that are read when a library is imported, or before Python runs at all, begin so.
_READ_AT_IMPORT = ("CUDA_", "GOMP_", "HF_", "KMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TORCH")
_LONGEST_REQUEST = 1 << 20


def clean_environment() -> dict[str, str]:
    """Nothing of this environment but what Python needs to find our code. The network is not asked for checkpoints, and a program
    computes on one core: several run side by side."""
    return {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class ForkServer:
    """The server, started when it is first asked for."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._address = ""
        self._starting = threading.Lock()

    def address(self) -> str:
        """The path of its socket, for this process and others."""
        with self._starting:
            if self._popen is None:
                self._start()
        return self._address

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forkserver-")
        self._address = f"{self._folder.name}/socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._address)
            # Connections wait here while the server still imports.
            listener.listen(64)
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forkserver", str(listener.fileno())],
                cwd=self._folder.name,
                env=clean_environment() | {"HOME": self._folder.name},
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                # Control-C is for the tests, which end what they have started.
                start_new_session=True,
            )

    def close(self) -> None:
        """End the server and what it has forked."""
        if self._popen is not None:
            assert self._popen.stdin is not None
            self._popen.stdin.close()
            self._popen.wait()
            self._folder.cleanup()


# Where this process finds a server; None where programs are executed, as in the tools outside of pytest.
find_server: Callable[[], str] | None = None


def takes(environment: Mapping[str, str]) -> bool:
    """Whether there is a server, and what it forks sees this environment as a fresh program would."""
    own, other = (
        {name: value for name, value in each.items() if name.startswith(_READ_AT_IMPORT)}
        for each in (clean_environment(), environment)
    )
    return find_server is not None and own == other


class Forked:
    """A program that the server has forked, as subprocess.Popen has it. Raises RuntimeError if the server has ended."""

    def __init__(
        self, module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        """`python -m module arguments` in a folder, with this environment alone. What it prints goes to files that are there."""
        self.args = [module, *arguments]
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        assert find_server is not None
        self._connection.connect(find_server())
        request = {
            "module": module, "arguments": list(arguments), "folder": str(folder), "environment": dict(environment),
            "stdout": str(stdout), "stderr": str(stderr),
        }  # fmt: skip
        self._connection.send(json.dumps(request).encode())
        self.pid = self._receive()

    def _receive(self) -> int:
        try:
            said = self._connection.recv(64)
        except ConnectionError:
            said = b""
        if not said:
            self._connection.close()
            raise RuntimeError("the fork server has ended")
        return int(said)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the signal that ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = self._receive()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    module: str, *arguments: str, folder: Path, environment: Mapping[str, str], timeout: float = 100.0
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` to its end, as subprocess.run has it: forked, if `takes(environment)`."""
    command = [sys.executable, "-m", module, *arguments]
    if not takes(environment):
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as outputs:
        stdout, stderr = Path(outputs, "stdout"), Path(outputs, "stderr")
        stdout.touch()
        stderr.touch()
        forked = Forked(module, arguments, folder, environment, stdout, stderr)
        try:
            code = forked.wait(timeout)
        finally:
            forked.kill()
        return subprocess.CompletedProcess(command, code, stdout.read_text(), stderr.read_text())


# The server's side


def _serve(listener: socket.socket) -> None:
    """Fork for every connection until standard input is closed."""
    programs: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor that tells of its end
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ, "end")
    selector.register(listener, selectors.EVENT_READ, "new")
    while True:
        for key, _ in selector.select():
            if key.data == "end":
                for pid, _ in programs.values():
                    os.kill(pid, signal.SIGKILL)
                return
            if key.data == "new":
                connection, _ = listener.accept()
                request = json.loads(connection.recv(_LONGEST_REQUEST))
                pid = os.fork()
                if not pid:
                    for own in (selector, listener, connection, *(other for _, other in programs.values())):
                        own.close()
                    for ended in programs:
                        os.close(ended)
                    _become(request)
                connection.send(str(pid).encode())
                ended = os.pidfd_open(pid)
                programs[ended] = pid, connection
                selector.register(ended, selectors.EVENT_READ, "ended")
                selector.register(connection, selectors.EVENT_READ, "left")
            elif key.data == "left":
                # Nothing more is ever asked: the other side is gone.
                for pid, connection in programs.values():
                    if connection is key.fileobj:
                        selector.unregister(connection)
                        os.kill(pid, signal.SIGKILL)
            else:
                pid, connection = programs.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.send(str(code).encode())
                connection.close()


def _become(request: dict[str, Any]) -> NoReturn:
    """Be the program, in a process that was just forked, and end as it ends."""
    code = 1
    try:
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        for target, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
            opened = os.open(path, os.O_RDWR | os.O_APPEND)
            os.dup2(opened, target)
            os.close(opened)
        sys.path[0] = request["folder"]
        sys.argv = [request["module"], *request["arguments"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if ending.code is not None and not isinstance(ending.code, int):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    from app.process import tame_threads

    tame_threads()
    for name in PRELOADED:
        import_module(name)
    # A warm-up that measures less: how fast this machine is matters to no test.
    rates = import_module("models.rates")
    rates.ENOUGH_SECONDS = 0.03  # type: ignore[attr-defined]
    # A program's own collections neither look at what lies here nor, by that, copy its pages.
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
