"""The reference cases over HTTP: the vectors that leave the service, among 32 concurrent others and bad neighbours."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import orjson
import pytest

from tests.conformance.report import BARS, CASES, case_input, golden, load
from tests.conftest import Serve
from tests.support.oracle import cosines
from tests.support.paths import CONFORMANCE

CALLERS = 32


def request_item(case: dict[str, Any]) -> dict[str, Any]:
    """A case as a client sends it, images as base64."""
    files = case.get("image", [])
    files = [files] if isinstance(files, str) else files
    images = [base64.b64encode((CONFORMANCE / "cases" / file).read_bytes()).decode() for file in files]
    texts = {"text": case["text"]} if "text" in case else {}
    return {**texts, "instruction": case.get("instruction"), **({"image": images} if images else {})}


@pytest.mark.parametrize("together", [False, True], ids=["a request each", "all in one request"])
async def test_conformance_over_http(serve: Serve, together: bool) -> None:
    client = await serve(load("float32"), max_batch_tokens=4096)
    slots = asyncio.Semaphore(CALLERS)

    async def ask(item: dict[str, Any]) -> list[float]:
        async with slots:
            status, reply = await client.embed({"input": [item], "encoding_format": "float"})
        assert status == 200, reply
        vector: list[float] = reply["data"][0]["embedding"]
        return vector

    async def bad_neighbour(number: int) -> None:
        body = [{"input": [{"image": "AAAA"}]}, {"input": ["<|image_pad|>" * 9, 5]}, {"input": "x" * 200_000}][number % 3]
        async with slots:
            assert (await client.embed(body))[0] == 400

    items = [request_item(case) for case in CASES]
    if together:
        body = io.BytesIO(orjson.dumps({"input": [*items, {"image": "AAAA"}], "partial": True}))
        async with client.request("POST", "/v1/embeddings", data=body) as answer:
            assert answer.status == 200
            reply = await answer.json()
        assert reply["data"].pop()["embedding"] is None
        rows = [row["embedding"] for row in reply["data"]]
    else:
        answers = await asyncio.gather(*map(ask, items), *map(bad_neighbour, range(CALLERS)))
        rows = answers[: len(items)]
    near = cosines(np.array(rows, dtype=np.float32), golden())
    assert near.min() >= BARS["float32"], (CASES[near.argmin()]["id"], near.min())


async def test_conformance_of_shared_and_cached_vectors(serve: Serve) -> None:
    """Every case by three callers at once, in batches of whatever comes, and then again from the cache."""
    model = load("float32")
    client = await serve(model, max_batch_tokens=4096, vector_cache_mb=4)
    alone = np.concatenate([model.embed([model.prepare(case_input(case))]) for case in CASES])
    items = [request_item(case) for case in CASES]

    async def ask(order: list[int]) -> np.ndarray:
        body = io.BytesIO(orjson.dumps({"input": [items[index] for index in order]}))
        async with client.request("POST", "/v1/embeddings", data=body) as answer:
            assert answer.status == 200
            rows = (await answer.json())["data"]
        by_case = sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])
        return np.array([row["embedding"] for _, row in by_case], dtype=np.float32)

    forth = list(range(len(items)))
    rounds = [await asyncio.gather(ask(forth), ask(forth[::-1]), ask(forth[1::2] + forth[::2])) for _ in range(2)]
    for got in (*rounds[0], *rounds[1]):
        near = cosines(got, alone)
        assert near.min() >= 0.9999, (CASES[near.argmin()]["id"], near.min())
    async with client.session.get("/metrics") as answer:
        metrics = await answer.text()
    assert f'embedding_shared_total{{how="cached"}} {3.0 * len(items)}' in metrics
    assert 'embedding_shared_total{how="in_flight"}' in metrics
