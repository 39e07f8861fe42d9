"""Error replies: any exception -> the JSON reply that tells a client of it, with the headers that belong to it."""

from __future__ import annotations

import math

import orjson
from aiohttp import web

from app.errors import INVALID, ErrorSpec, object_for, spec_for, unwrap

# aiohttp's own refusals. Their reason phrases are fixed words, safe to show.
HTTP_ERRORS = {
    404: ErrorSpec(
        status=404,
        type=INVALID,
        code="not_found",
        message="there is nothing at this path; GET /openapi.json lists what there is; an OpenAI client's base URL ends in /v1",
    ),
    405: ErrorSpec(405, INVALID, message="this path does not take this method; the header Allow names those that it takes"),
    413: ErrorSpec(413, INVALID),
    417: ErrorSpec(417, INVALID),
}


def reply_spec(error: BaseException) -> ErrorSpec:
    """Looks up status, type and code of an exception, aiohttp's own among them."""
    if not isinstance(error, web.HTTPException):
        return spec_for(error)
    known = HTTP_ERRORS.get(error.status, ErrorSpec(error.status, INVALID if error.status < 500 else "server_error"))
    return ErrorSpec(known.status, known.type, known.code, known.message or f"{error.status}: {error.reason}", "http")


def error_reply(error: BaseException) -> web.Response:
    """The reply that tells a client of an error."""
    spec = reply_spec(error)
    cause, _ = unwrap(error)
    reply = web.Response(
        status=spec.status, body=orjson.dumps({"error": object_for(error, spec)}), content_type="application/json"
    )
    if spec.status == 401:
        reply.headers["WWW-Authenticate"] = "Bearer"
    if spec.status in (429, 503):
        reply.headers["Retry-After"] = str(max(1, math.ceil(getattr(cause, "retry_after", 1.0))))
    if isinstance(error, web.HTTPMethodNotAllowed):
        reply.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    return reply
