"""The official OpenAI client, as it is, against the running service."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import numpy as np
import openai
import pytest

from app.http.keys import SCHEDULER
from tests.conftest import KEY, Client, Serve
from tests.support.fakes import FakeModel
from tests.support.hosts import data_uri, picture

T = TypeVar("T")
MODEL = "Qwen3-VL-Embedding-2B"


def base_url(client: Client) -> str:
    return f"http://127.0.0.1:{client.port}/v1"


@pytest.fixture
async def openai_client(client: Client) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url(client), api_key=KEY, max_retries=0) as connected:
        yield connected


async def in_sync_client(client: Client, use: Callable[[openai.OpenAI], T], key: str = KEY) -> T:
    """What `use` returns, from a thread, with the client that knows no asyncio."""

    def run() -> T:
        with openai.OpenAI(base_url=base_url(client), api_key=key, max_retries=0) as connected:
            return use(connected)

    return await asyncio.to_thread(run)


def same(got: Any, wanted: np.ndarray) -> bool:
    # The client hands out Python floats.
    return np.array_equal(np.array(got, dtype=np.float32), wanted)


async def test_a_text(openai_client: openai.AsyncOpenAI, fake: FakeModel) -> None:
    # The client asks for base64 by itself, and decodes it.
    reply = await openai_client.embeddings.create(model=MODEL, input="a dog")
    assert (reply.object, reply.model) == ("list", MODEL)
    assert [(row.object, row.index) for row in reply.data] == [("embedding", 0)]
    assert same(reply.data[0].embedding, fake.vector("a dog"))
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (9, 9)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_a_list_in_both_encodings(openai_client: openai.AsyncOpenAI, fake: FakeModel, encoding: Any) -> None:
    texts = [f"text {index}" for index in range(40)]
    reply = await openai_client.embeddings.create(model=MODEL, input=texts, encoding_format=encoding)
    for index, (row, text) in enumerate(zip(reply.data, texts, strict=True)):
        assert row.index == index
        got: Any = row.embedding
        if encoding == "base64":
            got = np.frombuffer(base64.b64decode(got), dtype="<f4")
        assert same(got, fake.vector(text))


async def test_dimensions_and_user(openai_client: openai.AsyncOpenAI, fake: FakeModel) -> None:
    reply = await openai_client.embeddings.create(model=f"Qwen/{MODEL}", input=["a"], dimensions=6, user="me")
    cut = fake.vector("a")[:6]
    np.testing.assert_allclose(reply.data[0].embedding, cut / np.linalg.norm(cut), atol=1e-6)


async def test_extra_body(openai_client: openai.AsyncOpenAI, fake: FakeModel) -> None:
    reply = await openai_client.embeddings.create(model=MODEL, input="a", extra_body={"instruction": "Find it."})
    assert same(reply.data[0].embedding, fake.vector("a", instruction="Find it."))
    image = picture(1)
    items: Any = [{"image": data_uri(image), "text": "a"}, {"type": "image_url", "image_url": {"url": data_uri(image)}}]
    reply = await openai_client.embeddings.create(model=MODEL, input=items)
    assert same(reply.data[0].embedding, fake.vector(image, "a"))
    assert same(reply.data[1].embedding, fake.vector(image))
    messages = [{"role": "user", "content": "a"}]
    nothing: Any = None
    reply = await openai_client.embeddings.create(model=MODEL, input=nothing, extra_body={"messages": messages})
    assert same(reply.data[0].embedding, fake.vector("a"))


async def test_vllms_way_to_send_messages(openai_client: openai.AsyncOpenAI, fake: FakeModel) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "encoding_format": "float"}
    reply = await openai_client.post("/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body=body)
    assert same(reply.data[0].embedding, fake.vector("a"))


async def test_raw_response_headers(openai_client: openai.AsyncOpenAI) -> None:
    raw = await openai_client.embeddings.with_raw_response.create(model=MODEL, input="a", extra_headers={"X-Request-Id": "mine"})
    assert raw.headers["X-Request-Id"] == raw.request_id == "mine"
    assert raw.headers["Server-Timing"]
    assert raw.headers["X-Model-Fingerprint"]
    assert len(raw.parse().data[0].embedding) == 16


async def test_models(openai_client: openai.AsyncOpenAI) -> None:
    listed = [row async for row in openai_client.models.list()]
    assert [row.id for row in listed] == [MODEL]
    assert (await openai_client.models.retrieve(MODEL)).id == MODEL
    assert (await openai_client.models.retrieve(f"Qwen/{MODEL}")).id == MODEL


async def test_the_sync_client(client: Client, fake: FakeModel) -> None:
    reply = await in_sync_client(client, lambda connected: connected.embeddings.create(model=MODEL, input=["a", "b"]))
    assert [same(row.embedding, fake.vector(text)) for row, text in zip(reply.data, "ab", strict=True)] == [True, True]
    assert [row.id for row in await in_sync_client(client, lambda connected: list(connected.models.list()))] == [MODEL]


async def test_errors_are_the_clients_own_classes(client: Client, openai_client: openai.AsyncOpenAI) -> None:
    create = openai_client.embeddings.create
    with pytest.raises(openai.AuthenticationError) as caught:
        await in_sync_client(client, lambda connected: connected.embeddings.create(model=MODEL, input="a"), key="wrong")
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "authentication_error"
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length") as bad:
        await create(model=MODEL, input=[1, 2, 3])
    assert (bad.value.param, bad.value.type) == ("input", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError) as large:
        await create(model=MODEL, input="a", dimensions=99)
    assert large.value.param == "dimensions"
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="text-embedding-3-small", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await openai_client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        await openai_client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}])
    client.app[SCHEDULER].drain()
    with pytest.raises(openai.InternalServerError) as draining:
        await create(model=MODEL, input="a")
    assert (draining.value.status_code, draining.value.code) == (503, "draining")


async def test_an_overload_is_a_rate_limit_and_retried(serve: Serve) -> None:
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake, max_queue_size=1, max_inputs_per_request=1, max_batch_size=1)
    scheduler = client.app[SCHEDULER]
    assert fake.gate is not None
    async with openai.AsyncOpenAI(base_url=base_url(client), api_key=KEY, max_retries=0) as connected:
        try:
            tasks = [asyncio.create_task(connected.embeddings.create(model=MODEL, input="on the device"))]
            async with asyncio.timeout(30):
                while not (scheduler._worker and scheduler._worker.busy_seconds()):
                    await asyncio.sleep(0.005)
                tasks.append(asyncio.create_task(connected.embeddings.create(model=MODEL, input="waits")))
                while scheduler.queue_depth != 1:
                    await asyncio.sleep(0.005)
            with pytest.raises(openai.RateLimitError) as caught:
                await connected.embeddings.create(model=MODEL, input="a")
            assert caught.value.code == "overloaded"
            patient = connected.with_options(max_retries=2)
            tasks.append(asyncio.create_task(patient.embeddings.create(model=MODEL, input="retried")))
            await asyncio.sleep(0.1)
        finally:
            fake.gate.set()
        retried = (await asyncio.gather(*tasks))[-1]
    assert same(retried.data[0].embedding, fake.vector("retried"))
