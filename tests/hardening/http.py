"""Checks of the HTTP edge: who is let in, what is no HTTP, who sends too slowly or too much, and whether /health answers still."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence

from tests.hardening.board import Outcome, Site, check, memory_mib
from tests.hardening.shapes import RIGHT_KEYS, SMUGGLED, WRONG_KEYS
from tests.hardening.wire import KEY, Exchange, answers, ask, exchange, request
from tests.hosts import Process

GOOD_BODY = b'{"input":"a"}'
SIZED = b"Content-Length: %d" % len(GOOD_BODY)
SECOND = request(method=b"GET", path=b"/health/live")


def tally(seen: Iterable[object]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(collections.Counter(map(str, seen)).items()))


# Who is let in


def without_auth() -> None:
    """without the check of the key."""
    from app import auth

    auth.check_key = lambda headers, keys: "anyone"


def keys_as_str() -> None:
    """without bytes in the comparison of keys: compare_digest takes no str beyond ASCII."""
    import hmac

    from app import auth
    from app.errors import Unauthorized

    def check_key(headers, keys):  # type: ignore[no-untyped-def]
        given = (headers[0] if len(headers) == 1 else "").partition(" ")[2].strip()
        if not any(hmac.compare_digest(given, key.key.decode()) for key in keys):
            raise Unauthorized
        return "someone"

    auth.check_key = check_key


def key_after_body() -> None:
    """without the check of the key before the body is read."""
    from aiohttp import web

    from app import auth

    check_key = auth.auth_middleware

    @web.middleware
    async def late(request: web.Request, handler):  # type: ignore[no-untyped-def]
        await request.content.read()
        return await check_key(request, handler)

    auth.auth_middleware = late


# What would be refused for its body as well, and bodies that never come: the key alone decides.
UNREAD = (
    (b"Content-Length: 100",),
    (b"Content-Length: 99999999999",),
    (b"Content-Length: 100", b"Content-Encoding: gzip"),
    (b"Content-Length: 100", b"Expect: 100-continue"),
    (b"Transfer-Encoding: chunked",),
)
PROTECTED = (
    (b"POST", b"/v1/embeddings"),
    (b"POST", b"/v1/embeddings/preview"),
    (b"GET", b"/v1/models"),
    (b"GET", b"/v1/models/Qwen3-VL-Embedding-2B"),
    (b"GET", b"/v1/models/none"),
)


@check(
    "auth",
    f"{len(WRONG_KEYS)} forms of the header without a right key on {len(PROTECTED)} routes, {len(UNREAD)} with a body that never "
    f"comes or is not accepted, and {len(RIGHT_KEYS)} forms that are right",
    "401 in JSON with WWW-Authenticate, before the body; 200 where the key is right",
    without_auth,
    keys_as_str,
    key_after_body,
)
def auth(site: Site) -> Outcome:
    server = site.fake()

    def said(sent: bytes) -> str:
        answer = ask(server, sent, timeout=3.0)
        challenge = " Bearer" if answer and answer.headers.get("WWW-Authenticate") == "Bearer" else ""
        return f"{answer or 'nothing in 3 s'}{challenge}"

    wrong = [
        said(request(*form, SIZED, body=GOOD_BODY, method=method, path=path))
        for form in WRONG_KEYS.values()
        for method, path in PROTECTED
    ]
    unread = [said(request(b"Authorization: Bearer wrong", *fields)) for fields in UNREAD]
    right = [said(request(*form, SIZED, body=GOOD_BODY)) for form in RIGHT_KEYS.values()]
    passed = set(wrong + unread) == {"401 JSON Bearer"} and set(right) == {"200"}
    return Outcome(passed, f"wrong: {tally(wrong)}; body unread: {tally(unread)}; right: {tally(right)}")


# What is no HTTP


def plain_text_errors() -> None:
    """without the JSON form of what the parser refuses."""
    from aiohttp.web_protocol import RequestHandler

    from app.http_protocol import JsonRequestHandler

    JsonRequestHandler.handle_error = RequestHandler.handle_error  # type: ignore[method-assign]


def lenient_parser() -> None:
    """without the strict parser: lengths beside chunks, bare LFs and folded lines are read somehow."""
    import re

    from app.http_protocol import JsonRequestHandler

    feed = JsonRequestHandler.data_received

    def data_received(self: JsonRequestHandler, data: bytes) -> None:
        if b"\nTransfer-Encoding: chunked" in data:
            data = re.sub(rb"\r\nContent-Length: [0-9]+(?=\r\n)", b"", data)
        feed(self, data)

    JsonRequestHandler.data_received = data_received  # type: ignore[method-assign]


@check(
    "smuggling",
    f"{len(SMUGGLED)} shapes that no two servers read alike, a second request behind each",
    "400 in JSON and closed; the second request is never answered; a good one is answered after them",
    plain_text_errors,
    lenient_parser,
)
def smuggling(site: Site) -> Outcome:
    server = site.fake()
    seen = {name: str(exchange(server, shape + SECOND, timeout=3.0)) for name, shape in SMUGGLED.items()}
    after = ask(server, request(KEY, SIZED, body=GOOD_BODY))
    wanted = "400 JSON, closed"
    others = [name for name, what in seen.items() if what != wanted]
    figure = tally(seen.values()) + f"; after them {after}" + (f"; not so: {', '.join(others[:5])}" if others else "")
    return Outcome(not others and after is not None and after.status == 200, figure)


# Who sends too slowly

# The server's limit in these checks, in seconds; how long it lets a refused client go on sending (app.server.LINGERING_S); and
# what 500 connections on a busy machine may take beyond it.
LIMIT_S = 2.0
LINGERING_S = 2.0
TOLERANCE_S = 1.5
GIVEN_UP_S = LIMIT_S + LINGERING_S + 4.0
# Memory that a second round may leave behind, in MiB.
MEMORY_MIB = 5.0


def without_body_timeout() -> None:
    """without the time limit of a body."""
    from app import bodies

    read_body = bodies.read_body
    bodies.read_body = lambda request, max_bytes, timeout_s: read_body(request, max_bytes, 1e6)


def without_header_timeout() -> None:
    """without the time limit of a head."""
    from app import server

    listen = server.listen
    server.listen = lambda runner, sock, header_timeout_s: listen(runner, sock, 1e6)


def kept_bodies() -> None:
    """without letting go of a body that did not arrive whole."""
    from app import bodies

    read_body = bodies.read_body
    kept: list[bytes] = []

    async def keeping(request, max_bytes: int, timeout_s: float) -> bytearray:  # type: ignore[no-untyped-def]
        kept.append(bytes(1 << 18))
        return await read_body(request, max_bytes, timeout_s)

    bodies.read_body = keeping


async def send_all(server: Process, senders: Sequence[Iterator[bytes]], gap_s: float) -> list[Exchange]:
    """Over a connection each, piece for piece with `gap_s` seconds between, until the server closes it or GIVEN_UP_S are over."""
    return await asyncio.gather(*(send(server.port(), pieces, gap_s) for pieces in senders))


async def send(port: int, pieces: Iterator[bytes], gap_s: float) -> Exchange:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.monotonic()

    async def dribble() -> None:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(gap_s)

    dribbling = asyncio.create_task(dribble())
    received, closed = b"", False
    try:
        async with asyncio.timeout(GIVEN_UP_S):
            while piece := await reader.read(1 << 16):
                received += piece
        closed = True
    except ConnectionError:
        closed = True
    except TimeoutError:
        pass
    seconds = time.monotonic() - started
    dribbling.cancel()
    writer.transport.abort()
    return Exchange(tuple(answers(received)), closed, seconds)


def two_rounds(server: Process, senders: Iterator[Iterator[bytes]], count: int, gap_s: float) -> tuple[list[Exchange], float]:
    """All exchanges of two rounds, and the MiB that the second left behind: the first warms up."""
    seen: list[Exchange] = []
    memory: list[float] = []
    for _ in range(2):
        seen += asyncio.run(send_all(server, list(itertools.islice(senders, count)), gap_s))
        memory.append(memory_mib(server))
    return seen, memory[1] - memory[0]


def in_time(seen: Sequence[Exchange], wanted: set[str], limit_s: float, grown_mib: float | None = None) -> Outcome:
    """All closed within the limit, with one of the wanted replies, and the memory back."""
    longest = max(exchange.seconds for exchange in seen)
    passed = {str(exchange) for exchange in seen} <= wanted and longest <= limit_s
    figure = f"{tally(seen)}; the longest {longest:.1f} s, of {limit_s:.1f}"
    if grown_mib is not None:
        passed = passed and grown_mib <= MEMORY_MIB
        figure += f"; memory {grown_mib:+.1f} MiB in the second round"
    return Outcome(passed, figure)


@check(
    "slow bodies",
    f"500 connections at once that send a byte every 0.2 s, twice, where a body may take {LIMIT_S:.0f} s",
    f"408 in JSON and closed within {LIMIT_S + LINGERING_S:.0f} s (+{TOLERANCE_S} s); memory +{MEMORY_MIB:.0f} MiB after warm-up",
    without_body_timeout,
    kept_bodies,
)
def slow_bodies(site: Site) -> Outcome:
    heads = (
        request(KEY, b"Content-Length: 100000", body=b'{"input":"'),
        request(KEY, b"Transfer-Encoding: chunked"),
        request(KEY, b"Content-Length: 100000", b"Connection: close"),
        request(KEY, b"Content-Length: 33554432", body=b"a" * 10_000),
        request(KEY, b"Content-Length: 100000", path=b"/v1/embeddings/preview"),
    )
    bytes_after = (b"a", b"1\r\na\r\n", b"a", b"a", b"a")
    senders = (
        itertools.chain([head], itertools.repeat(after)) for head, after in itertools.cycle(zip(heads, bytes_after, strict=True))
    )
    with site.own("tests.fakes", BODY_TIMEOUT_S=str(LIMIT_S)) as server:
        server.until_status("ok")
        seen, grown = two_rounds(server, senders, site.many(500, 100), 0.2)
    return in_time(seen, {"408 JSON, closed"}, LIMIT_S + LINGERING_S + TOLERANCE_S, grown)


@check(
    "chunk flood",
    f"100 connections at once with 1,000,000 chunks of one byte each, twice, where a body may take {LIMIT_S:.0f} s",
    f"400 or 408 in JSON and closed within {LIMIT_S + LINGERING_S:.0f} s (+{TOLERANCE_S} s); memory +{MEMORY_MIB:.0f} MiB after warm-up",
    without_body_timeout,
    kept_bodies,
)
def chunk_flood(site: Site) -> Outcome:
    chunks = b"1\r\na\r\n" * 10_000
    head = request(KEY, b"Transfer-Encoding: chunked", b"Connection: close")
    senders = (itertools.chain([head], itertools.repeat(chunks, 100), [b"0\r\n\r\n"]) for _ in itertools.count())
    with site.own("tests.fakes", BODY_TIMEOUT_S=str(LIMIT_S)) as server:
        server.until_status("ok")
        seen, grown = two_rounds(server, senders, site.many(100, 20), 0.0)
    return in_time(seen, {"400 JSON, closed", "408 JSON, closed"}, LIMIT_S + LINGERING_S + TOLERANCE_S, grown)


@check(
    "slow heads",
    f"connections at once that are silent, begin a head and stop, or send a byte of it every 0.2 s, where it may take {LIMIT_S:.0f} s",
    f"closed within {LIMIT_S:.0f} s (+{TOLERANCE_S} s)",
    without_header_timeout,
)
def slow_heads(site: Site) -> Outcome:
    line = b"POST /v1/embeddings HTTP/1.1\r\n"
    kinds: tuple[tuple[bytes, bytes], ...] = ((b"", b""), (b"P", b""), (line, b""), (line + b"X-A: ", b"a"), (line, b"a"))
    with site.own("tests.fakes", HEADER_TIMEOUT_S=str(LIMIT_S)) as server:
        server.until_status("ok")
        senders = [
            itertools.chain([first], itertools.repeat(then) if then else [])
            for first, then in itertools.islice(itertools.cycle(kinds), site.many(500, 100))
        ]
        seen = asyncio.run(send_all(server, senders, 0.2))
    return in_time(seen, {"nothing, closed", "400 JSON, closed", "408 JSON, closed"}, LIMIT_S + TOLERANCE_S)
