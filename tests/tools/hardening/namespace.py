"""A network namespace in which every address lies on the loopback, with canaries on it and a DNS server of its own.

Nothing that is dialled in it can leave the machine, and nothing of it outlives the process.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from tests.tools.hardening.background import background, listening

# The only addresses that may be dialled; behind the third, public too, nobody is at home.
PUBLIC, PUBLIC_6 = "93.184.216.34", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
DEAD = "93.184.216.35"
# Where canaries listen. None of them speaks TLS: a connection to 443 is enough.
PORTS = (22, 80, 443, 2375, 6379, 8080)

_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1
_FILES = {
    "/etc/resolv.conf": "nameserver 127.0.0.1\noptions timeout:2 attempts:1\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/nsswitch.conf": "hosts: files dns\n",
}
_QUESTIONS = {1: "A", 28: "AAAA"}

# The addresses of a name, for "A" or "AAAA" and how often that was asked before.
Answer = Callable[[str, int], list[str]]


def enter() -> None:
    """Lay every address there is on the loopback, and have names asked of port 53 there.

    Raises RuntimeError, and changes nothing, where the namespaces are not new: both must be others than the parent's, in a new
    network every interface is down, the loopback among them, and no mount may be shared with another namespace.
    """
    for kind in ("net", "mnt"):
        if _is_the_parents(kind):
            raise RuntimeError(f"this is no {kind} namespace of its own: the parent is in it")
    if any(_is_up(name) for _, name in socket.if_nameindex()):
        raise RuntimeError("this is no network namespace of its own: an interface is up")
    if " shared:" in Path("/proc/self/mountinfo").read_text():
        raise RuntimeError("this is no mount namespace of its own: a mount is shared")
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo", "src", "127.0.0.1")
    _run("ip", "-6", "route", "add", "local", "::/0", "dev", "lo", "src", "::1")
    _run("ip", "route", "add", "unreachable", f"{DEAD}/32", "table", "local")
    for path, text in _FILES.items():
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            _run("mount", "--bind", file.name, path)
    if Path("/run/nscd").is_dir():  # a daemon that would answer from outside
        _run("mount", "-t", "tmpfs", "none", "/run/nscd")


def _is_the_parents(kind: str) -> bool:
    try:
        return os.readlink(f"/proc/self/ns/{kind}") == os.readlink(f"/proc/{os.getppid()}/ns/{kind}")
    except PermissionError:  # from within a user namespace, which may change nothing outside of it
        return False


def _is_up(interface: str) -> bool:
    with socket.socket() as any_socket:
        (flags,) = struct.unpack_from("16xH", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, interface.encode().ljust(32, b"\0")))
    return bool(flags & _IFF_UP)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class World:
    """All hosts of the namespace: `names` resolve as they say, `files` and `redirects` are what any host has by path, `reached`
    is who was connected to, and `unknown` the names that were asked for and do not resolve. Every other path of a host has the
    image `inside`."""

    inside: bytes
    names: dict[str, Answer] = field(default_factory=dict)
    redirects: dict[str, tuple[int, str]] = field(default_factory=dict)
    reached: list[tuple[str, int]] = field(default_factory=list)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)

    async def speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one reply."""
        address, port = writer.get_extra_info("sockname")[:2]
        self.reached.append((_plain(address), port))
        try:
            async with asyncio.timeout(2):
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].decode("latin-1")
            writer.write(self._reply(path))
            await writer.drain()
        except (OSError, IndexError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # whoever does not speak HTTP has reached this host all the same
        finally:
            writer.close()

    def _reply(self, path: str) -> bytes:
        if path in self.redirects:
            status, location = self.redirects[path]
            return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
        if path == "/teapot":
            return b"HTTP/1.1 418 secret\r\nContent-Length: 6\r\n\r\nsecret"
        head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(self.inside)}\r\n\r\n"
        return head.encode() + self.inside

    def resolve(self, query: bytes) -> bytes:
        """A DNS message for another; every answer is good for no time at all."""
        name, end = _question(query)
        kind = _QUESTIONS.get(struct.unpack_from(">H", query, end)[0])
        addresses: list[str] = []
        if kind and name in self.names:
            addresses = self.names[name](kind, self.asked[name, kind])
            self.asked[name, kind] += 1
        elif name not in self.names:
            self.unknown.append(name)
        flags = 0x8580 if name in self.names else 0x8583
        head = query[:2] + struct.pack(">HHHHH", flags, 1, len(addresses), 0, 0)
        return head + query[12 : end + 4] + b"".join(map(_record, addresses))


def _plain(address: str) -> str:
    """Without its zone, an IPv4 address as such."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def _question(query: bytes) -> tuple[str, int]:
    """The name that is asked for, lower-case, and where its type stands."""
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode("latin-1").lower())
        at += 1 + length
    return ".".join(labels), at + 1


def _record(address: str) -> bytes:
    packed = ipaddress.ip_address(address).packed
    return struct.pack(">HHHLH", 0xC00C, 1 if len(packed) == 4 else 28, 1, 0, len(packed)) + packed


class _NameServer(asyncio.DatagramProtocol):
    def __init__(self, world: World) -> None:
        self._world = world

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(self._world.resolve(data), addr)


@contextmanager
def running(world: World) -> Iterator[None]:
    """Canaries and the name server, on a thread."""
    with background(lambda: _listen(world)):
        yield


@asynccontextmanager
async def _listen(world: World) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for port in PORTS:
            await stack.enter_async_context(listening(world.speak, "0.0.0.0", port))
            await stack.enter_async_context(listening(world.speak, "::", port))
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _NameServer(world), ("127.0.0.1", 53))
        stack.callback(transport.close)
        yield


def settle() -> None:
    """Let connections that were made be counted."""
    time.sleep(0.005)
