"""app.logs: every line has its time with an offset, and the id of its request, as text and as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.engine.threads import run_on
from app.logs import FORMATTERS, REQUEST_ID, RequestIdFilter
from tests.conftest import Serve, records_of
from tests.support.fakes import FakeModel

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"


def line(form: str, request_id: str, message: str = "words of %s", error: BaseException | None = None) -> str:
    token = REQUEST_ID.set(request_id)
    try:
        record = logging.LogRecord(
            "app.x", logging.WARNING, __file__, 1, message, ("a log",), error and (type(error), error, None)
        )
        assert RequestIdFilter().filter(record)
        return FORMATTERS[form]().format(record)
    finally:
        REQUEST_ID.reset(token)


def test_log_text_line() -> None:
    assert re.fullmatch(TIME + r" WARNING app\.x: the-id words of a log", line("text", "the-id"))
    assert re.fullmatch(TIME + r" WARNING app\.x: words of a log", line("text", ""))


def test_log_json_line() -> None:
    entry = json.loads(line("json", "the-id"))
    assert re.fullmatch(TIME, entry.pop("time"))
    assert entry == {"level": "WARNING", "logger": "app.x", "message": "words of a log", "request_id": "the-id"}
    assert "request_id" not in json.loads(line("json", ""))


def test_log_json_is_one_line_whatever_is_in_it() -> None:
    written = line("json", "the-id", "two\nlines of %s", ValueError("more\nlines"))
    assert "\n" not in written
    assert json.loads(written)["exception"] == "ValueError: more\nlines"


async def test_log_of_a_thread_has_the_id_of_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async def work(number: int) -> None:
        REQUEST_ID.set(f"id-{number}")
        await run_on(threads, logging.getLogger("app.x").warning, "%d", number)

    with ThreadPoolExecutor(2) as threads:
        await asyncio.gather(*map(work, range(8)))
    assert [records_of(caplog, f"id-{number}")[0].getMessage() for number in range(8)] == list("01234567")


async def test_log_of_the_device_has_the_id_of_the_request_that_failed(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The input that breaks the model is named by its request, not by those of its batch."""
    client = await serve(FakeModel(fail_text="poison"))
    answers = [client.embed({"input": text}, headers={"X-Request-Id": f"id-{text}"}) for text in ("poison", "a", "b")]
    assert [status for status, _ in await asyncio.gather(*answers)] == [500, 200, 200]
    told = [record for record in caplog.records if record.name == "scheduler.device_worker" and record.exc_info]
    assert [vars(record)["request_id"] for record in told] == ["id-poison"]
