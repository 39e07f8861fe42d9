"""Checks of image URLs: what a server can be made to dial, and how much a host can make it wait, read and hold."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import re
import types
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

from tests.support.hosts import Process, picture, png
from tests.tools.hardening import namespace, tricks
from tests.tools.hardening.board import READY_S, Outcome, Site, check, peak_mib, reset_peak
from tests.tools.hardening.client import Client, Reply
from tests.tools.hardening.namespace import DEAD, PUBLIC, PUBLIC_6, Answer, World
from tests.tools.hardening.slow_host import slow_host
from tests.tools.hardening.tricks import EXEMPT, EXEMPT_ADDRESS, HOST, TRICKS, Trick

# What runs in the namespace: names may take a while there, and the environment names a proxy.
SETTINGS = {"IMAGE_URL_ALLOWED_HOSTS": tricks.ALLOWED_HOSTS, "IMAGE_FETCH_TIMEOUT_S": "5"}
PROXIES = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"), f"http://{tricks.PROXY}:8080")
# An address, a status, or what a host said: nothing of it belongs into a message.
_TOLD = re.compile(r"\d+\.\d+\.\d+|[0-9a-f]*::|\b[1-5]\d\d\b|secret|passwd|errno|0x", re.IGNORECASE)


# Servers without a guard. Nothing of them is used outside a namespace of its own.


def without_any_guard() -> None:
    """without any guard of the addresses."""
    from app.media import fetch as image_fetch

    image_fetch._guarded_socket = None  # type: ignore[assignment]


def with_a_check_before_the_download() -> None:
    """with a check of the URL's host before the download in place of the sockets' guard."""
    from app.media import fetch as image_fetch

    fetch = image_fetch.ImageFetcher._fetch

    async def checked(self: image_fetch.ImageFetcher, url: str) -> bytes:
        parts = urlsplit(url)
        if not self._allowed_hosts & {parts.hostname, parts.netloc, f"{parts.netloc}:80"}:
            try:
                found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port or 80)
            except (OSError, UnicodeError):
                found = []
            if not found or not all(image_fetch.is_public_address(str(sockaddr[0])) for *_, sockaddr in found):
                raise image_fetch.ImageUnavailable(f"image from {parts.hostname} is refused")
        return await fetch(self, url)

    image_fetch.ImageFetcher._fetch = checked  # type: ignore[method-assign]
    without_any_guard()


def with_a_guard_in_the_resolver() -> None:
    """with a guard in the resolver in place of the sockets'."""
    from aiohttp.resolver import ThreadedResolver

    from app.media import fetch as image_fetch

    class PublicOnly(ThreadedResolver):
        async def resolve(self, *arguments: Any, **named: Any) -> Any:
            found = await super().resolve(*arguments, **named)
            if public := [each for each in found if image_fetch.is_public_address(each["host"])]:
                return public
            raise OSError("not public")

    make, guard = image_fetch._session, image_fetch._guarded_socket

    def session(factory: Any) -> Any:
        made: Any = make(None)
        if factory is guard:
            made.connector._resolver = PublicOnly()
        return made

    image_fetch._session = session  # type: ignore[assignment]


def with_is_global_alone() -> None:
    """with ipaddress.is_global alone."""
    from app.media import fetch as image_fetch

    image_fetch.is_public_address = lambda address: ipaddress.ip_address(address.partition("%")[0]).is_global


def with_redirects_by_the_first_session() -> None:
    """with redirects left to aiohttp, on the first host's session."""
    from app.media import fetch as image_fetch

    async def follow(self: image_fetch.ImageFetcher, target: Any) -> bytes:
        async with self._session_for(target).get(target, max_redirects=4) as response:
            return await self._body(response)

    image_fetch.ImageFetcher._follow = follow  # type: ignore[method-assign]


def with_the_environments_proxy() -> None:
    """with the environment's proxy."""
    from app.media import fetch as image_fetch

    make = image_fetch._session

    def session(factory: Any) -> Any:
        made: Any = make(factory)
        made._trust_env = True
        return made

    image_fetch._session = session  # type: ignore[assignment]


