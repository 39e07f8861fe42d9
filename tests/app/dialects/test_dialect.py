"""A second dialect is one file and one row: this one, of a score of lines, is served beside OpenAI's by the same handler."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from app.dialects.contract import EmbeddingRequest, Failure, InvalidRequest, Reply, RequestItem, RequestLimits
from app.dialects.dialect import Dialect
from app.dialects.registry import DIALECTS
from app.main import create_app
from tests.conftest import Client, Serve
from tests.support.fakes import FakeModel


def parse(body: bytes | bytearray, limits: RequestLimits) -> EmbeddingRequest:
    texts = body.decode().splitlines()
    if not texts:
        raise InvalidRequest("needs a line for each text", "body")
    items = tuple(RequestItem((text,), None, False, f"line {number}") for number, text in enumerate(texts, start=1))
    return EmbeddingRequest(items, None, limits.max_input_tokens, truncate=False, partial=False)


def write(reply: Reply) -> bytes:
    return orjson.dumps([row.tolist() for row in reply.rows if not isinstance(row, Failure)])


def error(failure: Failure) -> bytes:
    return orjson.dumps({"problem": failure.message, "at": failure.param})


LINES = Dialect(paths=("/lines", "/v0/lines"), parse=parse, write=write, error=error)


@pytest.fixture
async def client(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setattr("tests.conftest.create_app", lambda *arguments: create_app(*arguments, dialects=(*DIALECTS, LINES)))
    return await serve(FakeModel(fail_text="poison"))


async def send(client: Client, path: str, body: str, **headers: str) -> tuple[int, Any]:
    async with client.session.post(path, data=body, headers=headers) as reply:
        return reply.status, await reply.json()


@pytest.mark.parametrize("path", LINES.paths)
async def test_dialect_gives_the_same_vectors(client: Client, path: str) -> None:
    _, reply = await client.embed({"input": ["one", "two"]})
    status, rows = await send(client, path, "one\ntwo\n")
    assert status == 200
    assert np.array_equal(np.float32(rows), np.float32([row["embedding"] for row in reply["data"]]))


async def test_dialect_writes_its_own_errors(client: Client) -> None:
    assert await send(client, "/lines", "") == (400, {"problem": "needs a line for each text", "at": "body"})
    status, error = await send(client, "/lines", "fine\n" + "x" * 9000)
    assert (status, error["at"]) == (400, "line 2")
    status, error = await send(client, "/lines", "one", Authorization="Bearer wrong")
    assert status == 401 and "Authorization: Bearer KEY" in error["problem"]
    assert (await send(client, "/lines", "poison"))[0] == 500
    # A path that no dialect owns answers in the first one's form.
    async with client.session.post("/nowhere") as reply:
        assert reply.status == 404 and (await reply.json())["error"]["code"] == "not_found"


async def test_dialect_without_a_manual_is_not_in_the_document(client: Client) -> None:
    _, document = await client.get("/openapi.json")
    assert "/v1/embeddings" in document["paths"] and "/lines" not in document["paths"]
