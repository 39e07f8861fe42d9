"""The guarded download of an image: an http or https URL -> bytes.

It decides which addresses may be dialled, how often a server may redirect, how long a download may take and how many bytes it may
bring. It knows nothing of images: what the bytes are is the decoder's business.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType

import aiohttp
from aiohttp.resolver import ThreadedResolver
from yarl import URL

_log = logging.getLogger(__name__)

_MAX_REDIRECTS = 3
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
# auto_decompress is off, so that a small body cannot grow in memory; a server that compresses all the same is refused.
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "qwen3-vl-embedding-server"}

# What `is_global` lets pass though it is not somebody else's public host: IANA's special-purpose registries, and forms of IPv6
# that carry an IPv4 address.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments, Oracle's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's host, from inside its virtual machines
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        # All but 2000::/3, the only global unicast: ::/96, 64:ff9b::/96, 64:ff9b:1::/48, fec0::/10 and ff00::/8 among it.
        "::/3",
        "4000::/2",
        "8000::/1",
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)


class ImageUnavailable(Exception):
    """The image cannot be had. The message is safe to show: of the URL it names the host alone, and nothing of the answer."""


class _Refusal(Exception):
    """Why an image cannot be had, in words that follow the host's name."""


class _AddressRefused(OSError):
    """Raised instead of a socket to an address that is not public."""


def is_public_address(address: str) -> bool:
    """Tells whether a numeric address, as the system is about to dial it, is a public unicast host."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC)


def _guarded_socket(addr_info: aiohttp.AddrInfoType) -> socket.socket:
    """Guards every connection: nothing is dialled without a socket from here: literals, odd spellings, redirects and names
    that resolve anew alike, so there is no moment between the check and the connection."""
    family, kind, protocol, _, sockaddr = addr_info
    if not is_public_address(str(sockaddr[0])):
        raise _AddressRefused("not a public address")
    return socket.socket(family, kind, protocol)


class ImageFetcher:
    """Downloads images; open it with `async with`.

    `allowed_hosts` (lower case, `host` or `host:port`) are exempt from the rule about addresses. A socket factory knows the
    address and not the host, so they have a session, and with it a pool of connections, of their own.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        max_bytes: int,
        max_url_length: int,
        allowed_hosts: frozenset[str],
        max_concurrent: int = 32,
    ) -> None:
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._max_url_length = max_url_length
        self._allowed_hosts = allowed_hosts
        self._slots = asyncio.Semaphore(max_concurrent)
        self._resources = AsyncExitStack()
        self._guarded: aiohttp.ClientSession | None = None
        self._exempt: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ImageFetcher:
        self._guarded = await self._resources.enter_async_context(_session(_guarded_socket))
        self._exempt = await self._resources.enter_async_context(_session(None))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._resources.aclose()

    @asynccontextmanager
    async def fetched(self, url: str) -> AsyncIterator[bytes]:
        """Yields the body that `url` leads to. It keeps its slot while the context lasts: what is fetched and not yet used is
        bounded. One deadline covers every redirect and the body, from when there is a free slot: a healthy host must not be
        blamed for the slow ones before it.

        Raises ImageUnavailable, whatever goes wrong.
        """
        async with self._slots:
            yield await self._fetch(url)

    async def _fetch(self, url: str) -> bytes:
        try:
            target = _parse(url, self._max_url_length)
        except _Refusal:
            raise ImageUnavailable("image URL is not a valid http or https URL") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(target)
        except _Refusal as refusal:
            reason = str(refusal)
        except TimeoutError:
            reason = f"did not arrive within {self._timeout_s:g} seconds"
        except Exception as error:  # a hostile server must not look like a fault of ours
            _log.debug("image fetch failed: %s", type(error).__name__)
            reason = _reason(error)
        raise ImageUnavailable(f"image from {(target.raw_host or '')[:253]} {reason}")  # ASCII, no longer than a name can be

    async def _follow(self, target: URL) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            async with self._session_for(target).get(target, allow_redirects=False) as response:
                if response.status not in _REDIRECT_STATUSES:
                    return await self._body(response)
                target = _redirect_target(response, self._max_url_length)
        raise _Refusal(f"is redirected more than {_MAX_REDIRECTS} times")

    def _session_for(self, url: URL) -> aiohttp.ClientSession:
        host = url.host_subcomponent or ""  # an IPv6 address in brackets
        exempt = not self._allowed_hosts.isdisjoint({host, host.strip("[]"), f"{host}:{url.port}"})
        session = self._exempt if exempt else self._guarded
        if session is None:
            raise RuntimeError("ImageFetcher is not open")
        return session

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        too_large = f"is larger than the limit of {self._max_bytes:,} bytes"
        if response.status != 200:
            raise _Refusal("cannot be had: its server does not return it")
        if any(coding.strip().lower() not in ("", "identity") for coding in response.headers.getall("Content-Encoding", [])):
            raise _Refusal("has a Content-Encoding, which is not supported")
        if (response.content_length or 0) > self._max_bytes:
            raise _Refusal(too_large)
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > self._max_bytes:
                raise _Refusal(too_large)
        if not body:
            raise _Refusal("is empty")
        return bytes(body)


def _session(socket_factory: aiohttp.SocketFactoryType | None) -> aiohttp.ClientSession:
    """Makes a session that takes nothing from the environment, keeps no cookies and leaves all time limits to `fetch`."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, resolver=ThreadedResolver(), socket_factory=socket_factory),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=_HEADERS,
        trust_env=False,
        auto_decompress=False,
    )


def _parse(text: str, max_length: int, base: URL | None = None) -> URL:
    if len(text) > max_length or _CONTROL_CHARACTER.search(text):
        raise _Refusal("is redirected to a URL that is not valid")
    try:
        url = URL(text) if base is None else base.join(URL(text))
        usable = url.scheme in ("http", "https") and bool(url.host) and bool(url.port)
    except ValueError:  # a port out of range and a host that IDNA refuses among it
        usable = False
    if not usable:
        raise _Refusal("is redirected to a URL that is not http or https")
    return url


def _redirect_target(response: aiohttp.ClientResponse, max_length: int) -> URL:
    location = response.headers.get("Location")
    if not location:
        raise _Refusal("cannot be had: its server redirects nowhere")
    return _parse(location, max_length, base=response.url)


def _reason(error: Exception) -> str:
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else None
    if isinstance(cause, _AddressRefused):
        return "is refused: not a public host (IMAGE_URL_ALLOWED_HOSTS on the server exempts hosts from this rule)"
    return "cannot be downloaded"
