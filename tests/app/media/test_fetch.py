"""app/media/fetch.py: what may be dialled, and that every other failure is one short, safe refusal.

No test may dial anything but a loopback address, even where the guard is broken: the fixture `dialled` stands between.
"""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from app.media import fetch as image_fetch
from app.media.fetch import ImageFetcher, ImageUnavailable, is_public_address
from tests.conftest import Clock, until

PUBLIC = "93.184.215.14"  # never dialled: the fixture refuses it
NOT_PUBLIC_HOST = "is refused: not a public host (IMAGE_URL_ALLOWED_HOSTS on the server exempts hosts from this rule)"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
async def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were dialled. All but loopback ones are recorded and refused before a packet leaves."""
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect
    addresses: list[str] = []

    async def sock_connect(sock: socket.socket, address: Any) -> None:
        addresses.append(address[0])
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise OSError("refused by the test")
        await connect(sock, address)

    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    return addresses


@pytest.fixture(autouse=True)
async def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names and their addresses. Nobody is asked for any other: it is a number in one of its many spellings,
    or unknown."""
    loop = asyncio.get_running_loop()
    table: dict[str, list[str]] = {"localhost": ["127.0.0.1"]}

    async def getaddrinfo(host: str, port: int, **hints: Any) -> list[Any]:
        found: list[Any] = []
        for address in table.get(host, [host]):
            hints["flags"] = socket.AI_NUMERICHOST
            found += socket.getaddrinfo(address, port, **hints)
        return found

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    return table


class Site:
    """A server on a loopback address; it counts the requests that reach it."""

    def __init__(self, handler: Handler, address: str = "127.0.0.1") -> None:
        self.requests: list[web.Request] = []
        self._handler = handler
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self.server = TestServer(app, host=address)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self._handler(request)

    @property
    def port(self) -> int:
        assert self.server.port is not None
        return self.server.port

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str = "/image.png") -> str:
        return f"http://{self.host}{path}"


@asynccontextmanager
async def serving(handler: Handler, address: str = "127.0.0.1") -> AsyncIterator[Site]:
    site = Site(handler, address)
    async with site.server:
        yield site


@asynccontextmanager
async def raw_serving(answer: bytes, wait: float = 0) -> AsyncIterator[str]:
    """A server that sends these bytes to everyone, and closes; yields its host."""

    tasks: set[asyncio.Task[None]] = set()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await asyncio.sleep(wait)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fetch(images: ImageFetcher, url: str) -> bytes:
    async with images.fetched(url) as data:
        return data


def fetcher(*allowed: str, **settings: Any) -> ImageFetcher:
    return ImageFetcher(
        **{"timeout_s": 30.0, "max_bytes": 1000, "max_url_length": 8190, "allowed_hosts": frozenset(allowed)} | settings
    )


async def refusal(url: str, *allowed: str, **settings: Any) -> str:
    async with fetcher(*allowed, **settings) as images:
        with pytest.raises(ImageUnavailable) as caught:
            await fetch(images, url)
    return str(caught.value)


async def picture(request: web.Request) -> web.Response:
    return web.Response(body=b"picture")


def redirect(*locations: str, status: int = 302) -> Handler:
    """Answers /0 with the first location, /1 with the second, and so on; any other path with the picture."""

    async def answer(request: web.Request) -> web.Response:
        step = request.path.strip("/")
        if step.isdigit() and int(step) < len(locations):
            return web.Response(status=status, headers={"Location": locations[int(step)]})
        return web.Response(body=b"picture")

    return answer


# The predicate

PUBLIC_ADDRESSES = [
    PUBLIC, "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.255.255",
    "172.32.0.0", "192.167.255.255", "192.169.0.0", "223.255.255.255", "198.17.255.255", "198.20.0.0", "192.0.1.0",
    "2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "::ffff:8.8.8.8", "::ffff:5db8:d70e",
    "2001:4860:4860::8888%eth0",
]  # fmt: skip

