"""The service below HTTP: what has failed leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image

from app.dialects.contract import EmbeddingRequest, RequestItem, RequestLimits
from app.dialects.openai import parse
from app.engine.memory import expected_bytes
from app.engine.preparation import CHUNK, CHUNK_CHARACTERS, INLINE_CHARACTERS, Preparation, run_all
from app.engine.service import until
from app.engine.threads import BodyThreads, run_on
from app.http.keys import MEMORY, SCHEDULER, SERVICE
from models.base import EmbeddingInput, PreparedImage, PreparedInput
from scheduler.errors import DeadlineExceeded
from tests.conftest import Client, Serve
from tests.conftest import until as until_holds
from tests.support.fakes import FakeModel
from tests.support.hosts import connect, data_uri, image_host, picture, png, post

LIMITS = RequestLimits(frozenset({"model"}), max_inputs=500, max_input_tokens=5000, dimension=16, max_image_bytes=1000)


async def test_run_all_keeps_the_order() -> None:
    async def job(index: int) -> int:
        await asyncio.sleep(0.002 * (5 - index))
        return index

    assert await run_all([job(index) for index in range(5)]) == [0, 1, 2, 3, 4]
    assert await run_all([]) == []


async def test_run_all_cancels_the_others_and_raises_the_error_as_it_is() -> None:
    cancelled = []

    async def waiting() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def failing() -> None:
        await asyncio.sleep(0.01)
        raise KeyError("as it is")

    with pytest.raises(KeyError, match="as it is"):
        await run_all([waiting(), failing(), waiting()])
    assert cancelled == [True, True]


async def test_a_job_whose_caller_has_gone_keeps_nothing_while_it_waits_for_a_thread() -> None:
    free, file = threading.Event(), picture()
    left = weakref.ref(file)
    seen: list[Image.Image] = []
    with ThreadPoolExecutor(1) as threads:
        busy = asyncio.create_task(run_on(threads, free.wait, 60))
        waiting = asyncio.create_task(run_on(threads, seen.append, file))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        del file, waiting
        still_there = left() is not None
        free.set()
        assert not still_there
        assert await busy and await run_on(threads, len, "abc") == 3
    assert seen == []


async def test_until_turns_its_own_timeout_alone_into_a_deadline() -> None:
    now = asyncio.get_running_loop().time
    with pytest.raises(DeadlineExceeded):
        async with until(now() + 0.01):
            await asyncio.sleep(60)
    async with until(now() + 60):
        await asyncio.sleep(0)


@pytest.mark.parametrize("texts", [["a"], ["x" * (INLINE_CHARACTERS + 1)], ["a"] * (CHUNK + 2), ["a"] * (3 * CHUNK)])
async def test_texts_are_prepared_in_the_pool_in_chunks_unless_there_is_one_short_one(
    client: Client, fake: FakeModel, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    service = client.app[SERVICE]
    calls = []
    run_job = Preparation._run_job

    async def counted(preparation: Preparation, function: Callable[..., list[object]], inputs: object) -> list[object]:
        result = await run_job(preparation, function, inputs)
        calls.append(len(result))
        return result

    monkeypatch.setattr(Preparation, "_run_job", counted)
    request = parse(orjson.dumps({"input": texts}), LIMITS)
    with client.app[MEMORY].share() as memory:
        outcome = await service.embed(request, asyncio.get_running_loop().time() + 10, memory)
    assert [list(row) for row in outcome.rows if not isinstance(row, Exception)] == [list(fake.vector(text)) for text in texts]
    assert sum(calls) == (0 if texts == ["a"] else len(texts))
    assert all(size <= CHUNK for size in calls)


async def test_many_parts_never_hold_up_the_event_loop(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short they are: they are prepared on threads, few enough to a job."""
    parts: list[int] = []
    run_job = Preparation._run_job

    async def counted(preparation: Preparation, function: Callable[..., Any], inputs: list[EmbeddingInput]) -> Any:
        parts.append(sum(len(item.parts) for item in inputs))
        return await run_job(preparation, function, inputs)

    monkeypatch.setattr(Preparation, "_run_job", counted)
    items = [{"text": [""] * count} for count in (1, 2, 300, 100, 100, 100, 1)]
    assert (await client.embed({"input": items}))[0] == 200
    assert (await client.embed({"input": {"text": ["", ""]}}))[0] == 200
    assert sorted(parts) == sorted([1 + 2, 300, 100 + 100, 100 + 1, 2])


