"""Checks of the HTTP edge: who is let in, what is no HTTP, who sends too slowly or too much, how /health fares meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor

from tests.support.hosts import Process
from tests.tools.hardening.board import Outcome, Site, check, memory_mib, peak_mib, reset_peak
from tests.tools.hardening.shapes import RIGHT_KEYS, SMUGGLED, WRONG_KEYS
from tests.tools.hardening.wire import KEY, Exchange, answers, ask, exchange, request, tally
from tests.tools.load.health import probe, run_load, share_of

GOOD_BODY = b'{"input":"a"}'
SIZED = b"Content-Length: %d" % len(GOOD_BODY)
SECOND = request(method=b"GET", path=b"/health/live")


# Who is let in


def without_auth() -> None:
    """without the check of the key."""
    from app.http import auth

    auth.check_key = lambda headers, keys: "anyone"


def keys_as_str() -> None:
    """without bytes in the comparison of keys: compare_digest takes no str beyond ASCII."""
    import hmac

    from app.errors import Unauthorized
    from app.http import auth

    def check_key(headers, keys):  # type: ignore[no-untyped-def]
        given = (headers[0] if len(headers) == 1 else "").partition(" ")[2].strip()
        if not any(hmac.compare_digest(given, key.key.decode()) for key in keys):
            raise Unauthorized
        return "someone"

    auth.check_key = check_key


def key_after_body() -> None:
    """without the check of the key before the body is read."""
    from aiohttp import web

    from app.http import auth

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
    server, limit = site.fake(), site.seconds(3.0)

    def said(sent: bytes) -> str:
        answer = ask(server, sent, timeout=limit)
        challenge = " Bearer" if answer and answer.headers.get("WWW-Authenticate") == "Bearer" else ""
        return f"{answer or f'nothing in {limit:.0f} s'}{challenge}"

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

    from app.http.connection import JsonRequestHandler

    JsonRequestHandler.handle_error = RequestHandler.handle_error  # type: ignore[method-assign]


def lenient_parser() -> None:
    """without the strict parser: lengths beside chunks, bare LFs and folded lines are read somehow."""
    import re

    from app.http.connection import JsonRequestHandler

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
    server, limit = site.fake(), site.seconds(3.0)
    seen = {name: str(exchange(server, shape + SECOND, timeout=limit)) for name, shape in SMUGGLED.items()}
    after = ask(server, request(KEY, SIZED, body=GOOD_BODY))
    wanted = "400 JSON, closed"
    others = [name for name, what in seen.items() if what != wanted]
    figure = tally(seen.values()) + f"; after them {after}" + (f"; not so: {', '.join(others[:5])}" if others else "")
    return Outcome(not others and after is not None and after.status == 200, figure)


# Who sends too slowly

# The server's limit in these checks, in seconds; how long it lets a refused client go on sending (server.LINGERING_S); what
# hundreds of connections on a busy machine may take beyond both; and when one is given up as never closed.
LIMIT_S = 1.0
LINGERING_S = 2.0
TOLERANCE_S = 4.0
CLOSED_S = LIMIT_S + LINGERING_S
GIVEN_UP_S = 4 * (CLOSED_S + TOLERANCE_S) + 2.0
# Memory that a round may leave behind once others have gone before, in MiB.
MEMORY_MIB = 5.0
ROUNDS = 8
QUICK_ROUNDS = 4


def without_body_timeout() -> None:
    """without the time limit of a body."""
    from app.http import bodies

    read_body = bodies.read_body
    bodies.read_body = lambda request, max_bytes, timeout_s, *more: read_body(request, max_bytes, 1e6, *more)


def without_header_timeout() -> None:
    """without the time limit of a head."""
    from app.http import server

    listen = server.listen
    server.listen = lambda runner, sock, header_timeout_s: listen(runner, sock, 1e6)


def kept_bodies() -> None:
    """without letting go of a body that did not arrive whole."""
    from app.http import bodies

    read_body = bodies.read_body
    kept: list[bytes] = []

    async def keeping(*arguments) -> bytearray:  # type: ignore[no-untyped-def]
        kept.append(b"k" * (1 << 20))
        return await read_body(*arguments)

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


def in_rounds(
    server: Process, senders: Iterator[Iterator[bytes]], count: int, gap_s: float, rounds: int
) -> tuple[list[Exchange], float]:
    """All exchanges of some rounds, and the MiB that both of the last two left behind beyond any before them: those warm up, and
    the allocator's share goes up and down by some MiB."""
    seen: list[Exchange] = []
    memory: list[float] = []
    for _ in range(rounds):
        seen += asyncio.run(send_all(server, list(itertools.islice(senders, count)), gap_s))
        memory.append(memory_mib(server))
    return seen, min(memory[-2:]) - max(memory[:-2])