OTHER_ADDRESSES = [
    # IPv4
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1",
    "127.255.255.254", "169.254.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.9",
    "192.0.0.10", "192.0.0.170", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1", "192.168.255.255",
    "168.63.129.16", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "224.0.1.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255",
    # IPv6
    "::", "::1", "::2", "fe80::1", "fe80::1%eth0", "febf::1", "fec0::1", "feff::1", "fc00::1", "fd00:ec2::254", "ff02::1",
    "ff0e::1", "100::1", "2001:db8::1", "3fff::1", "5f00::1", "2001:2::1", "2001:10::1", "1::1", "4000::1", "8000::1",
    "e000::1",
    # IPv6 that carries an IPv4 address
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:7f00:1", "::ffff:169.254.169.254", "::ffff:192.168.1.1",
    "::ffff:0.0.0.0", "::ffff:224.0.0.1", "::ffff:168.63.129.16", "::127.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1",
    "::ffff:0:808:808", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b::10.0.0.1", "64:ff9b:1::1", "64:ff9b:1::10.0.0.1",
    "2002:7f00:1::", "2002:a00:1::", "2002:808:808::", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "::ffff:10.0.0.1%1",
    # not numeric addresses in the form that a system reports
    "", " ", "localhost", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "08.8.8.8", "8.8.8", "8.8.8.8 ", "8.8.8.8:80",
    "8.8.8.8/32", "[::1]", "[2606:4700::1]", "\u0031.1.1.1\u0660", "\uff11.1.1.1", "%eth0", "256.1.1.1", "1.1.1.1.1",
    "::g", "8.8.8.8\x00",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public(address: str) -> None:
    assert is_public_address(address) is True


@pytest.mark.parametrize("address", OTHER_ADDRESSES)
def test_not_public(address: str) -> None:
    assert is_public_address(address) is False


def test_only_global_unicast_of_ipv6_is_public() -> None:
    for first in range(2**16):
        assert not is_public_address(f"{first:x}:7::1") or 0x2000 <= first < 0x4000


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:10.0.0.1", "fe80::1", "169.254.169.254"])
def test_guard_makes_no_socket(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(image_fetch, "socket", SimpleNamespace(socket=lambda *arguments: made.append(arguments)))
    with pytest.raises(OSError):
        image_fetch._guarded_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)))
    assert not made
    image_fetch._guarded_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 80)))
    assert made == [(socket.AF_INET, socket.SOCK_STREAM, 6)]


# The guard, at work


LOOPBACK_SPELLINGS = [
    "127.0.0.1", "127.1", "127.0.1", "127.255.255.254", "2130706433", "0x7f000001", "0x7f.1", "0x7f.0x0.0x0.0x1",
    "0177.0.0.1", "017700000001", "0177.1", "127.000.000.001", "0.0.0.0", "0", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:0001]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]", "localhost", "LOCALHOST", "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021",
    "user:word@127.0.0.1", "127.0.0.1@127.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS)
async def test_spellings_of_loopback_reach_nothing(host: str, dialled: list[str]) -> None:
    async with serving(picture) as canary:
        assert (await refusal(f"http://{host}:{canary.port}/")).startswith("image from ")
    assert not canary.requests and not dialled


@pytest.mark.parametrize(
    "host",
    [
        "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376",
        "100.100.100.200", "[fd00:ec2::254]", "[fe80::1]", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[fec0::1]",
        "[ff02::1]", "168.63.129.16",
    ],
)  # fmt: skip
async def test_private_addresses_are_not_dialled(host: str, dialled: list[str]) -> None:
    for scheme in ("http", "https"):
        assert (await refusal(f"{scheme}://{host}/latest/meta-data/")).startswith("image from ")
    assert not dialled


async def test_public_addresses_are_dialled(dialled: list[str], names: dict[str, list[str]]) -> None:
    names["images.example"] = [PUBLIC]
    assert await refusal("http://images.example/a.png") == "image from images.example cannot be downloaded"
    assert dialled == [PUBLIC]


async def test_only_public_addresses_of_a_name_are_dialled(dialled: list[str], names: dict[str, list[str]]) -> None:
    names["mixed.example"] = ["127.0.0.1", PUBLIC, "10.0.0.1", "::1", "169.254.169.254"]
    async with serving(picture) as canary:
        await refusal(f"http://mixed.example:{canary.port}/")
    assert set(dialled) == {PUBLIC} and not canary.requests