# Where the addresses are


@check(
    "SSRF tricks",
    f"{len(TRICKS)} URLs and redirects, in a network namespace that has every address",
    "none reaches a host that is neither public nor exempt; each 400 in JSON, naming the URL's host alone; honest URLs 200",
    with_a_check_before_the_download,
    with_a_guard_in_the_resolver,
    without_any_guard,
    with_is_global_alone,
    with_redirects_by_the_first_session,
    with_the_environments_proxy,
    isolated=True,
)
def ssrf_tricks(site: Site) -> Outcome:
    namespace.enter()
    world = World(png(picture()), tricks.answers())
    with namespace.running(world):
        server = site.fake(**SETTINGS, **PROXIES)
        with Client(server) as client:
            wrong = honest_urls(client, world)
            outcomes = [attempt(client, server, world, number, trick) for number, trick in enumerate(TRICKS)]
    through = [trick for trick, (reached, _) in zip(TRICKS, outcomes, strict=True) if reached]
    wrong += [
        f"{' -> '.join((trick.url, *trick.hops))}: {said}"
        for trick, (reached, said) in zip(TRICKS, outcomes, strict=True)
        if said and not reached
    ]
    figure = f"{len(TRICKS)} tricks, {len(through)} got through, {len(wrong)} wrong replies"
    shown = [" -> ".join((each.url, *each.hops)) for each in through[:3]] + wrong[:3]
    return Outcome(not through and not wrong, "; ".join((figure, *map(ascii, shown))))


def honest_urls(client: Client, world: World) -> list[str]:
    """What is wrong with the replies to URLs that may be fetched, and to hosts that answer with what is none of the caller's
    business."""
    world.redirects["/to/exempt"] = (302, f"http://{EXEMPT}/x")
    good = (
        f"http://{HOST}/x",
        f"http://{HOST}:8080/x",
        f"http://[{PUBLIC_6}]/x",
        f"http://{EXEMPT}/x",
        f"http://{HOST}/to/exempt",
    )
    wrong = [f"{url}: {reply.kind} {reply.message}" for url in good if (reply := client.url(url)).status != 200]
    for url in (f"http://{HOST}/teapot", f"http://{EXEMPT}/teapot"):
        if said := complaint(client.url(url), urlsplit(url).hostname):
            wrong.append(f"{url}: {said}")
    namespace.settle()
    dialled = {address for address, _ in world.reached}
    if dialled != {PUBLIC, PUBLIC_6, EXEMPT_ADDRESS}:
        wrong.append(f"honest URLs reached {', '.join(sorted(dialled))}")
    return wrong


def attempt(client: Client, server: Process, world: World, number: int, trick: Trick) -> tuple[bool, str]:
    """Whether a trick reaches what it must not, and what is wrong with its reply."""
    own = str(server.port())
    path = f"hop/{number}"
    for step, hop in enumerate(trick.hops):
        target = hop.replace("OWN", own) + (f"{path}/{step + 1}" if hop.endswith("/") else "")
        world.redirects[f"/{path}/{step}"] = (trick.status, target)
    url = trick.url.replace("OWN", own) + (f"{path}/0" if trick.hops else "")
    before, served = len(world.reached), server.stderr.count("GET /v1/models")
    reply = client.url(url)
    namespace.settle()
    may = {PUBLIC, PUBLIC_6}
    exempt = any(each.startswith(f"http://{EXEMPT}/") for each in (trick.url, *trick.hops))
    reached = any(address not in may and not (exempt and (address, port) == (EXEMPT_ADDRESS, 80))
                  for address, port in world.reached[before:])  # fmt: skip
    reached |= server.stderr.count("GET /v1/models") > served
    if reply.status == 200 and len(world.reached) > before and not reached:
        return False, ""  # it has led to a public host
    return reached, complaint(reply, urlsplit(url).hostname if trick.hops else None)


