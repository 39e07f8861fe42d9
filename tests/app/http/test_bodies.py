"""Reading bodies where a socket cannot reach: errors and bytes in an order of our own."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request

from app.engine.memory import MemoryBudget, MemoryShare
from app.errors import BodyBroken, BodyCompressed, BodyTimeout, BodyTooLarge
from app.http.bodies import read_body

SHARE = MemoryShare(MemoryBudget(1 << 20, lambda: 1.0))


@pytest.fixture
async def stream() -> StreamReader:
    loop = asyncio.get_running_loop()
    protocol = BaseProtocol(loop)
    protocol.connection_made(asyncio.Transport())
    return StreamReader(protocol, 2**16, loop=loop)


def request(stream: StreamReader, **headers: str) -> web.Request:
    return make_mocked_request(
        "POST", "/", headers={key.replace("_", "-"): value for key, value in headers.items()}, payload=stream
    )


async def test_chunks_are_joined(stream: StreamReader) -> None:
    for chunk in (b"a", b"", b"bc"):
        stream.feed_data(chunk)
    stream.feed_eof()
    assert await read_body(request(stream), 3, 1, SHARE) == b"abc"


async def test_the_limit_is_inclusive(stream: StreamReader) -> None:
    stream.feed_data(b"abcd")
    with pytest.raises(BodyTooLarge, match="3 bytes"):
        await read_body(request(stream), 3, 1, SHARE)


async def test_an_announced_length_is_believed_before_anything_is_read(stream: StreamReader) -> None:
    with pytest.raises(BodyTooLarge):
        await read_body(request(stream, Content_Length="4"), 3, 1, SHARE)


async def test_compression_is_refused_before_a_length(stream: StreamReader) -> None:
    with pytest.raises(BodyCompressed):
        await read_body(request(stream, Content_Length="4", Content_Encoding="gzip"), 3, 1, SHARE)


@pytest.mark.parametrize("codings", ["gzip, chunked", "Gzip,chunked", "deflate"])
async def test_compression_as_a_transfer_coding_is_refused(stream: StreamReader, codings: str) -> None:
    with pytest.raises(BodyCompressed):
        await read_body(request(stream, Transfer_Encoding=codings), 3, 1, SHARE)


@pytest.mark.parametrize("header", ["Content_Encoding", "Transfer_Encoding"])
async def test_identity_is_no_compression(stream: StreamReader, header: str) -> None:
    stream.feed_data(b"abc")
    stream.feed_eof()
    assert await read_body(request(stream, **{header: "identity, , IDENTITY"}), 3, 1, SHARE) == b"abc"


async def test_the_time_runs_from_the_start(stream: StreamReader) -> None:
    async def drip() -> None:
        while True:
            stream.feed_data(b" ")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    with pytest.raises(BodyTimeout):
        await read_body(request(stream), 1000, 0.1, SHARE)
    dripping.cancel()


@pytest.mark.parametrize("error", [web.RequestPayloadError("words"), ConnectionResetError("words"), BrokenPipeError()])
async def test_a_body_that_breaks_off(stream: StreamReader, error: Exception) -> None:
    stream.feed_data(b"a")
    asyncio.get_running_loop().call_later(0.01, stream.set_exception, error)
    with pytest.raises(BodyBroken) as caught:
        await read_body(request(stream), 3, 1, SHARE)
    assert caught.value.__cause__ is None
