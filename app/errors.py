"""Errors: exception class -> status, type and code, stated once, and the one form that every error reply has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.dialects.request import InvalidRequest, ModelNotFound
from app.engine.memory import RequestTooLarge
from app.media.fetch import ImageUnavailable
from app.media.image import ImageInvalid
from models.base import InvalidInput
from scheduler.errors import BatchFailed, DeadlineExceeded, Draining, NotReady, Overloaded, WorkerDied


@dataclass(frozen=True, slots=True)
class ErrorSpec:
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


INVALID = "invalid_request_error"
_UNAVAILABLE = "service_unavailable"
_FAULT = ErrorSpec(
    status=500,
    type="server_error",
    message="something went wrong on our side; the server's log has it under the request id",
    reason="fault",
)

# Looked up along the class hierarchy: the nearest class that has a row.
TABLE: dict[type[BaseException], ErrorSpec] = {
    InvalidRequest: ErrorSpec(400, INVALID, reason="invalid"),
    InvalidInput: ErrorSpec(400, INVALID, reason="invalid"),
    ImageInvalid: ErrorSpec(400, INVALID, reason="invalid"),
    ImageUnavailable: ErrorSpec(400, INVALID, reason="invalid"),
    BodyBroken: ErrorSpec(400, INVALID, message="the body is not a whole HTTP message body", reason="invalid"),
    MalformedRequest: ErrorSpec(400, INVALID, message="the request is not valid HTTP", reason="invalid"),
    Unauthorized: ErrorSpec(
        status=401,
        type="authentication_error",
        code="invalid_api_key",
        message="the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
        reason="unauthorized",
    ),
    ModelNotFound: ErrorSpec(404, INVALID, "model_not_found", reason="invalid"),
    BodyTimeout: ErrorSpec(408, "timeout_error", message="the body did not arrive in time", reason="timeout"),
    BodyTooLarge: ErrorSpec(413, INVALID, reason="too_large"),
    RequestTooLarge: ErrorSpec(413, INVALID, reason="too_large"),
    BodyCompressed: ErrorSpec(
        status=415,
        type=INVALID,
        message="compressed bodies are not accepted; send the body without Content-Encoding",
        reason="invalid",
    ),
    Overloaded: ErrorSpec(
        status=429,
        type="rate_limit_error",
        code="overloaded",
        message="the server is busy; try again after the time in Retry-After",
        reason="overloaded",
    ),
    NotReady: ErrorSpec(503, _UNAVAILABLE, "loading", "the model is still loading; try again soon", "loading"),
    Draining: ErrorSpec(503, _UNAVAILABLE, "draining", "the server is stopping; try again later, or elsewhere", "draining"),
    WorkerDied: ErrorSpec(
        503, _UNAVAILABLE, "worker_died", "the device has failed and the server is about to end", "worker_died"
    ),
    DeadlineExceeded: ErrorSpec(504, "timeout_error", reason="deadline"),
    BatchFailed: _FAULT,
    Exception: _FAULT,
}


def unwrap(error: BaseException) -> tuple[BaseException, str | None]:
    """The error itself, and the place in the body that it names."""
    if isinstance(error, InputError):
        return error.cause, getattr(error.cause, "param", None) or error.param
    return error, getattr(error, "param", None)


def spec_for(error: BaseException) -> ErrorSpec:
    """Looks up the table's row for an error, along its class hierarchy."""
    cause, _ = unwrap(error)
    return next(TABLE[kind] for kind in type(cause).__mro__ if kind in TABLE)


def error_object(error: BaseException) -> dict[str, Any]:
    """`{"message", "type", "param", "code"}`."""
    return object_for(error, spec_for(error))


def object_for(error: BaseException, spec: ErrorSpec) -> dict[str, Any]:
    """Builds the error object of an error under a given row."""
    cause, param = unwrap(error)
    return {"message": spec.message or str(cause), "type": spec.type, "param": param, "code": spec.code}
