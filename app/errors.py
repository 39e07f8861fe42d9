"""Errors: exception class -> status, type and code, stated once, and the one form that every error reply has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from app.dialects import InvalidRequest, ModelNotFound
from app.image_decode import ImageInvalid
from app.image_fetch import ImageUnavailable
from app.memory import RequestTooLarge
from models.base import InvalidInput
from scheduler.errors import BatchFailed, DeadlineExceeded, Draining, NotReady, Overloaded, WorkerDied


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the error table. `message` None shows the exception's own: only for those whose words are written for clients."""

    status: int
    type: str
    code: str | None = None
    message: str | None = None
    reason: str = "other"


class Unauthorized(Exception):
    """The key is missing or wrong."""


class BodyTooLarge(Exception):
    """The body has more bytes than the limit."""


class BodyCompressed(Exception):
    """The body has a Content-Encoding."""


class BodyTimeout(Exception):
    """The body did not arrive in time."""


class BodyBroken(Exception):
    """The body's framing is not HTTP, or it ended early."""


class MalformedRequest(Exception):
    """The request's head is not HTTP."""


class InputError(Exception):
    """An error with the place of the input that it belongs to, such as "input[3].image". The cause says what is wrong."""

    def __init__(self, cause: Exception, param: str | None) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.param = param


_INVALID = "invalid_request_error"
_UNAVAILABLE = "service_unavailable"
_FAULT = Row(500, "server_error", None, "something went wrong on our side; the server's log has it under the request id", "fault")

# Looked up along the class hierarchy: the nearest class that has a row.
TABLE: dict[type[BaseException], Row] = {
    InvalidRequest: Row(400, _INVALID, reason="invalid"),
    InvalidInput: Row(400, _INVALID, reason="invalid"),
    ImageInvalid: Row(400, _INVALID, reason="invalid"),
    ImageUnavailable: Row(400, _INVALID, reason="invalid"),
    BodyBroken: Row(400, _INVALID, message="the body is not a whole HTTP message body", reason="invalid"),
    MalformedRequest: Row(400, _INVALID, message="the request is not valid HTTP", reason="invalid"),
    Unauthorized: Row(
        status=401,
        type="authentication_error",
        code="invalid_api_key",
        message="the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
        reason="unauthorized",
    ),
    ModelNotFound: Row(404, _INVALID, "model_not_found", reason="invalid"),
    BodyTimeout: Row(408, "timeout_error", message="the body did not arrive in time", reason="timeout"),
    BodyTooLarge: Row(413, _INVALID, reason="too_large"),
    RequestTooLarge: Row(413, _INVALID, reason="too_large"),
    BodyCompressed: Row(
        status=415,
        type=_INVALID,
        message="compressed bodies are not accepted; send the body without Content-Encoding",
        reason="invalid",
    ),
    Overloaded: Row(
        status=429,
        type="rate_limit_error",
        code="overloaded",
        message="the server is busy; try again after the time in Retry-After",
        reason="overloaded",
    ),
    NotReady: Row(503, _UNAVAILABLE, "loading", "the model is still loading; try again soon", "loading"),
    Draining: Row(503, _UNAVAILABLE, "draining", "the server is stopping; try again later, or elsewhere", "draining"),
    WorkerDied: Row(503, _UNAVAILABLE, "worker_died", "the device has failed and the server is about to end", "worker_died"),
    DeadlineExceeded: Row(504, "timeout_error", reason="deadline"),
    BatchFailed: _FAULT,
    Exception: _FAULT,
}

# aiohttp's own refusals. Their reason phrases are fixed words, safe to show.
_HTTP = {
    404: Row(
        status=404,
        type=_INVALID,
        code="not_found",
        message="there is nothing at this path; GET /openapi.json lists what there is; an OpenAI client's base URL ends in /v1",
    ),
    405: Row(405, _INVALID, message="this path does not take this method; the header Allow names those that it takes"),
    413: Row(413, _INVALID),
    417: Row(417, _INVALID),
}


def unwrap(error: BaseException) -> tuple[BaseException, str | None]:
    """The error itself, and the place in the body that it names."""
    if isinstance(error, InputError):
        return error.cause, getattr(error.cause, "param", None) or error.param
    return error, getattr(error, "param", None)


def row_for(error: BaseException) -> Row:
    """The table's row of an error."""
    if isinstance(error, web.HTTPException):
        message = f"{error.status}: {error.reason}"
        known = _HTTP.get(error.status, Row(error.status, _INVALID if error.status < 500 else "server_error"))
        return Row(known.status, known.type, known.code, known.message or message, "http")
    cause, _ = unwrap(error)
    return next(TABLE[kind] for kind in type(cause).__mro__ if kind in TABLE)


def error_object(error: BaseException) -> dict[str, Any]:
    """`{"message", "type", "param", "code"}`."""
    row, (cause, param) = row_for(error), unwrap(error)
    return {"message": row.message or str(cause), "type": row.type, "param": param, "code": row.code}


def error_reply(error: BaseException) -> web.Response:
    """The reply that tells a client of an error."""
    row = row_for(error)
    cause, _ = unwrap(error)
    reply = web.Response(status=row.status, body=orjson.dumps({"error": error_object(error)}), content_type="application/json")
    if row.status == 401:
        reply.headers["WWW-Authenticate"] = "Bearer"
    if row.status in (429, 503):
        reply.headers["Retry-After"] = str(max(1, math.ceil(getattr(cause, "retry_after", 1.0))))
    if isinstance(error, web.HTTPMethodNotAllowed):
        reply.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    return reply