def complaint(reply: Reply, host: str | None) -> str:
    """What is wrong with a refusal, which may name no host but this one, where one is given."""
    if reply.status != 400 or reply.message is None:
        return reply.kind
    if named := re.match(r"image from (\S*) ", reply.message):
        if host is not None and named[1] != host:
            return f"names {named[1]}"
        return f"tells {told[0]}" if (told := _TOLD.search(reply.message, named.end())) else ""
    return f"tells {told[0]}" if (told := _TOLD.search(reply.message)) else ""


# Names whose addresses change


def after(first: str, *later: str) -> Callable[[str], Answer]:
    """A name that is `first` when it is asked for the first time, and then one of the private ones."""
    return lambda private: lambda kind, asked: addresses_of(kind, (first,) if not asked else (*later, private))


def addresses_of(kind: str, addresses: tuple[str, ...]) -> list[str]:
    return [address for address in addresses if (":" in address) == (kind == "AAAA")]


def by_turns(private: str) -> Answer:
    return lambda kind, asked: addresses_of(kind, (private if asked % 2 else PUBLIC, private if asked % 2 else PUBLIC_6))


def private_first(private: str) -> Answer:
    return lambda kind, asked: addresses_of(kind, (PUBLIC, PUBLIC_6) if asked else (private,))


def both(*before: str, then: tuple[str, ...] = ()) -> Callable[[str], Answer]:
    return lambda private: lambda kind, _: addresses_of(kind, (*before, private, *then))