async def test_long_texts_are_few_to_a_job(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is not interrupted, and the other requests' wait for it."""
    jobs: list[list[int]] = []
    run_job = Preparation._run_job

    async def counted(preparation: Preparation, function: Callable[..., Any], inputs: list[EmbeddingInput]) -> Any:
        jobs.append([len(item.parts[0]) for item in inputs])
        return await run_job(preparation, function, inputs)

    monkeypatch.setattr(Preparation, "_run_job", counted)
    lengths = [CHUNK_CHARACTERS - 1, 1, 1, 2 * CHUNK_CHARACTERS, 2 * CHUNK_CHARACTERS, 5, 5]
    texts = [chr(ord("a") + n) * length for n, length in enumerate(lengths)]
    assert (await client.embed({"input": texts, "truncate": True}))[0] == 200
    assert sorted(jobs) == sorted([lengths[:2], lengths[2:3], lengths[3:4], lengths[4:5], lengths[5:]])


async def test_a_long_instruction_is_not_tokenised_on_the_event_loop(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = 0
    run_job = Preparation._run_job

    async def counted(preparation: Preparation, *arguments: Any) -> Any:
        nonlocal jobs
        jobs += 1
        return await run_job(preparation, *arguments)

    monkeypatch.setattr(Preparation, "_run_job", counted)
    for instruction, expected in (("short", 0), ("long " * 1000, 1)):
        assert (await client.embed({"input": "hello", "instruction": instruction}))[0] == 200
        assert jobs == expected


async def test_a_request_that_fails_gives_all_its_places_back(client: Client, fake: FakeModel) -> None:
    fake.fail_text = "poison"
    for text, status in (("poison", 500), ("x" * 9000, 400)):
        assert (await client.embed({"input": ["a", text, "b"]}))[0] == status
    assert client.app[SCHEDULER].queue_depth == 0


class SlowToPrepare(FakeModel):
    """A text "slow" takes a while to prepare; `batches` counts them."""

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        if "slow" in item.parts:
            time.sleep(0.002)
            self.batches.append(1)
        return super().prepare(item)


async def test_a_request_with_much_to_prepare_does_not_hold_up_the_others(serve: Serve) -> None:
    """Its jobs take turns with theirs: they are answered while it still prepares, though it came first."""
    model = SlowToPrepare()
    client = await serve(model)
    bulk = asyncio.create_task(client.embed({"input": ["slow"] * 2000}))
    while not model.batches:
        await asyncio.sleep(0.01)
    assert (await client.embed({"input": ["a", "b"]}))[0] == 200
    assert sum(model.batches) < 1000
    bulk.cancel()


class Remembering(FakeModel):
    """Keeps weak references to the images that it was given."""

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        SEEN.append(weakref.ref(image))
        prepared = super().prepare_image(image, original_size)
        SEEN.append(weakref.ref(prepared.patches))
        return prepared


def requests_alive() -> list[EmbeddingRequest]:
    return [one for one in gc.get_objects() if type(one) is EmbeddingRequest]


SEEN: list[weakref.ref[Any]] = []


@pytest.mark.parametrize("partial", [False, True], ids=["refused", "partial"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("image", [data_uri(picture()), "AAAA"], ids=["too long", "no image"])
async def test_a_refused_input_leaves_nothing_to_the_garbage_collector(
    serve: Serve, image: str, partial: bool, count: int
) -> None:
    """An error that outlives its except block, with its traceback, would keep the pixels until the next full collection."""
    SEEN.clear()
    client = await serve(Remembering(max_tokens=50))
    bad = {"text": "x" * 100, "image": image}
    gc.collect()
    gc.disable()
    # pytest keeps what earlier tests have logged, and so their requests. What is known by its id must not go meanwhile.
    before = requests_alive()
    known = set(map(id, before))
    try:
        status, _ = await client.embed({"input": [bad] * count, "partial": partial})
        assert status == (200 if partial else 400)
        assert len(SEEN) <= 2 * count
        # Soon, and not at once: a thread may be about to let go of its job.
        await until_holds(lambda: [seen for seen in SEEN if seen() is not None] == [], 10)
        await until_holds(lambda: set(map(id, requests_alive())) == known, 10)
    finally:
        gc.enable()


class Counting(FakeModel):
    """Counts the images that it prepares, and keeps them waiting until they may go on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.images = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        self.images += 1
        assert self.may_go_on.wait(60)
        return super().prepare_image(image, original_size)


class Large(FakeModel):
    """Its prepared images have a million bytes."""

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        prepared = super().prepare_image(image)
        return PreparedImage(prepared.grid, np.resize(prepared.patches, (4, 250_000)))


@pytest.mark.parametrize("truncate", [False, True])
async def test_images_beyond_the_limit_of_tokens_are_not_even_decoded(serve: Serve, truncate: bool) -> None:
    model = Counting()
    client = await serve(model, max_input_tokens=100)
    item = {"image": [data_uri(picture(seed)) for seed in range(90)], "text": "a"}
    status, body = await client.embed({"input": [item], "truncate": truncate})
    assert status == 400 and "images alone have more than 100 tokens" in body["error"]["message"]
    assert body["error"]["param"] == "input[0]"
    # Ten to the token more than a hundred, and what other threads had begun.
    assert 11 <= model.images <= 20


async def test_what_a_request_holds_follows_its_body_its_images_and_its_inputs(serve: Serve) -> None:
    model = Counting(gate=threading.Event())
    client = await serve(model)
    memory = client.app[MEMORY]
    text, uri = "x" * 5000, data_uri(picture())
    model.may_go_on.clear()
    asking = asyncio.create_task(client.embed({"input": [{"text": text, "image": uri}, text]}))
    try:
        while not model.images:
            await asyncio.sleep(0.005)
        assert memory.held > 2 * len(text)
        model.may_go_on.set()
        while not len(client.app[SCHEDULER]._queue):
            await asyncio.sleep(0.005)
        # Two texts of 5,000 characters and as many tokens, of eight bytes each.
        assert 10_000 + 80_000 < memory.held < 10_000 + 80_000 + 2000
    finally:
        model.may_go_on.set()
        model.gate.set()  # type: ignore[union-attr]
    assert (await asking)[0] == 200
    assert memory.held == 0


@pytest.mark.parametrize("body", [{"input": 5}, {"input": "x" * 9000}, {"input": {"image": "AAAA"}}, {"input": ["a"] * 70}])
async def test_no_request_leaves_memory_taken(client: Client, body: object) -> None:
    await client.embed(body)
    assert client.app[MEMORY].held == 0


async def test_the_images_of_an_input_that_failed_are_held_no_longer(serve: Serve) -> None:
    client = await serve(Large(), max_bytes_in_flight=10_000_000)
    item = {"image": [data_uri(picture()), "AAAA"]}
    status, body = await client.embed({"input": [item] * 40, "partial": True})
    assert status == 200 and all(row["error"] for row in body["data"])
    status, body = await client.embed({"input": [{"image": data_uri(picture())}] * 40, "partial": True})
    assert status == 413 and client.app[MEMORY].held == 0


@pytest.mark.parametrize("route", ["", "/preview"])
async def test_memory_of_a_body_is_held_until_its_reply_is_written(
    client: Client, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """Replies may wait for a thread that writes them, and what they answer is there until then."""
    held: list[int] = []
    run = BodyThreads.run

    async def writing(threads: BodyThreads, large: bool, function: Callable[..., Any], *arguments: Any) -> Any:
        if function is not parse:
            held.append(client.app[MEMORY].held)
        return await run(threads, large, function, *arguments)

    monkeypatch.setattr(BodyThreads, "run", writing)
    async with client.session.post(f"/v1/embeddings{route}", json={"input": ["x" * 100] * 50}) as reply:
        assert reply.status == 200
    assert held[-1] > 5000 and client.app[MEMORY].held == 0


async def test_the_memory_of_a_body_is_taken_as_it_arrives(serve: Serve) -> None:
    client = await serve(max_bytes_in_flight=100_000)
    async with connect(client.port) as slow, connect(client.port) as other:
        await slow.send(post(None, "Content-Length: 90000") + b"x" * 60_000)
        while client.app[MEMORY].held < 60_000:
            await asyncio.sleep(0.005)
        await other.send(post(b'{"input": "%b"}' % (b"y" * 60_000)))
        reply = await other.reply()
        assert reply.status == 429 and reply.error["code"] == "overloaded" and int(reply.headers["Retry-After"]) >= 1
        slow.abort()
        while client.app[MEMORY].held:
            await asyncio.sleep(0.005)
    assert (await client.embed({"input": "y" * 5_000}))[0] == 200
    status, body = await client.embed({"input": "y" * 100_000})
    assert status == 413 and "100,000 bytes of memory" in body["error"]["message"]


async def test_no_work_is_begun_for_images_that_may_not_fit(serve: Serve) -> None:
    model = Counting(largest_image=600_000)
    client = await serve(model, max_bytes_in_flight=1_000_000)
    uri = data_uri(picture())
    model.may_go_on.clear()
    # Sets a quarter aside, as the next ones do.
    asking = [asyncio.create_task(client.embed({"input": {"image": data_uri(picture(seed))}})) for seed in range(3)]
    while not model.images or client.app[MEMORY].held < 750_000:
        await asyncio.sleep(0.005)
    images = model.images
    status, body = await client.embed({"input": {"image": uri}})
    assert status == 429 and body["error"]["code"] == "overloaded"
    model.may_go_on.set()
    assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 3
    assert model.images == 3 >= images


def test_expected_bytes_are_never_less_than_what_is_made(fake: FakeModel) -> None:
    for inputs in (["a"], ["x" * 300, "汉" * 50], [{"text": "a", "image": [data_uri(picture(0)), data_uri(picture(1))]}]):
        request = parse(orjson.dumps({"input": inputs}), LIMITS)
        prepared = [
            fake.prepare(EmbeddingInput(tuple(part if isinstance(part, str) else picture() for part in item.parts)))
            for item in request.items
            if isinstance(item, RequestItem)
        ]
        made = sum(item.num_bytes + sum(image.patches.nbytes for image in item.images) for item in prepared)
        assert made <= expected_bytes(request, fake.info)


def test_many_images_in_one_input_are_expected_to_be_no_more_than_it_may_have(fake: FakeModel) -> None:
    uri = data_uri(picture())
    info = dataclasses.replace(fake.info, max_tokens=8192, largest_image=786_432, image_token_bytes=3072)
    one, many = (parse(orjson.dumps({"input": {"image": [uri] * count}}), LIMITS) for count in (1, 1400))
    assert 786_432 < expected_bytes(one, info) < 1 << 20
    assert LIMITS.max_input_tokens * 3072 < expected_bytes(many, info) < 2 * LIMITS.max_input_tokens * 3072


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/embeddings/preview"])
async def test_a_model_of_text_alone_refuses_images_before_they_are_fetched(serve: Serve, path: str) -> None:
    async with image_host(a=png(picture())) as host:
        client = await serve(Counting(supports_images=False), image_url_allowed_hosts=frozenset({host.host}))
        body = {"input": ["a", {"text": "b", "image": host.url("/a.png")}, {"image": data_uri(picture())}], "partial": True}
        async with client.session.post(path, json=body) as reply:
            status, rows = reply.status, (await reply.json())["data"]
        assert status == 200 and host.asked == []
        refusals = [row.get("error") or row.get("refusal") for row in rows]
        assert refusals[0] is None
        assert [refusal["message"] for refusal in refusals[1:]] == ["this model embeds text only: send no image"] * 2
        assert [refusal["param"] for refusal in refusals[1:]] == ["input[1].image", "input[2].image"]