async def test_a_name_that_is_private_is_not_dialled(dialled: list[str], names: dict[str, list[str]]) -> None:
    names["inside.example"] = ["10.1.2.3"]
    message = await refusal("http://inside.example/")
    assert message == f"image from inside.example {NOT_PUBLIC_HOST}"
    assert not dialled


@pytest.mark.parametrize("host", ["0x7f000001", "0x7f.1", "127.0.0.1", "[::ffff:7f00:1]", "[::]", "0.0.0.0", "localhost"])
async def test_the_refusal_says_why(host: str) -> None:
    assert (await refusal(f"http://{host}/")).endswith(NOT_PUBLIC_HOST)


async def test_rebinding(dialled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when first asked, and loopback ever after."""
    answers = 0

    async def getaddrinfo(host: str, port: int, **hints: Any) -> list[Any]:
        nonlocal answers
        answers += 1
        address = PUBLIC if answers % 2 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with serving(picture) as canary:
        for turn in range(20):
            await refusal(f"http://rebinding{turn}.example:{canary.port}/")
            await refusal(f"http://rebinding{turn}.example:{canary.port}/")
    assert answers == 40 and not canary.requests
    assert dialled == [PUBLIC] * 20


async def test_environment_names_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(picture) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        await refusal(f"http://{PUBLIC}/", PUBLIC)  # exempt: the guard would refuse the proxy
    assert not proxy.requests


# Exempt hosts


@pytest.mark.parametrize("form", ["127.0.0.1", "127.0.0.1:{port}"])
async def test_allowed_host(form: str) -> None:
    async with serving(picture) as site, fetcher(form.format(port=site.port)) as images:
        assert await fetch(images, site.url()) == b"picture"


@pytest.mark.parametrize("form", ["::1", "[::1]", "[::1]:{port}"])
async def test_allowed_ipv6_host(form: str) -> None:
    try:
        async with serving(picture, "::1") as site, fetcher(form.format(port=site.port)) as images:
            assert await fetch(images, f"http://[::1]:{site.port}/") == b"picture"
    except OSError:
        pytest.skip("no IPv6 here")


async def test_allowed_host_is_matched_in_lower_case() -> None:
    async with serving(picture) as site, fetcher("localhost") as images:
        assert await fetch(images, f"http://LocalHost:{site.port}/") == b"picture"


async def test_allowed_default_port() -> None:
    images = fetcher("shop.example:80", "safe.example:443", "any.example")
    async with images:
        for url in ("http://shop.example/", "https://safe.example/", "https://any.example:8443/", "http://shop.example:80/"):
            assert images._session_for(image_fetch.URL(url)) is images._exempt, url
        for url in ("https://shop.example/", "http://safe.example/", "http://shop.example:81/", "http://x.any.example/",
                    "http://any.example./", "http://any.example@other.example/", "http://any.exampl/"):  # fmt: skip
            assert images._session_for(image_fetch.URL(url)) is images._guarded, url


async def test_other_ports_and_spellings_of_an_allowed_host_are_refused(dialled: list[str]) -> None:
    async with serving(picture) as site, serving(picture) as canary, fetcher(site.host) as images:
        assert await fetch(images, site.url()) == b"picture"
        assert dialled == ["127.0.0.1"]
        for url in (
            canary.url(),
            f"http://localhost:{site.port}/",
            f"http://127.1:{site.port}/",
            f"http://127.0.0.1.:{site.port}/",
        ):
            with pytest.raises(ImageUnavailable):
                await fetch(images, url)
    assert dialled == ["127.0.0.1"] and len(site.requests) == 1 and not canary.requests


async def test_kept_connections_are_not_shared_between_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that the exempt session keeps open is no way round the guard, for the same host and port."""
    async with serving(picture) as site, fetcher(site.host) as images:
        await fetch(images, site.url())
        monkeypatch.setattr(images, "_allowed_hosts", frozenset())
        with pytest.raises(ImageUnavailable, match="not a public host"):
            await fetch(images, site.url())
    assert len(site.requests) == 1


async def test_cookies_are_not_kept() -> None:
    async def answer(request: web.Request) -> web.Response:
        response = web.Response(body=b"picture")
        response.set_cookie("session", "1")
        return response

    async with serving(answer) as site, fetcher("localhost") as images:
        for _ in range(2):
            await fetch(images, f"http://localhost:{site.port}/")
    assert len(site.requests) == 2
    assert not any(request.cookies for request in site.requests)


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(status: int) -> None:
    async with serving(redirect("/1", "2", "/end?x=1", status=status)) as site, fetcher(site.host) as images:
        assert await fetch(images, site.url("/0")) == b"picture"
    assert [request.path_qs for request in site.requests] == ["/0", "/1", "/2", "/end?x=1"]


async def test_redirect_limit() -> None:
    async with serving(redirect("/1", "/2", "/3", "/4")) as site:
        assert await refusal(site.url("/0"), site.host) == "image from 127.0.0.1 is redirected more than 3 times"
    assert [request.path for request in site.requests] == ["/0", "/1", "/2", "/3"]


async def test_redirect_from_an_allowed_host_is_guarded(dialled: list[str]) -> None:
    async with serving(picture) as canary:
        targets = [f"http://{host}:{canary.port}/" for host in LOOPBACK_SPELLINGS if host.isascii()]
        targets += ["http://169.254.169.254/latest/", f"//localhost:{canary.port}/", "http://[fd00:ec2::254]/"]
        async with serving(redirect(*targets)) as site:
            for step, target in enumerate(targets):
                message = await refusal(site.url(f"/{step}"), site.host)
                assert message.startswith("image from 127.0.0.1 "), target
    assert not canary.requests
    assert set(dialled) == {"127.0.0.1"} and len(dialled) == len(targets)


async def test_redirect_between_allowed_hosts() -> None:
    async with serving(picture) as end, serving(redirect(end.url())) as start, fetcher(start.host, end.host) as images:
        assert await fetch(images, start.url("/0")) == b"picture"
    assert len(end.requests) == len(start.requests) == 1


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1:70/_x", "data:image/png;base64,AAAA", "javascript:1",
        "http://", "http:///x", "http://127.0.0.1:99999/", "http://127.0.0.1:0/", "http://[::1", "http://a b\\c/",
        "http://" + "a" * 9000, "ws://127.0.0.1/", "unix:///run/docker.sock", "http+unix://x/", "http://\u00fc\udc80/",
    ],
)  # fmt: skip
async def test_redirect_to_no_usable_url(location: str) -> None:
    answer = f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {location}\r\n\r\n".encode("utf-8", "surrogateescape")
    async with raw_serving(answer) as host:
        message = await refusal(f"http://{host}/", host)
    assert message.startswith("image from 127.0.0.1 ")
    assert len(message) < 150 and "passwd" not in message


