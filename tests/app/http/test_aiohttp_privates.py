"""The private names of aiohttp that app.http.connection stands on: one test for each, which says what it must do.

If a new version of aiohttp fails one of these, read its web_protocol.py for what took the name's place, mend
app/http/connection.py, and raise the bound in setup.cfg with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web, web_protocol
from aiohttp.web_protocol import RequestHandler

from tests.support.hosts import RawConnection, connect


class Seen(RequestHandler):
    """aiohttp's own handler, of which a test keeps the last one made."""

    last: Seen

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        Seen.last = self


@pytest.fixture
def inside() -> Iterator[asyncio.Event]:
    """Set once a handler runs."""
    yield asyncio.Event()


@asynccontextmanager
async def connection(inside: asyncio.Event) -> AsyncIterator[RawConnection]:
    """A connection to a server whose handler reads its body until it breaks."""

    async def handle(request: web.BaseRequest) -> web.Response:
        inside.set()
        await request.read()
        return web.Response()

    server = web.Server(handle, access_log=None)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Seen(server, loop=loop), "127.0.0.1", 0)
    try:
        async with connect(listener.sockets[0].getsockname()[1]) as raw:
            while not hasattr(Seen, "last") or Seen.last.transport is None:
                await asyncio.sleep(0.005)
            yield raw
    finally:
        listener.close()
        await server.shutdown(0.1)
        del Seen.last


HEAD = b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_waiter_is_pending_while_a_head_is_awaited(inside: asyncio.Event) -> None:
    async with connection(inside) as raw:
        while Seen.last._waiter is None:
            await asyncio.sleep(0.005)
        assert not Seen.last._waiter.done()
        await raw.send(HEAD)
        await inside.wait()
        assert Seen.last._waiter is None or Seen.last._waiter.done()


async def test_current_request_is_the_one_that_is_handled(inside: asyncio.Event) -> None:
    async with connection(inside) as raw:
        assert Seen.last._current_request is None
        await raw.send(HEAD)
        await inside.wait()
        assert isinstance(Seen.last._current_request, web.BaseRequest)


async def test_messages_end_with_err_info_where_a_body_breaks(inside: asyncio.Event) -> None:
    """Pairs of a head, or an _ErrInfo, and its payload; a broken body adds the pair that the handler answers with 400."""
    async with connection(inside) as raw:
        await raw.send(HEAD)
        await inside.wait()
        await raw.send(b"no chunk\r\n")
        while not Seen.last._messages:
            await asyncio.sleep(0.005)
        message, _ = Seen.last._messages[-1]
        assert isinstance(message, web_protocol._ErrInfo)
        assert Seen.last._current_request is not None
        Seen.last._current_request.content.feed_eof()


async def test_loop_is_the_running_one(inside: asyncio.Event) -> None:
    async with connection(inside):
        assert Seen.last._loop is asyncio.get_running_loop()


def test_methods_that_are_overridden_have_their_signatures() -> None:
    names = {name: getattr(RequestHandler, name).__code__.co_varnames for name in ("handle_error", "finish_response")}
    assert names["handle_error"][:5] == ("self", "request", "status", "exc", "message")
    assert names["finish_response"][:4] == ("self", "request", "resp", "start_time")


def test_transports_read_as_much_as_max_size() -> None:
    """asyncio's, not aiohttp's: app.http.connection makes its reads smaller."""
    from asyncio.selector_events import _SelectorSocketTransport

    assert isinstance(_SelectorSocketTransport.max_size, int)