def in_time(seen: Sequence[Exchange], wanted: set[str], limit_s: float, grown_mib: float | None = None) -> Outcome:
    """All closed within the limit, with one of the wanted replies, and the memory back."""
    longest = max(exchange.seconds for exchange in seen)
    passed = {str(exchange) for exchange in seen} <= wanted and longest <= limit_s
    figure = f"{tally(seen)}; the longest {longest:.1f} s, of {limit_s:.1f}"
    if grown_mib is not None:
        passed = passed and grown_mib <= MEMORY_MIB
        figure += f"; memory {grown_mib:+.1f} MiB in the last rounds"
    return Outcome(passed, figure)


@check(
    "slow bodies",
    f"500 connections at once that send a byte every 0.2 s, again and again, where a body may take {LIMIT_S:.0f} s",
    f"408 in JSON and closed within {CLOSED_S:.0f} s (+{TOLERANCE_S:.0f} s); memory +{MEMORY_MIB:.0f} MiB after warm-up",
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
    with site.own("tests.support.fakes", BODY_TIMEOUT_S=str(LIMIT_S)) as server:
        server.until_status("ok")
        seen, grown = in_rounds(server, senders, site.many(500, 100), 0.2, site.many(ROUNDS, QUICK_ROUNDS))
    return in_time(seen, {"408 JSON, closed"}, site.seconds(CLOSED_S + TOLERANCE_S), grown)


@check(
    "chunk flood",
    f"100 connections at once with 1,000,000 chunks of one byte each, half of them without a key, again and again, where a body "
    f"may take {LIMIT_S:.0f} s",
    "400, 401 or 408 in JSON, and closed within "
    f"{CLOSED_S:.0f} s (+{TOLERANCE_S:.0f} s); memory +{MEMORY_MIB:.0f} MiB after warm-up",
    without_body_timeout,
    kept_bodies,
)
def chunk_flood(site: Site) -> Outcome:
    chunks = b"1\r\na\r\n" * 10_000
    heads = [request(key, b"Transfer-Encoding: chunked", b"Connection: close") for key in (KEY, b"Authorization: Bearer wrong")]
    senders = (itertools.chain([head], itertools.repeat(chunks, 100), [b"0\r\n\r\n"]) for head in itertools.cycle(heads))
    with site.own("tests.support.fakes", BODY_TIMEOUT_S=str(LIMIT_S)) as server:
        server.until_status("ok")
        seen, grown = in_rounds(server, senders, site.many(100, 20), 0.0, site.many(ROUNDS, QUICK_ROUNDS))
    return in_time(seen, {f"{status} JSON, closed" for status in (400, 401, 408)}, site.seconds(CLOSED_S + TOLERANCE_S), grown)


@check(
    "slow heads",
    "500 connections at once that are silent, begin a head and stop, or send a byte of it every 0.2 s, where it may take "
    f"{LIMIT_S:.0f} s",
    f"closed within {LIMIT_S:.0f} s (+{TOLERANCE_S:.0f} s)",
    without_header_timeout,
)
def slow_heads(site: Site) -> Outcome:
    line = b"POST /v1/embeddings HTTP/1.1\r\n"
    kinds: tuple[tuple[bytes, bytes], ...] = ((b"", b""), (b"P", b""), (line, b""), (line + b"X-A: ", b"a"), (line, b"a"))
    with site.own("tests.support.fakes", HEADER_TIMEOUT_S=str(LIMIT_S)) as server:
        server.until_status("ok")
        senders = [
            itertools.chain([first], itertools.repeat(then) if then else [])
            for first, then in itertools.islice(itertools.cycle(kinds), site.many(500, 100))
        ]
        seen = asyncio.run(send_all(server, senders, 0.2))
    return in_time(seen, {"nothing, closed", "400 JSON, closed", "408 JSON, closed"}, site.seconds(LIMIT_S + TOLERANCE_S))


# Bodies that are larger than they look

INFLATED = 1 << 28
PEAK_MIB = 20.0
CODINGS = (
    *(
        "gzip",
        "GZIP",
        "x-gzip",
        "deflate",
        "br",
        "zstd",
        "compress",
        "gzip, gzip",
        "gzip,deflate",
        "identity, gzip",
        "gzip, identity",
    ),
    *(" gzip ", "gzip;q=1", "aws-chunked", "none", "*", '"gzip"'),
)


def bodies_inflated() -> None:
    """without the refusal of compressed bodies, the parser inflating them."""
    from app.http import bodies
    from app.http.connection import JsonRequestHandler

    start = JsonRequestHandler.__init__

    def inflating(self: JsonRequestHandler, *arguments: object, **options: object) -> None:
        start(self, *arguments, **options | {"auto_decompress": True})  # type: ignore[arg-type]

    JsonRequestHandler.__init__ = inflating  # type: ignore[method-assign]
    bodies.read_body = lambda request, *limits: request.content.read()


def bomb(bits: int, rounds: int = 1) -> bytes:
    """A JSON text of INFLATED spaces and a zero, deflated: `bits` as zlib has them, 31 for gzip; once more for every round."""
    packer = zlib.compressobj(1, zlib.DEFLATED, bits)
    data = b"".join([packer.compress(b" " * (1 << 20)) for _ in range(INFLATED >> 20)] + [packer.compress(b"0"), packer.flush()])
    for _ in range(rounds - 1):
        packer = zlib.compressobj(9, zlib.DEFLATED, bits)
        data = packer.compress(data) + packer.flush()
    return data


@check(
    "compressed bodies",
    f"bombs of {INFLATED >> 20} MiB in gzip, deflate and gzip twice, under {len(CODINGS)} values of Content-Encoding, by length "
    "and in chunks, and in gzip as a transfer coding",
    f"415 in JSON; peak memory +{PEAK_MIB:.0f} MiB at most",
    bodies_inflated,
)
def compressed_bodies(site: Site) -> Outcome:
    bombs = {"deflate": bomb(15), "gzip, gzip": bomb(31, rounds=2), "gzip,deflate": bomb(31, rounds=2)}
    gzip = bomb(31)
    sent: list[bytes] = []
    for coding in CODINGS:
        data, field = bombs.get(coding, gzip), b"Content-Encoding: " + coding.encode()
        sent.append(request(KEY, field, b"Content-Length: %d" % len(data), body=data))
        sent.append(request(KEY, field, b"Transfer-Encoding: chunked", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)))
    two_fields = (b"Content-Encoding: identity", b"Content-Encoding: gzip", b"Content-Length: %d" % len(gzip))
    sent.append(request(KEY, *two_fields, body=gzip))
    sent.append(request(KEY, b"Transfer-Encoding: gzip, chunked", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(gzip), gzip)))
    with site.own("tests.support.fakes") as server:
        server.until_status("ok")
        ask(server, request(KEY, SIZED, body=GOOD_BODY))
        reset_peak(server)
        before = peak_mib(server)
        limit = site.seconds(10.0)
        seen = [str(ask(server, one, timeout=limit) or f"nothing in {limit:.0f} s") for one in sent]
        grown = peak_mib(server) - before
    return Outcome(set(seen) == {"415 JSON"} and grown <= PEAK_MIB, f"{tally(seen)}; peak memory {grown:+.1f} MiB")


