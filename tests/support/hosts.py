"""What the tests of the HTTP edge talk over: images and a host that serves them, raw connections, and the server as a process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from aiohttp import web
from multidict import CIMultiDict
from PIL import Image

from tests.support import forkserver

# Images


def picture(seed: int = 0, size: tuple[int, int] = (9, 7)) -> Image.Image:
    """An RGB image that no other seed has."""
    image = Image.new("RGB", size, (seed % 256, seed // 256 % 256, 77))
    image.putpixel((0, 0), (1, 2, 3))
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64_of(image)}"


@dataclass
class ImageHost:
    """A web server on loopback: `files` by path, what is not there is 404. `asked` are the paths that were asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None
    port: int = 0

    @property
    def host(self) -> str:
        """As IMAGE_URL_ALLOWED_HOSTS has it."""
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append(request.path)
        if self.hold is not None:
            await self.hold.wait()
        if request.path not in self.files:
            return web.Response(status=404)
        return web.Response(body=self.files[request.path], content_type="image/png")


@asynccontextmanager
async def image_host(**files: bytes) -> AsyncIterator[ImageHost]:
    """Serve `name=...` as /name.png."""
    host = ImageHost({f"/{name}.png": data for name, data in files.items()})
    runner = web.ServerRunner(web.Server(host.answer, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host.port = runner.addresses[0][1]
    try:
        yield host
    finally:
        await runner.cleanup()


# Raw connections


@dataclass
class RawReply:
    status: int
    headers: CIMultiDict[str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]


class RawConnection:
    """Bytes to and from a server, as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, timeout: float = 30.0) -> RawReply:
        """The next reply, an interim one among them."""
        async with asyncio.timeout(timeout):
            status_line, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
            headers: CIMultiDict[str] = CIMultiDict()
            for line in lines:
                name, _, value = line.partition(":")
                headers.add(name, value.strip())
            body = await self.reader.readexactly(int(headers.get("Content-Length", "0")))
        return RawReply(int(status_line.split()[1]), headers, body)

    async def rest(self, timeout: float = 30.0) -> bytes:
        """All that comes until the server closes the connection. Raises TimeoutError where it does not."""
        async with asyncio.timeout(timeout):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    async def is_open(self, seconds: float) -> bool:
        """Whether the server leaves the connection open for so long."""
        try:
            await self.rest(seconds)
        except TimeoutError:
            return True
        return False

    def abort(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[RawConnection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def post(body: bytes | None = b"", *headers: str, path: str = "/v1/embeddings", key: str | None = "sk-test") -> bytes:
    """A request's bytes. Without a body (None) the headers have to say how long it is."""
    lines = [f"POST {path} HTTP/1.1", "Host: test", *headers]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


# The server as a process


class Process:
    """`python -m MODULE` in a folder of its own, with nothing of this environment but what is given. `fresh` executes Python anew
    even where a fork would do; see tests/support/forkserver.py."""

    def __init__(self, module: str, folder: Path, environment: Mapping[str, str], fresh: bool = False) -> None:
        self.folder = folder
        self.stderr_file = folder / "stderr"
        self.stderr_file.touch()
        environment = forkserver.clean_environment() | {"HOME": str(folder)} | environment
        self.popen: subprocess.Popen[bytes] | forkserver.Forked
        if not fresh and forkserver.takes(environment):
            self.popen = forkserver.Forked(module, [], folder, environment, self.stderr_file, self.stderr_file)
            return
        with self.stderr_file.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module], cwd=folder, env=environment, stdout=stderr, stderr=stderr
            )

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text(errors="replace")

    def port(self, timeout: float = 90.0) -> int:
        """The port that it listens on, once it does."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if match := re.search(r"listening on \S+ port (\d+)", self.stderr):
                return int(match[1])
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.stderr}"
            time.sleep(0.02)
        raise TimeoutError(self.stderr)

    def wait(self, timeout: float = 30.0) -> int:
        """The exit code."""
        return self.popen.wait(timeout)

    def request(self, path: str, body: Any = None, **headers: str) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and parsed reply of one request over a connection of its own."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port()}{path}", data, {"Authorization": "Bearer sk-test", **headers})
        try:
            with urlopen(request, timeout=30) as reply:
                return reply.status, reply.headers, json.loads(reply.read())
        except HTTPError as error:
            with error:
                return error.code, error.headers, json.loads(error.read())

    def until_status(self, status: str, timeout: float = 90.0) -> None:
        """Wait until /health says so."""
        until = time.monotonic() + timeout
        while self.request("/health")[2]["status"] != status:
            assert time.monotonic() < until, self.stderr
            time.sleep(0.02)


@contextmanager
def process(module: str = "tests.support.fakes", *, fresh: bool = False, **environment: str) -> Iterator[Process]:
    """A server of the fake model on a free port, or another module; killed if it is still there in the end."""
    defaults = {"API_KEY": "test:sk-test", "PORT": "0", "HOST": "127.0.0.1", "EMBEDDING_DIMENSION": "native"}
    with tempfile.TemporaryDirectory() as folder:
        running = Process(module, Path(folder), defaults | environment, fresh)
        try:
            yield running
        finally:
            running.popen.kill()
            running.popen.wait()