async def test_redirect_without_location() -> None:
    async with raw_serving(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n") as host:
        assert await refusal(f"http://{host}/", host) == "image from 127.0.0.1 cannot be had: its server redirects nowhere"


# What the server answers


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 418, 429, 500, 503])
async def test_only_200_is_an_image(status: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "/x"}, body=None if status in (204, 304) else b"picture")

    async with serving(answer) as site:
        assert await refusal(site.url(), site.host) == "image from 127.0.0.1 cannot be had: its server does not return it"


async def test_empty_body() -> None:
    async with raw_serving(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as host:
        assert await refusal(f"http://{host}/", host) == "image from 127.0.0.1 is empty"


@pytest.mark.parametrize("coding", ["gzip", "br", "GZIP", "deflate", "identity, gzip", "zstd", "x"])
async def test_compressed_body_is_refused(coding: str) -> None:
    body = gzip.compress(bytes(10**7))[:900]
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(body)}\r\n\r\n"
    async with raw_serving(head.encode() + body) as host:
        message = await refusal(f"http://{host}/", host)
    assert message == "image from 127.0.0.1 has a Content-Encoding, which is not supported"


async def test_second_content_encoding_is_seen() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx"
    async with raw_serving(head) as host:
        assert "Content-Encoding" in await refusal(f"http://{host}/", host)


