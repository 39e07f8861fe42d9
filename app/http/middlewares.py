"""What surrounds every request: its id, its errors' form, its log line and its count; and CORS."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from app.http.error_replies import error_reply, reply_spec
from app.http.keys import DIALECT, LIFECYCLE, LOG, METRICS, ROUTES, SETTINGS, RequestLog
from app.logs import REQUEST_ID

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_EXPOSED = "X-Request-Id, X-Model-Fingerprint, Server-Timing, Retry-After"


def request_id(given: str | None) -> str:
    """Returns the caller's id, if it is 1 to 128 visible ASCII characters, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives every reply its id and its log line, and every exception the form that its dialect has for it."""
    started = time.monotonic()
    lifecycle = request.app[LIFECYCLE]
    entry = request[LOG] = RequestLog()
    own_id = request_id(request.headers.get("X-Request-Id"))
    REQUEST_ID.set(own_id)
    resource = request.match_info.route.resource
    path = resource.canonical if resource else "-"
    row = request.app[ROUTES].get(path)
    try:
        async with lifecycle.request():
            reply = await handler(request)
    except asyncio.CancelledError:
        log.info("%s %s client gone %.1fms", request.method, path, (time.monotonic() - started) * 1000)
        raise
    except Exception as error:
        spec = reply_spec(error)
        if spec.status >= 500 and spec.reason == "fault":
            log.error("%s %s failed", request.method, path, exc_info=error)
        request.app[METRICS].rejected.labels(spec.reason).inc()
        reply = error_reply(error, row.dialect if row else request.app[DIALECT])
        if not request.content.is_eof() or request.content.exception():
            # What is left of the body is not worth reading.
            reply.force_close()
    elapsed = time.monotonic() - started
    reply.headers["X-Request-Id"] = own_id
    if entry.timings:
        reply.headers["Server-Timing"] = ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in entry.timings.items())
    if lifecycle.draining:
        reply.force_close()
    if not (row and row.public):
        metrics = request.app[METRICS]
        metrics.requests.labels(str(reply.status)).inc()
        metrics.request_seconds.observe(elapsed)
        log.info(
            "%s %s %d key=%s inputs=%d tokens=%d %.1fms",
            request.method,
            path,
            reply.status,
            entry.key_name,
            entry.inputs,
            entry.tokens,
            elapsed * 1000,
        )
    return reply


@web.middleware
async def cors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Lets pages of CORS_ORIGINS use the service, its errors included. A preflight carries no key and needs none."""
    allowed = request.app[SETTINGS].cors_origins
    origin = request.headers.get(hdrs.ORIGIN, "")
    if not origin or not ("*" in allowed or origin.lower() in allowed):
        return await handler(request)
    if request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
        reply: web.StreamResponse = web.Response(status=204)
        reply.headers["X-Request-Id"] = request_id(request.headers.get("X-Request-Id"))
        reply.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST"
        reply.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = "Authorization, Content-Type, X-Request-Id, X-Request-Timeout"
        reply.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = "600"
    else:
        reply = await handler(request)
    reply.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*" if "*" in allowed else origin
    reply.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
    reply.headers.add(hdrs.VARY, "Origin")
    return reply
