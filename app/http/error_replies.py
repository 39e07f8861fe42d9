"""Error replies: any exception -> the reply that tells a client of it, in a dialect's form and with the headers that belong to
it."""

from __future__ import annotations

import math

from aiohttp import web

from app.dialects.dialect import Dialect
from app.errors import ErrorSpec, failure_of, spec_for

# aiohttp's own refusals. Their reason phrases are fixed words, safe to show.
HTTP_ERRORS = {
    404: ErrorSpec(
        status=404,
        reason="http",
        code="not_found",
        message="there is nothing at this path; GET /openapi.json lists what there is; an OpenAI client's base URL ends in /v1",
    ),
    405: ErrorSpec(405, "http", message="this path does not take this method; the header Allow names those that it takes"),
}


def reply_spec(error: BaseException) -> ErrorSpec:
    """Looks up status, code and words of an exception, aiohttp's own among them."""
    if not isinstance(error, web.HTTPException):
        return spec_for(error)
    return HTTP_ERRORS.get(error.status) or ErrorSpec(error.status, "http", message=f"{error.status}: {error.reason}")


def error_reply(error: BaseException, dialect: Dialect) -> web.Response:
    """Makes the reply that tells a client of an error."""
    failure = failure_of(error, reply_spec(error))
    reply = web.Response(status=failure.status, body=dialect.error(failure), content_type="application/json")
    if failure.status == 401:
        reply.headers["WWW-Authenticate"] = "Bearer"
    if failure.retry_after is not None:
        reply.headers["Retry-After"] = str(max(1, math.ceil(failure.retry_after)))
    if isinstance(error, web.HTTPMethodNotAllowed):
        reply.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    return reply