async def test_identity_is_asked_for_and_taken() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b"picture", headers={"Content-Encoding": "identity"})

    async with serving(answer) as site, fetcher(site.host) as images:
        assert await fetch(images, site.url()) == b"picture"
    assert site.requests[0].headers["Accept-Encoding"] == "identity"
    assert "Python" not in site.requests[0].headers["User-Agent"]


@pytest.mark.parametrize("length", [1000, 1001])
async def test_size_limit(length: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * length)

    async with serving(answer) as site:
        if length == 1000:
            async with fetcher(site.host) as images:
                assert len(await fetch(images, site.url())) == 1000
        else:
            assert await refusal(site.url(), site.host) == "image from 127.0.0.1 is larger than the limit of 1,000 bytes"


async def test_declared_length_is_enough_to_refuse() -> None:
    """The body never comes, so reading it would end in the deadline."""
    async with raw_serving(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", wait=60) as host:
        assert "larger than the limit" in await refusal(f"http://{host}/", host, timeout_s=30)


async def test_chunked_body_is_cut_off_while_it_streams() -> None:
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for _ in range(10_000):
            await response.write(b"x" * 10_000)
            sent += 10_000
        return response

    async with serving(answer) as site:
        assert "larger than the limit of 1,000 bytes" in await refusal(site.url(), site.host)
    assert sent < 20_000_000  # what the sockets' buffers take


async def test_tiny_chunks() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n"
    async with raw_serving(answer) as host, fetcher(host) as images:
        assert await fetch(images, f"http://{host}/") == b"x" * 1000


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
async def test_broken_answers(answer: bytes) -> None:
    async with raw_serving(answer) as host:
        message = await refusal(f"http://{host}/", host)
    assert message in (
        "image from 127.0.0.1 cannot be downloaded",
        "image from 127.0.0.1 cannot be had: its server does not return it",
    )


async def test_body_that_ends_with_the_connection() -> None:
    async with raw_serving(b"HTTP/1.0 200 OK\r\n\r\npicture") as host, fetcher(host) as images:
        assert await fetch(images, f"http://{host}/") == b"picture"


async def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{sock.getsockname()[1]}"
        assert await refusal(f"http://{host}/", host) == "image from 127.0.0.1 cannot be downloaded"


async def test_https_to_a_plain_server() -> None:
    async with serving(picture) as site:
        assert await refusal(f"https://{site.host}/", site.host) == "image from 127.0.0.1 cannot be downloaded"


async def test_unknown_name() -> None:
    assert await refusal("http://nowhere.example/") == "image from nowhere.example cannot be downloaded"


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "", " ", "x", "image.png", "/etc/passwd", "//127.0.0.1/", "file:///etc/passwd", "ftp://127.0.0.1/", "data:,x",
        "ws://127.0.0.1/", "http:", "http://", "http:///x", "http://:80/", "http://?x", "http://127.0.0.1:99999/",
        "http://127.0.0.1:-1/", "http://127.0.0.1:x/", "http://127.0.0.1:0/", "http://[::1", "http://[x]/",
        "http://a\\@b/", "http://a\r\nHost: b/", "http://a/\n", "http://a\x00b/", "http://a\x7f/", "http://a\tb/",
        "\thttp://a/", "http://\udc80/", "http://" + "a" * 9000 + "/", "http://a/" + "b" * 9000,
        "http://" + "\u00fc" * 300 + "/", "javascript:alert(1)", "http+unix://x/",
    ],
)  # fmt: skip
async def test_bad_urls(url: str, dialled: list[str]) -> None:
    assert await refusal(url) == "image URL is not a valid http or https URL"
    assert not dialled


@pytest.mark.parametrize(
    "url", ["http://a b/", "http://a%00b/", "http://x_y/", "http://-/", "http://a..b/", "http://.../", "http://%31/"]
)
async def test_odd_hosts(url: str, dialled: list[str]) -> None:
    assert (await refusal(url)).startswith("image ")
    assert not dialled


async def test_message_names_the_host_and_no_more(names: dict[str, list[str]]) -> None:
    names["images.example"] = ["10.20.30.40"]
    names["b\u00fccher.example"] = names["xn--bcher-kva.example"] = ["10.20.30.40"]
    message = await refusal("http://user:hunter2@images.example:8080/private/path?token=hunter2#hunter2")
    assert message == f"image from images.example {NOT_PUBLIC_HOST}"
    assert await refusal("http://b\u00fccher.example/") == f"image from xn--bcher-kva.example {NOT_PUBLIC_HOST}"


