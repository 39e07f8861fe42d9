"""What is below the routes: malformed HTTP, connections that are slow, idle or reused, and clients that leave in the middle."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading

import orjson
import pytest

import app.http.server
from app.http.keys import LIFECYCLE, MEMORY, METRICS, SCHEDULER
from tests.conftest import Client, Clock, Serve, until
from tests.support.fakes import FakeModel
from tests.support.hosts import connect, post

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer sk-test\r\n"
BODY = b'{"input":"a"}'

MALFORMED = {
    "no HTTP": b"nonsense\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "binary": bytes(range(256)),
    "version 9": b"GET /health HTTP/9.9\r\nHost: test\r\n\r\n",
    "unknown method": b"FROB /health HTTP/1.1\r\nHost: test\r\n\r\n",
    "header without colon": b"GET /health HTTP/1.1\r\nHost test\r\n\r\n",
    "header with space before colon": b"GET /health HTTP/1.1\r\nHost : test\r\n\r\n",
    "empty header name": b"GET /health HTTP/1.1\r\n: test\r\n\r\n",
    "folded header": b"GET /health HTTP/1.1\r\nHost: test\r\nX-A: b\r\n c\r\n\r\n",
    "control character in a header": b"GET /health HTTP/1.1\r\nHost: te\x00st\r\n\r\n",
    "bare CR in a header": b"GET /health HTTP/1.1\r\nHost: test\r\nX-A: b\rX-B: c\r\n\r\n",
    "long header": b"GET /health HTTP/1.1\r\nHost: test\r\nX-A: " + b"a" * 20_000 + b"\r\n\r\n",
    "long target": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n",
    "length that is no number": HEAD + b"Content-Length: ten\r\n\r\n",
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "signed length": HEAD + b"Content-Length: +13\r\n\r\n" + BODY,
    "length beyond 64 bits": HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 13\r\nContent-Length: 14\r\n\r\n" + BODY,
    "length and chunks": HEAD + b"Content-Length: 13\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked not last": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "unknown transfer coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunk size that is no number": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "signed chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n+d\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk size beyond 64 bits": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n",
    "chunk longer than its size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n" + BODY + b"\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_http_gets_the_json_form_and_is_closed(
    client: Client, fake: FakeModel, caplog: pytest.LogCaptureFixture, request_bytes: bytes
) -> None:
    caplog.set_level(logging.INFO)
    async with connect(client.port) as raw:
        await raw.send(request_bytes)
        reply = await raw.reply()
        assert reply.status == 400
        assert reply.headers["Content-Type"] == "application/json"
        assert reply.headers["X-Request-Id"]
        message = reply.error.pop("message")
        assert {key: reply.error[key] for key in ("type", "param", "code")} == {
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
        assert message in ("the request is not valid HTTP", "the body is not a whole HTTP message body")
        assert await raw.rest() == b""
    assert fake.embedded == 0
    assert rejected(client, "malformed" if message == "the request is not valid HTTP" else "invalid") == 1
    assert [record.levelname for record in caplog.records if reply.headers["X-Request-Id"] in record.message] == ["INFO"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (await client.get("/health"))[0] == 200


@pytest.mark.parametrize("request_bytes", [data for name, data in MALFORMED.items() if "chunk size" in name or "than" in name])
@pytest.mark.parametrize("path", [b"/v1/embeddings", b"/nothing"])
async def test_a_body_that_breaks_off_after_its_head_was_read(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, request_bytes: bytes, path: bytes
) -> None:
    monkeypatch.setattr(app.http.server, "LINGERING_S", 60.0)
    client = await serve()
    head, _, body = request_bytes.partition(b"\r\n\r\n")
    async with connect(client.port) as raw:
        await until(lambda: client.server.connections)
        await raw.send(head.replace(b"/v1/embeddings", path) + b"\r\n\r\n")
        await asyncio.sleep(0.02)
        await raw.send(body + b"\r\nGET /health HTTP/1.1\r\nHost: test\r\n\r\n")
        reply = await raw.reply()
        assert reply.status == (404 if path == b"/nothing" else 400)
        assert reply.error["type"] == "invalid_request_error"
        assert reply.headers["Connection"] == "close"
        # Nothing that follows is a request. What nobody reads of a body is waited for a while by aiohttp.
        if path == b"/v1/embeddings":
            assert await raw.rest() == b""
        else:
            assert await raw.is_open(0.1)
    assert "Traceback" not in caplog.text


async def test_malformed_http_behind_a_good_request(client: Client, fake: FakeModel) -> None:
    async with connect(client.port) as raw:
        await raw.send(post(BODY))
        assert (await raw.reply()).status == 200
        await raw.send(b"nonsense\r\n\r\n")
        assert (await raw.reply()).status == 400
        assert await raw.rest() == b""
    fake.seconds_per_batch = 0.1
    async with connect(client.port) as raw:
        await raw.send(post(BODY))
        await asyncio.sleep(0.03)
        await raw.send(b"nonsense\r\n\r\n")
        assert (await raw.reply()).status == 200
        assert (await raw.reply()).status == 400
        assert await raw.rest() == b""


async def test_a_socket_full_of_garbage_does_not_flood_the_log(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(20):
        async with connect(client.port) as raw:
            await raw.send(b"\x16\x03\x01garbage\r\n\r\n")
            await raw.rest()
    assert "Traceback" not in caplog.text


# Connections


async def test_a_connection_is_reused_and_requests_are_answered_in_order(client: Client, fake: FakeModel) -> None:
    async with connect(client.port) as raw:
        texts = [f"text {index}" for index in range(20)]
        await raw.send(b"".join(post(b'{"input":"%b"}' % text.encode()) for text in texts))
        for text in texts:
            reply = await raw.reply()
            assert reply.json()["data"][0]["embedding"] == pytest.approx(fake.vector(text).tolist(), abs=1e-7)


async def test_http_1_0_and_connection_close(client: Client) -> None:
    for version, header in ((b"HTTP/1.0", b"X-A: b"), (b"HTTP/1.1", b"Connection: close")):
        async with connect(client.port) as raw:
            await raw.send(b"GET /health %b\r\nHost: test\r\n%b\r\n\r\n" % (version, header))
            assert (await raw.reply()).status == 200
            assert await raw.rest() == b""


async def test_expect_100_continue(client: Client) -> None:
    async with connect(client.port) as raw:
        for _ in range(2):
            await raw.send(post(None, f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
            assert (await raw.reply()).status == 100
            await raw.send(BODY)
            assert (await raw.reply()).status == 200


@pytest.mark.parametrize("framing", ["Content-Length: 13", "Transfer-Encoding: chunked"])
async def test_a_body_in_pieces(client: Client, framing: str) -> None:
    pieces = [BODY[:1], BODY[1:7], BODY[7:]]
    if "chunked" in framing:
        pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]
    async with connect(client.port) as raw:
        await raw.send(post(None, framing))
        for piece in pieces:
            await asyncio.sleep(0.01)
            await raw.send(piece)
        assert (await raw.reply()).status == 200


# The header timeout


def rejected(client: Client, reason: str) -> float | None:
    return client.app[METRICS].registry.get_sample_value("embedding_rejected_total", {"reason": reason})


async def test_a_half_sent_head_is_closed(serve: Serve, clock: Clock) -> None:
    client = await serve(header_timeout_s=30.0)
    for start in (b"G", b"POST /v1/embeddings HTTP/1.1\r\nHost: t", post(BODY)[:-20]):
        async with connect(client.port) as raw:
            await until(lambda: client.server.connections)
            await raw.send(start[:60])
            clock.advance(25)
            assert await raw.is_open(0.05)
            clock.advance(10)
            assert await raw.rest() == b""


async def test_a_head_that_drips_is_closed(serve: Serve, clock: Clock) -> None:
    client = await serve(header_timeout_s=30.0)
    async with connect(client.port) as raw:
        await until(lambda: client.server.connections)
        await raw.send(b"POST /v1/embeddings HTTP/1.1\r\nX-A: ")
        for _ in range(6):
            assert await raw.is_open(0.005)
            clock.advance(5.5)
            await raw.send(b"a")
        assert await raw.rest() == b""


async def test_a_half_sent_head_on_a_connection_that_was_used(serve: Serve, clock: Clock) -> None:
    client = await serve(header_timeout_s=30.0)
    async with connect(client.port) as raw:
        await raw.send(post(BODY))
        assert (await raw.reply()).status == 200
        await raw.send(b"GET /health")
        assert await raw.is_open(0.05)
        clock.advance(35)
        assert await raw.rest() == b""


async def test_a_slow_head_within_the_limit_is_read(serve: Serve, clock: Clock) -> None:
    client = await serve(header_timeout_s=60.0)
    async with connect(client.port) as raw:
        for _ in range(3):
            request = post(BODY)
            await raw.send(request[:10])
            assert await raw.is_open(0.05)
            clock.advance(25)
            await raw.send(request[10:])
            assert (await raw.reply()).status == 200


async def test_idle_connections_are_left_alone(serve: Serve, clock: Clock) -> None:
    client = await serve(header_timeout_s=30.0)
    async with connect(client.port) as used:
        for _ in range(2):
            await used.send(post(BODY))
            assert (await used.reply()).status == 200
            clock.advance(40)
            assert await used.is_open(0.1)


async def test_a_connection_on_which_nothing_is_asked_is_closed(serve: Serve, clock: Clock) -> None:
    client = await serve(header_timeout_s=30.0)
    async with connect(client.port) as raw:
        await until(lambda: client.server.connections)
        clock.advance(25)
        assert await raw.is_open(0.05)
        clock.advance(10)
        assert await raw.rest() == b""
    assert rejected(client, "header_timeout") == 1


async def test_a_long_request_is_not_cut_by_the_header_timeout(serve: Serve, clock: Clock) -> None:
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake, header_timeout_s=10.0)
    assert fake.gate is not None
    scheduler = client.app[SCHEDULER]
    async with connect(client.port) as raw:
        try:
            request = post(BODY)
            await raw.send(request[:-5])
            await until(lambda: client.app[LIFECYCLE].in_flight)
            clock.advance(12)
            assert await raw.is_open(0.05)
            await raw.send(request[-5:])
            await until(lambda: scheduler._worker and scheduler._worker.busy_seconds())
            clock.advance(12)
            assert await raw.is_open(0.05)
        finally:
            fake.gate.set()
        assert (await raw.reply()).status == 200


# Clients that leave


@pytest.mark.parametrize("sent", [b"", b"POST /v1", post(None, "Content-Length: 50") + b'{"in', post(BODY)])
async def test_a_client_that_leaves_leaves_nothing(serve: Serve, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    client = await serve(FakeModel(seconds_per_batch=0.05))
    for _ in range(10):
        async with connect(client.port) as raw:
            await raw.send(sent)
            await asyncio.sleep(0.005)
            raw.abort()
    async with asyncio.timeout(30):
        while (await client.get("/health"))[1]["queue_depth"]:
            await asyncio.sleep(0.01)
    assert (await client.embed({"input": "a"}))[0] == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_refused_body_that_has_come_to_its_end_ends_the_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.http.server, "LINGERING_S", 60.0)
    client = await serve()
    async with connect(client.port) as raw:
        await raw.send(b"POST /v1/embeddings HTTP/1.1\r\nHost: test\r\nContent-Length: 300000\r\n\r\n" + b"x" * 100)
        assert (await raw.reply()).status == 401
        await raw.send(b"x" * 299_900)
        assert await raw.rest() == b""


# Clients that do not read


async def test_a_reply_that_nobody_takes_counts_as_memory_and_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.http.server, "REPLY_S", 0.5)
    client = await serve(FakeModel(width=4096))
    inputs = orjson.dumps({"input": [str(number) for number in range(500)]})
    async with connect(client.port) as raw:
        raw.writer.transport.pause_reading()
        await raw.send(post(inputs))
        async with asyncio.timeout(60):
            while not (held := client.app[MEMORY].held):
                await asyncio.sleep(0.01)
            while client.app[MEMORY].held or not rejected(client, "reply_timeout"):
                held = max(held, client.app[MEMORY].held)
                await asyncio.sleep(0.01)
    monkeypatch.setattr(app.http.server, "REPLY_S", 60.0)
    patient = await serve(FakeModel(width=4096))
    async with patient.session.post("/v1/embeddings", data=inputs) as response:
        reply = await response.read()
    assert response.status == 200 and len(orjson.loads(reply)["data"]) == 500 and patient.app[MEMORY].held == 0
    # There are two of it: one is the transport's.
    assert held == 2 * len(reply)


async def test_a_slow_client_gets_all_of_a_large_reply(serve: Serve, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """60 MB at 6 megabits a second: it got 45 MB, and a status of 200."""
    monkeypatch.setattr(app.http.server, "REPLY_S", 10.0)
    client = await serve(FakeModel(width=4096))
    inputs = orjson.dumps({"input": [str(number) for number in range(500)]})
    async with connect(client.port) as raw:
        raw.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        await raw.send(post(inputs))
        head = await raw.reader.readuntil(b"\r\n\r\n")
        left = int(re.search(rb"Content-Length: ([0-9]+)", head)[1])  # type: ignore[index]
        assert left > 20 << 20  # at two seconds for a megabyte: four times the limit in all
        while left:
            left -= len(await raw.reader.readexactly(min(left, 1 << 20)))
            clock.advance(2)
            await asyncio.sleep(0)
    assert not rejected(client, "reply_timeout")


async def test_replies_do_not_tell_versions(client: Client) -> None:
    async with connect(client.port) as raw:
        for request_bytes in (b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n", b"nonsense\r\n\r\n"):
            await raw.send(request_bytes)
            assert (await raw.reply()).headers["Server"] == "qwen3-vl-embedding-server"
