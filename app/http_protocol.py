"""aiohttp's connection handler, with two habits of its own changed.

What is no HTTP is answered before any middleware: here in the JSON form too, and without a traceback in the log. And a
connection that has begun a request's head must finish it in time.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from app.errors import MalformedRequest, error_reply

log = logging.getLogger(__name__)


class JsonRequestHandler(RequestHandler):
    """One connection. `header_timeout_s` is in seconds, from a head's first byte to its last."""

    __slots__ = ("_head_timer", "_header_timeout_s")

    def __init__(self, manager: web.Server, *, header_timeout_s: float, **options: Any) -> None:
        super().__init__(manager, **options)
        self._header_timeout_s = header_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._awaits_head():
            self._stop_head_timer()
        elif data and self._head_timer is None:
            self._head_timer = self._loop.call_later(self._header_timeout_s, self._head_is_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The reply to what the parser refuses, or to what no middleware has caught."""
        malformed = status == 400
        if not malformed:
            log.error("unhandled error", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("a reply has begun already")
        reply = error_reply(MalformedRequest() if malformed else exc or RuntimeError())
        reply.headers["X-Request-Id"] = uuid.uuid4().hex
        reply.force_close()
        return reply

    def _awaits_head(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._awaits_head():
            self.force_close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