async def test_redirect_names_the_host_that_was_asked_for() -> None:
    async with serving(redirect("http://secret.internal.example/token")) as site:
        message = await refusal(site.url("/0"), site.host)
    assert message == "image from 127.0.0.1 cannot be downloaded"


# Time


async def test_deadline_covers_a_slow_answer(clock: Clock) -> None:
    refused = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        clock.advance(40)
        await refused.wait()
        return web.Response(body=b"picture")

    async with serving(answer) as site:
        assert await refusal(site.url(), site.host, timeout_s=35) == "image from 127.0.0.1 did not arrive within 35 seconds"
        refused.set()


async def test_deadline_covers_a_dripping_body(clock: Clock) -> None:
    written: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range(20):
            await response.write(b"x")
            written.append(number)
            await asyncio.sleep(0.005)
            clock.advance(10)
        return response

    async with serving(answer) as site:
        assert "did not arrive within 35 seconds" in await refusal(site.url(), site.host, timeout_s=35)
        assert len(written) < 10


async def test_one_deadline_for_all_redirects(clock: Clock) -> None:
    async def answer(request: web.Request) -> web.Response:
        clock.advance(15)
        step = int(request.path[1:])
        return web.Response(body=b"picture") if step == 3 else web.Response(status=302, headers={"Location": f"/{step + 1}"})

    async with serving(answer) as site:
        assert "did not arrive" in await refusal(site.url("/0"), site.host, timeout_s=35)
        async with fetcher(site.host, timeout_s=90) as images:
            assert await fetch(images, site.url("/0")) == b"picture"


async def test_deadline_covers_a_slow_name(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    refused = asyncio.Event()

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        clock.advance(40)
        await refused.wait()
        return []

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert "did not arrive" in await refusal("http://slow.example/", timeout_s=35)
    refused.set()


async def test_downloads_at_once_are_bounded() -> None:
    running = peak = 0
    together = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        if running == 3:
            together.set()
        await together.wait()
        await asyncio.sleep(0.02)
        running -= 1
        return web.Response(body=request.path.encode())

    async with serving(answer) as site, fetcher(site.host, max_concurrent=3) as images:
        bodies = await asyncio.gather(*(fetch(images, site.url(f"/{number}")) for number in range(12)))
    assert bodies == [f"/{number}".encode() for number in range(12)]
    assert peak == 3


async def test_what_is_fetched_keeps_its_slot_until_it_is_used() -> None:
    """Or downloads would pile up before slow threads."""
    async with serving(picture) as site, fetcher(site.host, max_concurrent=1) as images:
        async with images.fetched(site.url()):
            other = asyncio.create_task(fetch(images, site.url()))
            await asyncio.sleep(0.1)
            assert len(site.requests) == 1
        assert await other == b"picture"


async def test_the_deadline_starts_with_the_slot(clock: Clock) -> None:
    """A host is not blamed for the slow one whose slot its download waited for."""

    async def answer(request: web.Request) -> web.Response:
        clock.advance(30)
        return web.Response(body=b"picture")

    async with serving(answer) as site, fetcher(site.host, max_concurrent=1, timeout_s=50) as images:
        assert await asyncio.gather(*(fetch(images, site.url()) for _ in range(3))) == [b"picture"] * 3


async def test_cancellation_passes_and_frees_the_slot() -> None:
    cancelled = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/slow":
            await cancelled.wait()
        return web.Response(body=b"picture")

    async with serving(answer) as site, fetcher(site.host, max_concurrent=1) as images:
        task = asyncio.create_task(fetch(images, site.url("/slow")))
        await until(lambda: site.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await fetch(images, site.url()) == b"picture"
        cancelled.set()


async def test_after_close() -> None:
    images = fetcher("127.0.0.1")
    async with serving(picture) as site:
        async with images:
            assert await fetch(images, site.url()) == b"picture"
        with pytest.raises(ImageUnavailable):
            await fetch(images, site.url())
    assert len(site.requests) == 1
