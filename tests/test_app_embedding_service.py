"""The service below HTTP: what has failed leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import pytest
from PIL import Image

from app.dialects import EmbeddingRequest, RequestLimits, parse
from app.embedding_service import until
from app.keys import SCHEDULER, SERVICE
from app.preparation import CHUNK, CHUNK_CHARACTERS, INLINE_CHARACTERS, Preparation, run_all
from models.base import EmbeddingInput, PreparedInput
from scheduler.errors import DeadlineExceeded
from tests.conftest import Client, Serve
from tests.fakes import FakeModel
from tests.hosts import data_uri, picture

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
    in_pool = Preparation._in_pool

    async def counted(preparation: Preparation, function: Callable[[], list[object]]) -> list[object]:
        result = await in_pool(preparation, function)
        calls.append(len(result))
        return result

    monkeypatch.setattr(Preparation, "_in_pool", counted)
    request = parse(orjson.dumps({"input": texts}), LIMITS)
    outcome = await service.embed(request, asyncio.get_running_loop().time() + 10)
    assert [list(row) for row in outcome.rows if not isinstance(row, Exception)] == [list(fake.vector(text)) for text in texts]
    assert sum(calls) == (0 if texts == ["a"] else len(texts))
    assert all(size <= CHUNK for size in calls)


async def test_many_parts_never_hold_up_the_event_loop(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short they are: they are prepared on threads, few enough to a job."""
    parts: list[int] = []
    in_pool = Preparation._in_pool

    async def counted(preparation: Preparation, function: partial[list[object]]) -> list[object]:
        parts.append(sum(len(item.parts) for item in function.args[0]))
        return await in_pool(preparation, function)

    monkeypatch.setattr(Preparation, "_in_pool", counted)
    items = [{"text": [""] * count} for count in (1, 2, 300, 100, 100, 100, 1)]
    assert (await client.embed({"input": items}))[0] == 200
    assert (await client.embed({"input": {"text": ["", ""]}}))[0] == 200
    assert sorted(parts) == sorted([1 + 2, 300, 100 + 100, 100 + 1, 2])


async def test_long_texts_are_few_to_a_job(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is not interrupted, and the other requests' wait for it."""
    jobs: list[list[int]] = []
    in_pool = Preparation._in_pool

    async def counted(preparation: Preparation, function: partial[list[object]]) -> list[object]:
        jobs.append([len(item.parts[0]) for item in function.args[0]])
        return await in_pool(preparation, function)

    monkeypatch.setattr(Preparation, "_in_pool", counted)
    lengths = [CHUNK_CHARACTERS - 1, 1, 1, 2 * CHUNK_CHARACTERS, 2 * CHUNK_CHARACTERS, 5, 5]
    texts = [chr(ord("a") + n) * length for n, length in enumerate(lengths)]
    assert (await client.embed({"input": texts, "truncate": True}))[0] == 200
    assert sorted(jobs) == sorted([lengths[:2], lengths[2:3], lengths[3:4], lengths[4:5], lengths[5:]])


async def test_a_long_instruction_is_not_tokenised_on_the_event_loop(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = 0
    in_pool = Preparation._in_pool

    async def counted(preparation: Preparation, *arguments: Any) -> Any:
        nonlocal jobs
        jobs += 1
        return await in_pool(preparation, *arguments)

    monkeypatch.setattr(Preparation, "_in_pool", counted)
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

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        SEEN.extend(weakref.ref(part) for part in item.parts if isinstance(part, Image.Image))
        return super().prepare(item)


def requests_alive() -> set[int]:
    return {id(one) for one in gc.get_objects() if type(one) is EmbeddingRequest}


SEEN: list[weakref.ref[Image.Image]] = []


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
    # pytest keeps what earlier tests have logged, and so their requests.
    before = requests_alive()
    try:
        status, _ = await client.embed({"input": [bad] * count, "partial": partial})
        await asyncio.sleep(0.05)
        assert status == (200 if partial else 400)
        assert len(SEEN) <= count
        assert [seen for seen in SEEN if seen() is not None] == []
        assert requests_alive() == before
    finally:
        gc.enable()