# /health under load

PROBED_S = 6
WINDOWS = 3
P99_MS, MAX_MS = 50.0, 250.0
# Callers that embed texts, beside two that send the large body.
TEXTS = ("32 texts", 4)
LARGE = (
    "a text of 20 MiB",
    "2,000 texts of 10 KB",
    "no image, 20 MiB",
    "no JSON, 20 MiB",
    "many {}",
    "many 0",
    "many texts",
    "a gzip bomb",
)


def parsed_on_loop() -> None:
    """without threads for large bodies: they are read on the event loop."""
    from typing import Any

    from app.engine.threads import BodyThreads

    async def run(self: BodyThreads, large: bool, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    BodyThreads.run = run  # type: ignore[method-assign]


@check(
    "health",
    f"GET /health every 5 ms while {TEXTS[1]} callers embed {TEXTS[0]} each and 2 send each of {len(LARGE)} large bodies "
    f"({', '.join(LARGE)}), best of up to {WINDOWS} windows of {PROBED_S} s",
    f"p99 < {P99_MS:.0f} ms, max < {MAX_MS:.0f} ms",
    parsed_on_loop,
    quick=False,
)
def health(site: Site) -> Outcome:
    server = site.app()
    url = f"http://127.0.0.1:{server.port()}"
    worst: dict[str, tuple[float, float]] = {}
    # The load in a process of its own: it would hold up the probe.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        for name in LARGE[: site.many(len(LARGE), 3)]:
            windows = (probe_under(other, url, [TEXTS, (name, 2)], site.many(PROBED_S, 2)) for _ in range(site.many(WINDOWS, 1)))
            worst[name] = best_of(windows)
    passed = all(p99 < P99_MS and longest < MAX_MS for p99, longest in worst.values())
    return Outcome(passed, "; ".join(f"{name}: p99 {p99:.0f}, max {longest:.0f} ms" for name, (p99, longest) in worst.items()))


def best_of(windows: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The first window within both bars, else the one with the smallest p99."""
    seen = []
    for p99, longest in windows:
        seen.append((p99, longest))
        if p99 < P99_MS and longest < MAX_MS:
            return p99, longest
    return min(seen)


def probe_under(other: Executor, url: str, loads: Sequence[tuple[str, int]], seconds: float) -> tuple[float, float]:
    """p99 and the longest wait for /health in milliseconds, under these loads. Raises where the load got no answer at all."""
    sent = other.submit(run_load, url, "sk-test", loads, seconds)
    while not sent.running():
        time.sleep(0.01)
    waits = asyncio.run(probe(url, seconds))
    assert sent.result().total(), "the load had no reply"
    return share_of(waits, 0.99), waits[-1] * 1000
