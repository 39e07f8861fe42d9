"""Runs a program in which no socket reaches beyond the loopback.

    python -m tests.tools.clients.guard FILE

What it dials elsewhere fails, and is written into the file DIALLED: packages that call home swallow the failure. An audit hook
sees what goes through Python's own sockets; tests.tools.clients.isolation sees the rest, where the machine permits it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import runpy
import sys
from typing import Any


def is_local(host: Any) -> bool:
    """Whether a socket's host is this machine alone; None and "" are where a server listens."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(name).partition("%")[0]).is_loopback
    except ValueError:
        return False


def install(dialled: str) -> None:
    """Refuse what is dialled elsewhere, from now until the process ends, and append it to a file."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address = args[1]
            if not isinstance(address, tuple) or is_local(address[0]):  # a path is a Unix socket, None one that is connected
                return
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            address = args[0]
            if is_local(address):
                return
        else:
            return
        with open(dialled, "a") as file:
            file.write(f"{event} {address}\n")
        raise OSError(errno.ENETUNREACH, f"nothing but the loopback may be dialled: {address}")

    sys.addaudithook(hook)


if __name__ == "__main__":
    install(os.environ["DIALLED"])
    runpy.run_path(sys.argv[1], run_name="__main__")
