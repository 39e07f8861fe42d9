"""The error table itself, and the replies that follow from it."""

from __future__ import annotations

import json
import re

import orjson
import pytest
from aiohttp import web

from app.dialects.request import InvalidRequest, ModelNotFound
from app.errors import TABLE, BodyTooLarge, ErrorSpec, InputError, error_object
from app.http.error_replies import error_reply, reply_spec
from app.media.image import ImageInvalid
from models.base import InputTooLong
from scheduler.errors import BatchFailed, Draining, NotReady, Overloaded, WorkerDied

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


def test_the_table_is_that_of_the_contract() -> None:
    found: dict[int, set[tuple[str, str | None]]] = {}
    for row in TABLE.values():
        found.setdefault(row.status, set()).add((row.type, row.code))
    assert found == CONTRACT


def test_only_words_for_clients_are_shown() -> None:
    assert {kind.__name__ for kind, row in TABLE.items() if row.message is None} == SPEAKS_FOR_ITSELF


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputTooLong("too long"), 400),
        (InputError(ImageInvalid("no image"), "input[0]"), 400),
        (InputError(BatchFailed("words"), "input[0]"), 500),
        (KeyError("words"), 500),
        (MemoryError("words"), 500),
        (TimeoutError("words"), 500),
        (web.HTTPNotFound(), 404),
        (web.HTTPMethodNotAllowed("GET", ["POST"]), 405),
        (web.HTTPExpectationFailed(text="words"), 417),
        (web.HTTPInternalServerError(text="words"), 500),
        (web.HTTPTooManyRequests(text="words"), 429),
    ],
)
def test_the_nearest_class_has_the_row(error: Exception, status: int) -> None:
    row = reply_spec(error)
    assert row.status == status
    assert row.type == ("invalid_request_error" if status < 500 else "server_error")
    assert "words" not in orjson.loads(error_reply(error).body)["error"]["message"]


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (InvalidRequest("m", "input[3].image"), "input[3].image"),
        (InvalidRequest("m"), None),
        (ModelNotFound("m"), "model"),
        (InputError(InputTooLong("m"), "input[1]"), "input[1]"),
        # What knows its own place keeps it.
        (InputError(InvalidRequest("m", "input[1].text"), "input[1]"), "input[1].text"),
        (InputError(InvalidRequest("m"), "input[1]"), "input[1]"),
    ],
)
def test_the_place_of_an_error(error: Exception, param: str | None) -> None:
    assert error_object(error) == {
        "message": "m",
        "type": "invalid_request_error",
        "param": param,
        "code": error_object(error)["code"],
    }


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
        (InputError(Overloaded("full", 3.5), "input"), "4"),
    ],
)
def test_retry_after_is_a_whole_number_of_seconds(error: Exception, seconds: str) -> None:
    assert error_reply(error).headers["Retry-After"] == seconds


def test_headers_that_belong_to_a_status() -> None:
    assert "Retry-After" not in error_reply(BodyTooLarge("m")).headers
    assert error_reply(web.HTTPMethodNotAllowed("PUT", {"POST", "GET"})).headers["Allow"] == "GET, POST"
    reply = error_reply(ValueError("a\nb"))
    assert reply.content_type == "application/json"
    assert isinstance(reply.body, bytes)
    assert set(json.loads(reply.body)["error"]) == {"message", "type", "param", "code"}


def test_messages_are_one_clear_line() -> None:
    for row in TABLE.values():
        if row.message is not None:
            assert re.fullmatch(r"[a-z][^\n]+[^.\n]", row.message)
    assert len({row.reason for row in TABLE.values()} & {"", ErrorSpec(0, "").reason}) == 0