FLIPS: tuple[Callable[[str], Answer], ...] = (
    after(PUBLIC),
    after(PUBLIC_6),
    after(PUBLIC, DEAD),
    by_turns,
    private_first,
    both(PUBLIC),
    both(then=(PUBLIC,)),
    both(DEAD),
    both(PUBLIC_6, DEAD),
    both(DEAD, then=(PUBLIC_6,)),
)
TARGETS = ("127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "fd00:ec2::254", "192.168.0.1", "::ffff:10.0.0.1")
REBINDINGS = 100


@check(
    "rebinding",
    f"{REBINDINGS} requests for names whose addresses change, time to live 0",
    "none reaches a private address; each 200 or 400 in JSON",
    with_a_check_before_the_download,
    without_any_guard,
    isolated=True,
)
def rebinding(site: Site) -> Outcome:
    namespace.enter()
    world = World(png(picture()), tricks.answers())
    replies: Counter[str] = Counter()
    targets = itertools.cycle(TARGETS)
    with namespace.running(world):
        with Client(site.fake(**SETTINGS)) as client:
            for number in range(REBINDINGS // 2):
                name = f"rebinding-{number}.test"
                world.names[name] = FLIPS[number % len(FLIPS)](next(targets))
                # Another port is another connection, for which the name is asked again; half of them by way of a redirect.
                world.redirects[f"/{number}"] = (302, f"http://{name}:8080/x")
                second = f"http://{HOST}/{number}" if number % 2 else f"http://{name}:8080/x"
                replies.update(client.url(url).kind for url in (f"http://{name}/x", second))
        namespace.settle()
    inside = [address for address, _ in world.reached if address not in (PUBLIC, PUBLIC_6)]
    figure = f"{replies.total()} requests, {len(inside)} reached a private address; {said(replies)}"
    return Outcome(not inside and set(replies) <= {"200", "400"} and replies["200"] > 0, figure)


def said(replies: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(replies.items()))


# What a host may cost


def without_the_deadline() -> None:
    """without the deadline of a download."""
    from app.media import fetch as image_fetch

    endless: Any = types.SimpleNamespace(**{**vars(asyncio), "timeout": lambda _: nullcontext()})
    vars(image_fetch)["asyncio"] = endless


def without_the_limit_of_bytes() -> None:
    """without the limit of a download's bytes."""
    _with(max_bytes=1 << 40)


def without_the_limit_of_downloads() -> None:
    """without the limit of downloads at once."""
    _with(max_concurrent=1000)


def without_the_limit_of_redirects() -> None:
    """without the limit of redirects."""
    from app.media import fetch as image_fetch

    image_fetch._MAX_REDIRECTS = 100


def with_compressed_bodies() -> None:
    """with bodies decompressed as they come."""
    from app.media import fetch as image_fetch

    make = image_fetch._session

    def session(factory: Any) -> Any:
        made: Any = make(factory)
        made._auto_decompress = True
        return made

    async def body(self: image_fetch.ImageFetcher, response: Any) -> bytes:
        return bytes(await response.read())

    image_fetch._session = session  # type: ignore[assignment]
    image_fetch.ImageFetcher._body = body  # type: ignore[method-assign]


def _with(**changed: int) -> None:
    from app.media import fetch as image_fetch

    make = image_fetch.ImageFetcher.__init__

    def init(self: image_fetch.ImageFetcher, **given: Any) -> None:
        make(self, **given | changed)

    image_fetch.ImageFetcher.__init__ = init  # type: ignore[method-assign]


WAITING = 64
DOWNLOADS_AT_ONCE = 32
DEADLINE_S = 1.0
# What lies in the sockets' buffers, at both ends, comes on top of the megabyte that is read.
MOST_MIB = 20


@check(
    "slow hosts",
    f"dribbles, an endless body, a gzip bomb, 4 redirects, {WAITING} downloads at once",
    f"400 within {DEADLINE_S + 1:g} s, {MOST_MIB} MiB, 3 redirects; {DOWNLOADS_AT_ONCE} downloads under way; memory +50 MiB",
    without_the_deadline,
    without_the_limit_of_bytes,
    with_compressed_bodies,
    without_the_limit_of_redirects,
    without_the_limit_of_downloads,
)
def slow_hosts(site: Site) -> Outcome:
    with slow_host(png(picture())) as host:
        limits = {"IMAGE_FETCH_TIMEOUT_S": f"{site.seconds(DEADLINE_S)}", "MAX_IMAGE_BYTES": "1MiB"}
        with site.own("tests.support.fakes", IMAGE_URL_ALLOWED_HOSTS=f"127.0.0.1:{host.port}", **limits) as server:
            server.until_status("ok", READY_S)
            with Client(server) as client:
                warm = client.url(host.url("/redirects/0"))
                reset_peak(server)
                before = peak_mib(server)
                slow = at_once(server, [host.url(path) for path in ("/silent", "/head", "/body")])
                cut = client.url(host.url("/endless"))
                packed = [client.url(host.url(path)) for path in ("/compressed", "/bomb")]
                hops = [client.url(host.url(f"/redirects/{count}")).kind for count in (3, 4)]
            held = Counter(reply.kind for reply in at_once(server, [host.url("/hold")] * WAITING))
            grown = peak_mib(server) - before
    longest, sent = max(reply.seconds for reply in slow), host.sent / 2**20
    figure = (
        f"{said(Counter(reply.kind for reply in slow))} after {longest:.1f} s; endless: {cut.kind}, {sent:.0f} MiB sent; "
        f"compressed: {said(Counter(reply.kind for reply in packed))}; 3 redirects {hops[0]}, 4 redirects {hops[1]}; "
        f"{host.most} of {WAITING} downloads at once, {said(held)}; memory +{grown:.0f} MiB"
    )
    refused = {reply.kind for reply in (*slow, cut, *packed)} == {"400"} and hops == ["200", "400"]
    bounded = longest < site.seconds(DEADLINE_S + 1) and sent < MOST_MIB and host.most <= DOWNLOADS_AT_ONCE and grown < 50
    return Outcome(warm.status == 200 and refused and bounded and held == {"200": WAITING}, figure)


def at_once(server: Process, urls: list[str]) -> list[Reply]:
    def one(url: str) -> Reply:
        with Client(server) as client:
            return client.url(url)

    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(one, urls))
