"""Errors: exception class -> status, code and words, stated once. The form of a reply is a dialect's."""

from __future__ import annotations

from dataclasses import dataclass

from app.dialects.contract import Failure, InvalidRequest, ModelNotFound
from app.engine.memory import RequestTooLarge
from app.engine.preparation import Refused
from app.media.fetch import ImageUnavailable
from app.media.image import ImageInvalid
from models.base import InvalidInput, Refusal
from scheduler.errors import BatchFailed, DeadlineExceeded, Draining, NotReady, Overloaded, WorkerDied


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """A row of the error table. `reason` is its name in metrics, and in a Refusal. `message` None shows the error's own words:
    only for those that are written for clients."""

    status: int
    reason: str
    code: str | None = None
    message: str | None = None


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


INVALID = ErrorSpec(400, "invalid")
FAULT = ErrorSpec(500, "fault", message="something went wrong on our side; the server's log has it under the request id")
DEADLINE = ErrorSpec(504, "deadline")
DRAINING = ErrorSpec(503, "draining", "draining", "the server is stopping; try again later, or elsewhere")
WORKER_DIED = ErrorSpec(503, "worker_died", "worker_died", "the device has failed and the server is about to end")

# Looked up along the class hierarchy: the nearest class that has a row.
TABLE: dict[type[BaseException], ErrorSpec] = {
    InvalidRequest: INVALID,
    InvalidInput: INVALID,
    ImageInvalid: INVALID,
    ImageUnavailable: INVALID,
    BodyBroken: ErrorSpec(400, "invalid", message="the body is not a whole HTTP message body"),
    MalformedRequest: ErrorSpec(400, "invalid", message="the request is not valid HTTP"),
    Unauthorized: ErrorSpec(
        status=401,
        reason="unauthorized",
        code="invalid_api_key",
        message="the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
    ),
    ModelNotFound: ErrorSpec(404, "invalid", "model_not_found"),
    BodyTimeout: ErrorSpec(408, "timeout", message="the body did not arrive in time"),
    BodyTooLarge: ErrorSpec(413, "too_large"),
    RequestTooLarge: ErrorSpec(413, "too_large"),
    BodyCompressed: ErrorSpec(
        415, "invalid", message="compressed bodies are not accepted; send the body without Content-Encoding"
    ),
    Overloaded: ErrorSpec(429, "overloaded", "overloaded", "the server is busy; try again after the time in Retry-After"),
    NotReady: ErrorSpec(503, "loading", "loading", "the model is still loading; try again soon"),
    Draining: DRAINING,
    WorkerDied: WORKER_DIED,
    DeadlineExceeded: DEADLINE,
    BatchFailed: FAULT,
    Exception: FAULT,
}

# What a Refusal may be, by its reason.
REFUSALS = {spec.reason: spec for spec in (INVALID, DEADLINE, DRAINING, WORKER_DIED, FAULT)}


def spec_for(error: BaseException) -> ErrorSpec:
    """Looks up the row of an error, along its class hierarchy."""
    if isinstance(error, Refused):
        return REFUSALS[error.refusal.reason]
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def failure_of(error: BaseException | Refusal, spec: ErrorSpec | None = None) -> Failure:
    """Puts an error into the words that a client may read. `spec` is its row, if it is none of the table."""
    if isinstance(error, Refused):
        error = error.refusal
    if isinstance(error, Refusal):
        spec, own = REFUSALS[error.reason], error.message
    else:
        spec, own = spec or spec_for(error), str(error)
    retry_after = getattr(error, "retry_after", 1.0) if spec.status in (429, 503) else None
    return Failure(spec.status, spec.message or own, spec.code, getattr(error, "param", None), retry_after)
