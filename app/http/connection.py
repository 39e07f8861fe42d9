"""aiohttp's connection handler, with five of its habits changed.

- Malformed HTTP, which is answered before any middleware, gets a JSON error too, and no traceback in the log.
- A body whose framing breaks off raises in whoever reads it.
- What comes after the last reply of a connection is thrown away unparsed, but for the rest of a body of known length: to parse a
  million chunks takes half a second.
- A request's head has a time limit, from the connection's start, or from its first byte if the connection has served before.
- A reply counts as memory until its client has taken it, and has a time limit; a large one, a least speed.

It uses private names of aiohttp, so setup.cfg bounds its version; tests/app/http/test_aiohttp_privates.py says what each must do.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from app.dialects.dialect import Dialect
from app.engine.memory import MemoryBudget
from app.errors import MalformedRequest
from app.http.error_replies import error_reply

log = logging.getLogger(__name__)

# aiohttp's own names its version, and Python's.
SERVER = "qwen3-vl-embedding-server"
# Bytes that are read and parsed at a time: some 7 ms where a body comes in chunks of one byte. asyncio's own are four times that.
READ_BYTES = 1 << 16
# What a client takes of a reply in a second, at least, where it takes longer than the time for one: 2 megabits. A reply of 60 MB
# takes a slow line some minutes; a client that is gone, or plays dead, takes nothing.
REPLY_BYTES_PER_S = 1 << 18


def last_reply(error: BaseException, dialect: Dialect) -> web.Response:
    """Makes the reply to what no middleware sees; the connection ends with it."""
    reply = error_reply(error, dialect)
    reply.headers["X-Request-Id"] = uuid.uuid4().hex
    reply.force_close()
    return reply


class JsonRequestHandler(RequestHandler):
    """Handles one connection. `header_timeout_s` and `reply_timeout_s` are in seconds; `on_refused` is told of what no
    middleware sees: "malformed", "header_timeout" or "reply_timeout"."""

    __slots__ = (
        "_dialect",
        "_discards",
        "_head_timer",
        "_header_timeout_s",
        "_memory",
        "_on_refused",
        "_reply_timeout_s",
        "_reply_timer",
    )

    def __init__(
        self,
        manager: web.Server,
        *,
        header_timeout_s: float,
        reply_timeout_s: float,
        memory: MemoryBudget,
        dialect: Dialect,
        on_refused: Callable[[str], None],
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self._header_timeout_s = header_timeout_s
        self._reply_timeout_s = reply_timeout_s
        self._memory = memory
        self._dialect = dialect
        self._on_refused = on_refused
        self._head_timer: asyncio.TimerHandle | None = None
        self._reply_timer: asyncio.TimerHandle | None = None
        self._discards = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        if self._discards:
            return
        super().data_received(data)
        self._end_broken_body()
        if not self._awaits_head():
            self._stop_head_timer()
        elif data and self._head_timer is None:
            self._start_head_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_head_timer()
        self._stop_reply_timer()
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Makes the reply to what the parser refuses, or to what no middleware has caught."""
        malformed = status == 400
        if not malformed:
            log.error("unhandled error", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("a reply has begun already")
        reply = last_reply(MalformedRequest() if malformed else exc or RuntimeError(), self._dialect)
        if malformed:
            self._on_refused("malformed")
            log.info("%s - malformed HTTP %d", reply.headers["X-Request-Id"], reply.status)
        return reply

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Writes the reply. Middlewares let no HTTPException pass: one that comes here was raised before them."""
        if isinstance(resp, web.HTTPException):
            resp = last_reply(resp, self._dialect)
        resp.headers[hdrs.SERVER] = SERVER
        body = resp.body if isinstance(resp, web.Response) else None
        size = len(body) if isinstance(body, bytes) else 0
        self._start_reply_timer(size)
        try:
            # Twice: what its client has not taken yet the transport has copied.
            with self._memory.occupied(2 * size):
                finished = await super().finish_response(request, resp, start_time)
        finally:
            self._stop_reply_timer()
        # A body of a known length costs nothing to parse, and its end is the connection's.
        self._discards = not resp.keep_alive and request.content_length is None
        return finished

    def _end_broken_body(self) -> None:
        """Tells the reader of a body that the parser has failed within it: the C parser tells nobody."""
        if not self._messages or not isinstance(self._messages[-1][0], _ErrInfo):
            return
        if len(self._messages) > 1:
            body = self._messages[-2][1]
        elif self._current_request is not None:
            body = self._current_request.content
        else:
            return
        if not body.is_eof():
            body.set_exception(web.RequestPayloadError("the body's framing is broken"))
            body.feed_eof()

    def _awaits_head(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._awaits_head():
            self._on_refused("header_timeout")
            self.force_close()

    def _start_head_timer(self) -> None:
        self._head_timer = self._loop.call_later(self._header_timeout_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_reply_timer(self, unsent: int) -> None:
        self._reply_timer = self._loop.call_later(self._reply_timeout_s, self._look_at_reply, unsent)

    def _look_at_reply(self, unsent: int) -> None:
        """Ends the connection if its client takes the reply too slowly. `unsent` bytes were left when the timer was started;
        enough of them gone since then prolong it."""
        if not isinstance(self.transport, asyncio.Transport):
            return
        left = self.transport.get_write_buffer_size()
        if unsent - left >= self._reply_timeout_s * REPLY_BYTES_PER_S:
            self._start_reply_timer(left)
            return
        self._on_refused("reply_timeout")
        self.transport.abort()

    def _stop_reply_timer(self) -> None:
        if self._reply_timer is not None:
            self._reply_timer.cancel()
            self._reply_timer = None
