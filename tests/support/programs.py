"""Programs that a machine may lack, and how a test runs them: nginx, Prometheus and the like."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest


def program(name: str, how: str = "") -> str:
    """Its path; where it is missing, the test is skipped. `how` it is installed, unless by apt under its own name."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is missing: {how or f'apt-get install {name}'}")
    return found


def run(*command: str, timeout: float = 120, **options: object) -> str:
    """What it prints. Raises AssertionError where its exit code is not 0."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """One that only itself vouches for, of a name such as DNS:host or IP:127.0.0.1, and its key: files of `folder`."""
    written, key = folder / "cert.pem", folder / "key.pem"
    words = f"req -x509 -nodes -newkey rsa:2048 -days 1 -subj /CN=test -addext subjectAltName={name}"
    run(program("openssl"), *words.split(), "-keyout", str(key), "-out", str(written))
    return written, key


@contextmanager
def running(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The program while the context lasts; what it prints goes to `log`."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as popen:
        try:
            yield popen
        finally:
            popen.terminate()
            try:
                popen.wait(10)
            except subprocess.TimeoutExpired:
                popen.kill()


def until(condition: Callable[[], bool], what: str, timeout: float = 90.0) -> None:
    """Wait until it holds. Raises AssertionError."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.05)


def free_port() -> int:
    """One of the loopback that nobody listens on: for programs that cannot pick one themselves, or come and go on one.

    It stays bound, so that the system gives it to nobody else. That keeps none away that asks for it by its number and reuses
    addresses, as servers do."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    port: int = sock.getsockname()[1]
    sock.detach()
    return port


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def edited(text: str, replacements: Mapping[str, str]) -> str:
    """The text with every match of each pattern replaced: each has to match, so that what is tested is the file as it is."""
    for pattern, replacement in replacements.items():
        text, count = re.subn(pattern, lambda match, new=replacement: match.expand(new), text, flags=re.MULTILINE)
        assert count, f"nothing matches {pattern}"
    return text
