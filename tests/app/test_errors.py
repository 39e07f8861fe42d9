"""The error table itself, and the replies that follow from it."""

from __future__ import annotations

import json
import re

import orjson
import pytest
from aiohttp import web

from app.dialects.contract import Failure, InvalidRequest, ModelNotFound
from app.dialects.openai import OPENAI, error_detail
from app.engine.preparation import Refused
from app.errors import REFUSALS, TABLE, BodyTooLarge, failure_of
from app.http import error_replies
from app.http.error_replies import reply_spec
from app.media.image import ImageInvalid
from models.base import InputTooLong, Refusal
from scheduler.errors import BatchFailed, DeadlineExceeded, Draining, NotReady, Overloaded, WorkerDied

# The contract: status -> types and codes.
CONTRACT = {
    400: {("invalid_request_error", None)},
    401: {("authentication_error", "invalid_api_key")},
    404: {("invalid_request_error", "model_not_found")},
    408: {("timeout_error", None)},
    413: {("invalid_request_error", None)},
    415: {("invalid_request_error", None)},
    429: {("rate_limit_error", "overloaded")},
    500: {("server_error", None)},
    503: {("service_unavailable", "loading"), ("service_unavailable", "draining"), ("service_unavailable", "worker_died")},
    504: {("timeout_error", None)},
}
# Their words are written for clients; what any other exception says stays here.
SPEAKS_FOR_ITSELF = {
    "InvalidRequest",
    "InvalidInput",
    "ImageInvalid",
    "ImageUnavailable",
    "ModelNotFound",
    "BodyTooLarge",
    "RequestTooLarge",
    "DeadlineExceeded",
}


def error_reply(error: BaseException) -> web.Response:
    return error_replies.error_reply(error, OPENAI)


def openai_type(status: int) -> str:
    return error_detail(Failure(status, "m")).type


def test_error_table_is_that_of_the_contract() -> None:
    found: dict[int, set[tuple[str, str | None]]] = {}
    for row in TABLE.values():
        found.setdefault(row.status, set()).add((openai_type(row.status), row.code))
    assert found == CONTRACT


def test_error_table_has_what_a_refusal_says() -> None:
    """A row of a partial result has the status, the words and the reason of the error that it stands for."""
    for error in (InputTooLong("m"), DeadlineExceeded("m"), Draining("m"), WorkerDied("m"), BatchFailed("m")):
        reason = getattr(error, "reason", "invalid")
        assert REFUSALS[reason] == reply_spec(error) and REFUSALS[reason].reason == reason
        assert failure_of(Refusal("m", reason=reason)) == failure_of(error)


def test_error_only_words_for_clients_are_shown() -> None:
    assert {kind.__name__ for kind, row in TABLE.items() if row.message is None} == SPEAKS_FOR_ITSELF


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputTooLong("too long"), 400),
        (ImageInvalid("no image"), 400),
        (BatchFailed("words"), 500),
        (Refused(Refusal("no image", "input[0]")), 400),
        (Refused(Refusal("words", "input[0]", "fault")), 500),
        (KeyError("words"), 500),
        (MemoryError("words"), 500),
        (TimeoutError("words"), 500),
        (web.HTTPNotFound(), 404),
        (web.HTTPMethodNotAllowed("GET", ["POST"]), 405),
        (web.HTTPExpectationFailed(text="words"), 417),
        (web.HTTPInternalServerError(text="words"), 500),
        (web.HTTPConflict(text="words"), 409),
    ],
)
def test_error_row_is_that_of_the_nearest_class(error: Exception, status: int) -> None:
    row = reply_spec(error)
    assert row.status == status
    assert openai_type(row.status) == ("invalid_request_error" if status < 500 else "server_error")
    assert "words" not in orjson.loads(error_reply(error).body)["error"]["message"]


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (InvalidRequest("m", "input[3].image"), "input[3].image"),
        (InvalidRequest("m"), None),
        (ModelNotFound("m"), "model"),
        (Refused(Refusal("m", "input[1]")), "input[1]"),
    ],
)
def test_error_has_its_place(error: Exception, param: str | None) -> None:
    detail = error_detail(failure_of(error))
    assert (detail.message, detail.type, detail.param) == ("m", "invalid_request_error", param)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Overloaded("full", 0.0), "1"),
        (Overloaded("full", 0.001), "1"),
        (Overloaded("full", 1.2), "2"),
        (Overloaded("full", 86_400.0), "86400"),
        (NotReady("loading"), "1"),
        (Draining("draining"), "1"),
        (WorkerDied("died"), "1"),
    ],
)
def test_retry_after_is_a_whole_number_of_seconds(error: Exception, seconds: str) -> None:
    assert error_reply(error).headers["Retry-After"] == seconds


def test_error_headers_that_belong_to_a_status() -> None:
    assert "Retry-After" not in error_reply(BodyTooLarge("m")).headers
    assert error_reply(web.HTTPMethodNotAllowed("PUT", {"POST", "GET"})).headers["Allow"] == "GET, POST"
    reply = error_reply(ValueError("a\nb"))
    assert reply.content_type == "application/json"
    assert isinstance(reply.body, bytes)
    assert set(json.loads(reply.body)["error"]) == {"message", "type", "param", "code"}


def test_error_messages_are_one_clear_line() -> None:
    for row in TABLE.values():
        if row.message is not None:
            assert re.fullmatch(r"[a-z][^\n]+[^.\n]", row.message)
    assert all(row.reason for row in TABLE.values())
