"""The error table of the HTTP contract, a row at a time, and the form that every error has."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from app.http.keys import LIFECYCLE, SCHEDULER
from app.settings import ApiKey
from scheduler.scheduler import State
from tests.conftest import KEY, Client, Clock, Serve, records_of, until
from tests.support.fakes import FakeModel
from tests.support.hosts import connect, image_host, picture, png, post

GOOD = {"input": "a"}


async def check(reply: aiohttp.ClientResponse, status: int, kind: str, code: str | None = None, param: str | None = None) -> str:
    """That a reply is this error in the one form. Returns its message."""
    body = await reply.json()
    assert reply.status == status, body
    assert reply.content_type == "application/json"
    assert reply.headers["X-Request-Id"]
    assert set(body) == {"error"}
    message = body["error"].pop("message")
    assert body["error"] == {"type": kind, "param": param, "code": code}
    assert isinstance(message, str)
    assert message
    return message


def whole_seconds(reply: aiohttp.ClientResponse) -> int:
    text = reply.headers["Retry-After"]
    assert text.isdecimal()
    assert int(text) >= 1
    return int(text)


# 401


PROTECTED = [
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/embeddings/preview"),
    ("GET", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("GET", "/v1/models/Qwen3-VL-Embedding-2B"),
    ("GET", "/v1/models/none"),
]
WRONG = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    f"Bearer {KEY}x",
    f"Bearer {KEY[:-1]}",
    f"Bearer {KEY} x",
    f"Bearer test:{KEY}",
    f"Basic {KEY}",
    f"Bearer{KEY}",
    KEY,
    f"Bearer {KEY.upper()}",
    "Bearer ключ",
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
async def test_401_on_every_protected_route(client: Client, method: str, path: str) -> None:
    async with client.request(method, path, headers={"Authorization": "Bearer wrong"}) as reply:
        assert reply.status == 401
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        if method != "HEAD":
            message = await check(reply, 401, "authentication_error", "invalid_api_key")
            assert "wrong;" in message
            assert KEY not in message


@pytest.mark.parametrize("value", WRONG)
async def test_401_for_every_wrong_header(client: Client, value: str | None) -> None:
    async with aiohttp.ClientSession() as session:
        headers = {} if value is None else {"Authorization": value}
        async with session.post(f"http://127.0.0.1:{client.port}/v1/embeddings", json=GOOD, headers=headers) as reply:
            await check(reply, 401, "authentication_error", "invalid_api_key")


@pytest.mark.parametrize("value", [f"bearer {KEY}", f"BEARER   {KEY}", f"Bearer {KEY}\t "])
async def test_the_scheme_is_read_in_any_case(client: Client, value: str) -> None:
    assert (await client.embed(GOOD, headers={"Authorization": value}))[0] == 200


@pytest.mark.parametrize("value", [b"Bearer \xff\xfe", b"Bearer sk-test\xff", b"\xff", "Bearer ключ".encode("koi8-r")])
async def test_401_for_bytes_that_are_no_text(client: Client, value: bytes) -> None:
    async with connect(client.port) as raw:
        await raw.send(post(b"{}", key=None).replace(b"Host: test", b"Host: test\r\nAuthorization: " + value))
        reply = await raw.reply()
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")


async def test_401_for_two_authorization_headers(client: Client) -> None:
    async with connect(client.port) as raw:
        await raw.send(post(b'{"input":"a"}', f"Authorization: Bearer {KEY}"))
        assert (await raw.reply()).status == 401


async def test_several_keys_and_keys_that_are_not_ascii(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = (ApiKey("old", b"sk-old"), ApiKey("new", "ключ-鍵".encode()))
    client = await serve(api_keys=keys)
    assert (await client.embed(GOOD))[0] == 401
    assert (await client.embed(GOOD, headers={"Authorization": "Bearer sk-old"}))[0] == 200
    assert (await client.embed(GOOD, headers={"Authorization": "Bearer ключ-鍵"}))[0] == 200
    lines = [record.getMessage() for record in caplog.records if "/v1/embeddings" in record.getMessage()]
    assert [line.partition("key=")[2].split()[0] for line in lines] == ["-", "old", "new"]
    assert "sk-old" not in caplog.text
    assert "ключ" not in caplog.text


async def test_auth_disabled(serve: Serve) -> None:
    client = await serve(api_keys=(), auth_disabled=True)
    assert (await client.embed(GOOD, headers={"Authorization": "Bearer wrong"}))[0] == 200
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{client.port}/v1/models") as reply:
        assert reply.status == 200


async def test_no_keys_open_nothing(serve: Serve) -> None:
    client = await serve(api_keys=())
    for value in ("Bearer ", "Bearer", "Bearer None"):
        assert (await client.embed(GOOD, headers={"Authorization": value}))[0] == 401


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 999999999999"],
        ["Content-Length: 20", "Content-Encoding: gzip"],
        ["Content-Length: 20", "Expect: 100-continue"],
        ["Transfer-Encoding: chunked"],
        ["Content-Length: 20"],
    ],
)
async def test_401_comes_before_the_body_is_read_and_before_413_and_415(client: Client, headers: list[str]) -> None:
    async with connect(client.port) as raw:
        await raw.send(post(None, *headers, key="wrong"))
        reply = await raw.reply()
    assert reply.status == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert reply.headers["Connection"] == "close"


async def test_401_comes_before_503(serve: Serve) -> None:
    release = threading.Event()
    try:
        client = await serve(lambda: release.wait() and FakeModel(), wait=False)
        assert (await client.embed(GOOD, headers={"Authorization": "Bearer wrong"}))[0] == 401
    finally:
        release.set()


# 404, 405


@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/nothing",
        "/v1",
        "/v1/embeddings/",
        "/v1/models/",
        "/docs/a",
        "/assets/a/b",
        "/assets/../auth.py",
        "/health/x",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_404_needs_no_key(client: Client, method: str, path: str) -> None:
    async with client.request(method, path, headers={"Authorization": "Bearer wrong"}) as reply:
        await check(reply, 404, "invalid_request_error", "not_found")


@pytest.mark.parametrize("name", ["none", "Qwen", "Qwen/", "Qwen3-VL-Embedding-2B/", "Qwen%2FQwen3-VL-Embedding-2B%00"])
async def test_404_for_another_model(client: Client, name: str) -> None:
    async with client.request("GET", f"/v1/models/{name}") as reply:
        await check(reply, 404, "invalid_request_error", "model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/embeddings", "POST"),
        ("HEAD", "/v1/embeddings", "POST"),
        ("PUT", "/v1/embeddings", "POST"),
        ("OPTIONS", "/v1/embeddings", "POST"),
        ("DELETE", "/v1/embeddings/preview", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/x/y", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("PATCH", "/metrics", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
    ],
)
async def test_405_says_what_is_allowed(client: Client, method: str, path: str, allow: str) -> None:
    async with client.request(method, path, headers={"Authorization": "Bearer wrong"}) as reply:
        assert reply.status == 405
        assert reply.headers["Allow"] == allow
        if method != "HEAD":
            await check(reply, 405, "invalid_request_error")


async def test_an_expectation_that_nobody_knows(client: Client) -> None:
    for path in ("/v1/embeddings", "/nothing", "/health"):
        async with connect(client.port) as raw:
            await raw.send(post(b"{}", "Expect: the-spanish-inquisition", path=path))
            reply = await raw.reply()
        assert reply.status == 417
        assert reply.headers["Content-Type"] == "application/json"
        assert reply.headers["X-Request-Id"]
        assert reply.error["type"] == "invalid_request_error"
        assert "spanish" not in reply.error["message"]


# 408, 413, 415


@pytest.mark.parametrize("framing", ["Content-Length: 20", "Transfer-Encoding: chunked"])
async def test_408_for_a_body_that_does_not_arrive(serve: Serve, framing: str, clock: Clock) -> None:
    client = await serve(body_timeout_s=600)
    async with connect(client.port) as raw:
        await raw.send(post(None, framing) + b"5\r\n{")
        await until(lambda: client.app[LIFECYCLE].in_flight)
        assert await raw.is_open(0.05)
        clock.advance(600)
        reply = await raw.reply()
    assert reply.status == 408
    assert reply.headers["Connection"] == "close"
    assert (reply.error["type"], reply.error["code"]) == ("timeout_error", None)


async def test_408_for_a_body_that_drips(serve: Serve, clock: Clock) -> None:
    client = await serve(body_timeout_s=600)
    async with connect(client.port) as raw:
        await raw.send(post(None, "Content-Length: 10000"))
        await until(lambda: client.app[LIFECYCLE].in_flight)
        for _ in range(6):
            assert client.app[LIFECYCLE].in_flight
            await raw.send(b" ")
            await asyncio.sleep(0.005)
            clock.advance(101)
        assert (await raw.reply()).status == 408


async def test_a_slow_body_within_the_limit_is_read(client: Client) -> None:
    async with connect(client.port) as raw:
        await raw.send(post(None, "Content-Length: 13"))
        for byte in b'{"input":"a"}':
            await raw.send(bytes([byte]))
            await asyncio.sleep(0.005)
        assert (await raw.reply()).status == 200


async def test_413_by_content_length_before_the_body_is_read(serve: Serve) -> None:
    client = await serve(max_request_bytes=100)
    for extra in ([], ["Expect: 100-continue"]):
        async with connect(client.port) as raw:
            await raw.send(post(None, "Content-Length: 101", *extra))
            reply = await raw.reply()
        assert reply.status == 413
        assert reply.headers["Connection"] == "close"
        assert (reply.error["type"], reply.error["code"]) == ("invalid_request_error", None)
        assert "100" in reply.error["message"]


async def test_413_by_counting_chunks(serve: Serve) -> None:
    client = await serve(max_request_bytes=100)
    async with connect(client.port) as raw:
        await raw.send(post(None, "Transfer-Encoding: chunked") + b"60\r\n" + b" " * 0x60 + b"\r\n5\r\n     \r\n")
        reply = await raw.reply()
    assert reply.status == 413
    assert reply.headers["Connection"] == "close"


async def test_a_body_of_just_the_limit_is_read(serve: Serve) -> None:
    client = await serve(max_request_bytes=100)
    body = b'{"input":"a"}'.ljust(100)
    async with connect(client.port) as raw:
        await raw.send(post(body))
        assert (await raw.reply()).status == 200
        await raw.send(post(None, "Transfer-Encoding: chunked") + b"64\r\n" + body + b"\r\n0\r\n\r\n")
        assert (await raw.reply()).status == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "nonsense"])
async def test_415_for_a_compressed_body(client: Client, coding: str) -> None:
    async with connect(client.port) as raw:
        await raw.send(post(b'{"input":"a"}', f"Content-Encoding: {coding}"))
        reply = await raw.reply()
    assert reply.status == 415
    assert (reply.error["type"], reply.error["code"]) == ("invalid_request_error", None)


async def test_415_for_the_second_of_two_codings(client: Client) -> None:
    async with connect(client.port) as raw:
        await raw.send(post(b'{"input":"a"}', "Content-Encoding: identity", "Content-Encoding: gzip"))
        assert (await raw.reply()).status == 415


async def test_identity_is_no_compression(client: Client) -> None:
    assert (await client.embed(GOOD, headers={"Content-Encoding": "Identity"}))[0] == 200


async def test_a_body_that_ends_early_or_is_framed_wrongly(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    async with connect(client.port) as raw:
        await raw.send(post(None, "Transfer-Encoding: chunked"))
        await asyncio.sleep(0.05)
        await raw.send(b"nonsense\r\n{}\r\n")
        reply = await raw.reply()
        assert reply.status == 400
        assert reply.headers["X-Request-Id"]
        assert reply.error["type"] == "invalid_request_error"
        await raw.rest()
    async with connect(client.port) as raw:
        await raw.send(post(None, "Content-Length: 50") + b'{"input"')
        raw.writer.write_eof()
        await raw.rest()
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# 429


@pytest.fixture
async def full(serve: Serve) -> AsyncIterator[tuple[Client, FakeModel]]:
    """A server whose device is held by its gate, and whose queue of two is full."""
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake, max_queue_size=2, max_inputs_per_request=2)
    scheduler = client.app[SCHEDULER]
    tasks = [asyncio.create_task(client.embed(GOOD))]
    assert fake.gate is not None
    try:
        await until(lambda: scheduler._worker and scheduler._worker.busy_seconds())
        tasks.append(asyncio.create_task(client.embed({"input": ["b", "c"]})))
        await until(lambda: scheduler.queue_depth == 2)
        yield client, fake
    finally:
        fake.gate.set()
    assert [status for status, _ in await asyncio.gather(*tasks)] == [200, 200]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/embeddings/preview"])
async def test_429_at_once_when_the_queue_is_full(full: tuple[Client, FakeModel], path: str) -> None:
    client, _ = full
    # The device stands still until the end: whoever waits for it, waits for good.
    async with (
        asyncio.timeout(30),
        client.session.post(path, json={"input": {"image": "http://127.0.0.1:9/not-fetched"}}) as reply,
    ):
        await check(reply, 429, "rate_limit_error", "overloaded")
        assert whole_seconds(reply) >= 1


async def test_partial_does_not_hide_an_overload(full: tuple[Client, FakeModel]) -> None:
    client, _ = full
    assert (await client.embed({"input": ["a"], "partial": True}))[0] == 429


async def test_retry_after_follows_from_the_backlog(serve: Serve) -> None:
    fake = FakeModel(seconds_per_batch=0.5)
    client = await serve(fake, max_queue_size=8, max_inputs_per_request=8, max_batch_size=1)
    assert (await client.embed(GOOD))[0] == 200
    fake.seconds_per_batch, fake.gate = 0.0, threading.Event()
    try:
        waiting = asyncio.create_task(client.embed({"input": [f"text {number}" for number in range(8)]}))
        await until(lambda: client.app[SCHEDULER].queue_depth == 7)
        async with client.session.post("/v1/embeddings", json={"input": ["a", "b"]}) as reply:
            assert reply.status == 429
            # 7 wait, at 2 a second, or less on a machine that is busy.
            assert 4 <= whole_seconds(reply) <= 100
    finally:
        fake.gate.set()
    assert (await waiting)[0] == 200


# 503


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/embeddings/preview"])
async def test_503_while_loading(serve: Serve, path: str) -> None:
    release = threading.Event()
    try:
        client = await serve(lambda: release.wait() and FakeModel(), wait=False)
        async with client.session.post(path, json=GOOD) as reply:
            await check(reply, 503, "service_unavailable", "loading")
            whole_seconds(reply)
        async with connect(client.port) as raw:
            await raw.send(post(None, "Content-Length: 20", "Expect: 100-continue", path=path))
            assert (await raw.reply()).status == 503
    finally:
        release.set()
    await until(lambda: client.app[SCHEDULER].state is State.READY)
    assert (await client.embed(GOOD))[0] == 200


async def test_503_while_draining(client: Client) -> None:
    client.app[LIFECYCLE].draining = True
    client.app[SCHEDULER].drain()
    async with client.session.post("/v1/embeddings", json={"input": "a", "partial": True}) as reply:
        await check(reply, 503, "service_unavailable", "draining")
        whole_seconds(reply)
        assert reply.headers["Connection"] == "close"


async def test_503_when_the_device_is_lost(serve: Serve) -> None:
    client = await serve(FakeModel(lose_after=1, seconds_per_batch=0.1), max_batch_size=1, request_timeout_s=3600)
    tasks = [asyncio.create_task(client.session.post("/v1/embeddings", json=GOOD)) for _ in range(5)]
    for reply in await asyncio.gather(*tasks):
        async with reply:
            message = await check(reply, 503, "service_unavailable", "worker_died")
            whole_seconds(reply)
            assert "CUDA" not in message
    async with client.session.post("/v1/embeddings", json=GOOD) as reply:
        await check(reply, 503, "service_unavailable", "worker_died")


# 504


async def test_504_when_the_device_is_not_free_in_time(serve: Serve, clock: Clock) -> None:
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake, request_timeout_s=60)
    assert fake.gate is not None
    running = asyncio.create_task(client.embed(GOOD))
    try:
        await until(lambda: client.app[SCHEDULER]._worker and client.app[SCHEDULER]._worker.busy_seconds())
        for headers, seconds in (({}, 60), ({"X-Request-Timeout": "40"}, 40), ({"X-Request-Timeout": "9999.5"}, 60)):
            asked = asyncio.create_task(client.session.post("/v1/embeddings", json={"input": ["b", "c"]}, headers=headers))
            await until(lambda: client.app[SCHEDULER].queue_depth == 2)
            clock.advance(seconds - 10)
            assert (await client.get("/health"))[1]["queue_depth"] == 2
            clock.advance(10)
            async with await asked as reply:
                await check(reply, 504, "timeout_error")
            assert client.app[SCHEDULER].queue_depth == 0
    finally:
        fake.gate.set()
    # What the device has taken is answered, late or not.
    assert (await running)[0] == 200
    assert fake.embedded == 1


async def test_504_while_an_image_is_fetched(serve: Serve, clock: Clock) -> None:
    async with image_host(cat=png(picture())) as host:
        host.hold = asyncio.Event()
        client = await serve(image_url_allowed_hosts=frozenset({host.host}), image_fetch_timeout_s=60)
        body = {"input": {"image": host.url("/cat.png")}, "partial": True}
        for path in ("/v1/embeddings", "/v1/embeddings/preview"):
            host.asked.clear()
            asked = asyncio.create_task(client.session.post(path, json=body, headers={"X-Request-Timeout": "40"}))
            await until(lambda: host.asked)
            clock.advance(41)
            async with await asked as reply:
                await check(reply, 504, "timeout_error")
        assert client.app[SCHEDULER].queue_depth == 0
        host.hold.set()


@pytest.mark.parametrize("value", ["", "0", "0.0", "-1", "nan", "inf", "1e3", "1s", "1,5", "٣", "1_0", "1 2", "9" * 400])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/embeddings/preview"])
async def test_a_timeout_that_is_none(client: Client, value: str, path: str) -> None:
    async with client.session.post(path, json={"input": "a", "partial": True}, headers={"X-Request-Timeout": value}) as reply:
        await check(reply, 400, "invalid_request_error", None, "X-Request-Timeout")


@pytest.mark.parametrize("value", ["30", "22.5", "000030.0", "99999999"])
async def test_a_timeout_that_is_one(client: Client, value: str) -> None:
    assert (await client.embed(GOOD, headers={"X-Request-Timeout": value}))[0] == 200


async def test_a_timeout_below_a_second_is_one(client: Client) -> None:
    assert (await client.embed(GOOD, headers={"X-Request-Timeout": "0.5"}))[0] in (200, 504)  # which, the machine says


# 500


@pytest.mark.parametrize("partial", [False, True])
async def test_500_says_nothing_and_the_log_everything(serve: Serve, caplog: pytest.LogCaptureFixture, partial: bool) -> None:
    client = await serve(FakeModel(fail_text="poison"))
    body = {"input": ["poison"], "partial": partial}
    async with client.session.post("/v1/embeddings", json=body, headers={"X-Request-Id": "the-id"}) as reply:
        if partial:
            error = (await reply.json())["data"][0]["error"]
            assert (error["type"], error["code"]) == ("server_error", None)
            message = error["message"]
        else:
            message = await check(reply, 500, "server_error")
            assert reply.headers["X-Request-Id"] == "the-id"
    assert "breaks" not in message
    assert [record.levelno for record in records_of(caplog, "the-id") if record.exc_info] == [logging.ERROR]
    assert "this input breaks the model" in caplog.text
    assert "poison" not in caplog.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/embeddings/preview"])
async def test_500_for_a_fault_of_ours(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    fake = FakeModel()

    def broken(item: object) -> Any:
        raise ZeroDivisionError("secret words")

    monkeypatch.setattr(fake, "prepare", broken)
    client = await serve(fake)
    async with client.session.post(path, json={"input": ["a"] * 3}, headers={"X-Request-Id": "the-id"}) as reply:
        assert "secret" not in await check(reply, 500, "server_error")
    assert any(record.exc_info for record in records_of(caplog, "the-id"))
    assert "ZeroDivisionError: secret words" in caplog.text
    assert client.app[SCHEDULER].queue_depth == 0


async def test_no_message_repeats_what_was_sent(client: Client) -> None:
    needle = "N33dle"
    bodies: list[Any] = [
        {"input": "a", "model": needle},
        {"input": "a", "encoding_format": needle},
        {"input": {"image": f"{needle}!"}},
        {"input": {"image": f"ftp://{needle}/"}},
        {"input": {needle: 1}},
        {"input": {"type": needle, "text": "a"}},
        {"messages": [{"role": needle}]},
    ]
    for body in bodies:
        status, reply = await client.embed(body)
        assert status in (400, 404)
        assert needle not in str(reply)


async def test_the_connection_outlives_an_error_whose_body_has_arrived(client: Client) -> None:
    async with connect(client.port) as raw:
        for request, status in ((post(b"{}"), 400), (post(b"{}", path="/nothing"), 404), (post(b'{"input":"a"}'), 200)):
            await raw.send(request)
            assert (await raw.reply()).status == status
