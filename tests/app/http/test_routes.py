"""The other routes, and what every reply carries: ids, timings, the fingerprint, CORS headers, a line in the log."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import threading
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.dialects.registry import DIALECTS
from app.http.keys import LIFECYCLE, SCHEDULER
from app.http.routes import routes
from scheduler.scheduler import State
from tests.conftest import AUTH, KEY, Client, Clock, Serve, records_of, until
from tests.support.fakes import FakeModel
from tests.support.hosts import connect, data_uri, image_host, picture, png, post

PUBLIC_PATHS = [
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/assets/docs/docs.js",
    "/assets/docs/docs.css",
    "/",
    "/assets/playground/playground.js",
]
HEALTH_KEYS = {
    "status",
    "model",
    "model_path",
    "device",
    "cuda_available",
    "embedding_dimension",
    "max_image_width",
    "max_image_height",
    "native_dimension",
    "dtype",
    "queue_depth",
    "uptime_seconds",
    "version",
    "fingerprint",
}


async def bare(client: Client, path: str, method: str = "GET", **options: Any) -> tuple[int, Any, bytes]:
    """Status, headers and body of a request without a key."""
    url = f"http://127.0.0.1:{client.port}{path}"
    async with aiohttp.ClientSession() as session, session.request(method, url, **options) as reply:
        return reply.status, reply.headers, await reply.read()


# Health


async def test_health_ok(serve: Serve) -> None:
    client = await serve(FakeModel(), max_image_width=300, max_image_height=0)
    status, _, body = await bare(client, "/health")
    health = json.loads(body)
    assert status == 200
    assert set(health) == HEALTH_KEYS
    assert re.fullmatch(r"[0-9a-f]{16}", health.pop("fingerprint"))
    assert health.pop("uptime_seconds") >= 0
    assert health.pop("version")
    assert health == {
        "status": "ok",
        "model": "Qwen3-VL-Embedding-2B",
        "model_path": "models/Qwen3-VL-Embedding-2B",
        "device": "cpu",
        "cuda_available": False,
        "embedding_dimension": 16,
        "native_dimension": 16,
        "max_image_width": 300,
        "max_image_height": 0,
        "dtype": "float32",
        "queue_depth": 0,
    }
    for path in ("/health/live", "/health/ready"):
        status, _, body = await bare(client, path)
        assert (status, json.loads(body)) == (200, {"status": "ok"})


async def check_health(client: Client, status: str, live: int) -> dict[str, Any]:
    code, _, body = await bare(client, "/health")
    health = json.loads(body)
    assert (code, health["status"]) == (503, status)
    assert set(health) == HEALTH_KEYS
    code, _, body = await bare(client, "/health/live")
    assert (code, json.loads(body)) == (live, {"status": status})
    code, _, body = await bare(client, "/health/ready")
    assert (code, json.loads(body)) == (503, {"status": status})
    return health


async def test_health_while_loading(serve: Serve) -> None:
    release = threading.Event()
    try:
        client = await serve(lambda: release.wait() and FakeModel(), wait=False)
        health = await check_health(client, "loading", 200)
        unknown = {key for key, value in health.items() if value is None}
        assert unknown == {"device", "cuda_available", "embedding_dimension", "native_dimension", "dtype", "fingerprint"}
    finally:
        release.set()


async def test_health_while_draining(client: Client) -> None:
    client.app[SCHEDULER].drain()
    assert (await check_health(client, "draining", 200))["device"] == "cpu"


async def test_health_when_the_device_is_lost(serve: Serve) -> None:
    client = await serve(FakeModel(lose_after=1))
    assert (await client.embed({"input": "a"}))[0] == 503
    assert (await check_health(client, "failed", 503))["native_dimension"] == 16


async def test_health_when_the_device_stalls(serve: Serve) -> None:
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake, worker_stall_s=0.2)
    assert fake.gate is not None
    try:
        assert (await client.embed({"input": "a"}))[0] == 503
        await check_health(client, "failed", 503)
    finally:
        fake.gate.set()


async def test_health_when_the_model_does_not_load(serve: Serve) -> None:
    client = await serve(FakeModel(load_error=RuntimeError("broken")).load)
    health = await check_health(client, "failed", 503)
    assert health["device"] is None
    assert (await client.embed({"input": "a"}))[0] == 503


async def test_health_does_not_wait_for_the_device(serve: Serve) -> None:
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake, max_batch_size=1)
    assert fake.gate is not None
    waiting = asyncio.create_task(client.embed({"input": ["a", "b", "c"]}))
    try:
        async with asyncio.timeout(30):
            while (await client.get("/health"))[1]["queue_depth"] != 2:
                await asyncio.sleep(0.005)
    finally:
        fake.gate.set()
    assert (await waiting)[0] == 200


# Models


async def test_models(client: Client) -> None:
    fingerprint = (await client.get("/health"))[1]["fingerprint"]
    status, listed = await client.get("/v1/models")
    assert status == 200
    assert listed["object"] == "list"
    (row,) = listed["data"]
    assert (row["id"], row["object"], row["fingerprint"]) == ("Qwen3-VL-Embedding-2B", "model", fingerprint)
    assert isinstance(row["created"], int)
    assert row["owned_by"] == "Qwen"
    for name in ("Qwen3-VL-Embedding-2B", "Qwen/Qwen3-VL-Embedding-2B", "Qwen%2FQwen3-VL-Embedding-2B"):
        assert await client.get(f"/v1/models/{name}") == (200, row)


async def test_a_models_limit_is_the_one_that_rules(serve: Serve) -> None:
    assert (await (await serve(FakeModel(max_tokens=77))).get("/v1/models"))[1]["data"][0]["max_input_tokens"] == 77
    assert (await (await serve(FakeModel())).get("/v1/models"))[1]["data"][0]["max_input_tokens"] == 8192


async def test_models_while_loading(serve: Serve) -> None:
    release = threading.Event()
    try:
        client = await serve(lambda: release.wait() and FakeModel(), wait=False)
        status, listed = await client.get("/v1/models")
        assert (status, listed["data"][0]["fingerprint"]) == (200, None)
    finally:
        release.set()


async def test_the_fingerprint_is_of_the_model_and_the_dimension(serve: Serve) -> None:
    class Other(FakeModel):
        @property
        def info(self) -> Any:
            return replace(super().info, fingerprint="0ther")

    prints = []
    for model, dimension in ((FakeModel(), None), (FakeModel(), 16), (FakeModel(), 8), (FakeModel(), 32), (Other(), None)):
        client = await serve(model, embedding_dimension=dimension)
        async with client.session.post("/v1/embeddings", json={"input": "a"}) as reply:
            prints.append(reply.headers["X-Model-Fingerprint"])
        assert (await client.get("/v1/models"))[1]["data"][0]["fingerprint"] == prints[-1]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


# Ids and timings


@pytest.mark.parametrize("given", ["a", "trace-7/!~", "x" * 128])
async def test_a_good_request_id_is_echoed(client: Client, given: str) -> None:
    for path in ("/health", "/nothing", "/v1/models"):
        async with client.session.get(path, headers={"X-Request-Id": given}) as reply:
            assert reply.headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"two words", b"tab\there", b"\xc3\xa4", b"\xff"])
async def test_a_bad_request_id_is_replaced(client: Client, given: bytes) -> None:
    seen = set()
    for _ in range(2):
        async with connect(client.port) as raw:
            await raw.send(b"GET /health HTTP/1.1\r\nHost: test\r\nX-Request-Id: " + given + b"\r\n\r\n")
            reply = await raw.reply()
        assert re.fullmatch(r"[\x21-\x7e]{1,128}", reply.headers["X-Request-Id"])
        assert reply.headers["X-Request-Id"].encode() != given
        seen.add(reply.headers["X-Request-Id"])
    assert len(seen) == 2


async def test_server_timing(serve: Serve) -> None:
    client = await serve(FakeModel(seconds_per_batch=0.03))
    async with client.session.post("/v1/embeddings", json={"input": ["a", "b"]}) as reply:
        text = reply.headers["Server-Timing"]
    timings = dict(re.findall(r"(\w+);dur=(\d+\.\d+)", text))
    assert list(timings) == ["queue", "prepare", "device"]
    # Milliseconds: in microseconds the device would have 30,000 at least.
    assert 30 <= float(timings["device"]) < 20_000
    assert float(timings["queue"]) < 20_000
    assert float(timings["prepare"]) < 20_000


# Preview


async def test_preview(serve: Serve) -> None:
    fake = FakeModel()
    client = await serve(fake, max_input_tokens=20)
    body = {
        "instruction": "Find it.",
        "input": ["abc", {"text": "a", "image": data_uri(picture(1, (40, 30)))}, "x" * 30],
        "dimensions": 4,
    }
    status, reply = await preview(client, body)
    assert status == 200
    assert (reply["object"], reply["model"]) == ("list", "Qwen3-VL-Embedding-2B")
    text, image, long = reply["data"]
    assert text == {
        "object": "embedding.preview",
        "index": 0,
        "prompt": "Find it.|abc",
        "text_tokens": 7,
        "image_tokens": 0,
        "total_tokens": 7,
        "images": [],
        "truncated": False,
        "refusal": None,
    }
    assert image["prompt"] == "Find it.|<image>a"
    assert (image["text_tokens"], image["image_tokens"], image["total_tokens"]) == (5, 10, 15)
    assert image["images"] == [
        {
            "original_width": 40,
            "original_height": 30,
            "width": 32,
            "height": 32,
            "grid_rows": 2,
            "grid_columns": 2,
            "tokens": 10,
            "official_width": 32,
            "official_height": 32,
            "smaller_than_official": False,
        }
    ]
    assert (long["text_tokens"], long["total_tokens"], long["truncated"]) == (None, None, False)
    assert (long["refusal"]["type"], long["refusal"]["param"]) == ("invalid_request_error", "input[2]")
    assert "20" in long["refusal"]["message"]
    assert fake.embedded == 0
    assert fake.batches == []


async def preview(client: Client, body: Any) -> tuple[int, Any]:
    async with client.session.post("/v1/embeddings/preview", json=body) as reply:
        return reply.status, await reply.json()


async def test_preview_says_what_would_be_cut(serve: Serve) -> None:
    client = await serve(max_input_tokens=20)
    _, reply = await preview(client, {"input": ["x" * 30, "x"], "truncate": True})
    assert [(row["truncated"], row["total_tokens"], row["refusal"]) for row in reply["data"]] == [
        (True, 20, None),
        (False, 5, None),
    ]


async def test_preview_of_inputs_that_cannot_be_had(serve: Serve, fake: FakeModel) -> None:
    async with image_host(cat=png(picture())) as host:
        client = await serve(fake, image_url_allowed_hosts=frozenset({host.host}))
        broken = base64.b64encode(b"no image").decode()
        inputs = [{"image": broken}, {"image": host.url("/missing.png")}, {"image": host.url("/cat.png")}]
        status, reply = await preview(client, {"input": inputs})
        assert status == 200
        assert [row["refusal"] and row["refusal"]["param"] for row in reply["data"]] == ["input[0].image", "input[1].image", None]
        assert reply["data"][0]["prompt"] is None
        assert reply["data"][0]["images"] == []
    assert fake.embedded == 0


async def test_preview_takes_the_same_body_and_refuses_the_same(client: Client) -> None:
    assert (await preview(client, {"messages": [{"role": "user", "content": "a"}]}))[1]["data"][0]["prompt"] == "default|a"
    for body, param in (({"input": [{}]}, "input[0]"), ({}, "input"), ({"input": "a", "dimensions": 0}, "dimensions")):
        status, reply = await preview(client, body)
        assert (status, reply["error"]["param"]) == (400, param)
    status, reply = await preview(client, {"input": [7, "a"], "partial": True})
    assert (status, reply["data"][0]["refusal"]["param"], reply["data"][1]["refusal"]) == (200, "input[0]", None)
    assert (await preview(client, {"input": "a", "model": "other"}))[0] == 404
    assert client.app[SCHEDULER].queue_depth == 0


async def test_preview_repeats_a_long_instruction_only_so_often(serve: Serve, fake: FakeModel) -> None:
    """A body of 3 MiB would have had a reply of 6 GiB."""
    client = await serve(fake, max_request_bytes=100_000)
    status, reply = await preview(client, {"input": ["a"] * 9, "instruction": "x" * 10_000})
    assert status == 200 and [len(row["prompt"]) for row in reply["data"]] == [10_002] * 9
    for partial in (False, True):
        status, reply = await preview(client, {"input": ["a"] * 10, "instruction": "x" * 10_000, "partial": partial})
        assert (status, reply["error"]["type"]) == (413, "invalid_request_error")
        assert "100,000 characters" in reply["error"]["message"]
    assert (await client.embed({"input": ["a"] * 10, "instruction": "x" * 10_000}))[0] == 200
    status, reply = await preview(
        await serve(fake, max_bytes_in_flight=50_000), {"input": ["a"] * 9, "instruction": "x" * 10_000}
    )
    assert status == 413 and "50,000 bytes" in reply["error"]["message"]


# Metrics


METRICS = {
    "embedding_requests_total",
    "embedding_request_seconds_count",
    "embedding_inputs_total",
    "embedding_shared_total",
    "embedding_tokens_total",
    "embedding_queue_depth",
    "embedding_queue_seconds_count",
    "embedding_prepare_seconds_count",
    "embedding_batch_size_sum",
    "embedding_batch_tokens_sum",
    "embedding_batch_seconds_count",
    "embedding_batches_total",
    "embedding_rejected_total",
    "embedding_dropped_total",
    "embedding_image_fetch_seconds_count",
    "embedding_device_memory_bytes",
    "embedding_ready",
}


async def samples(client: Client) -> dict[str, float]:
    """Samples by name and labels, as `name{label="value"}`."""
    status, headers, body = await bare(client, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def test_metrics_are_all_there_and_move(serve: Serve) -> None:
    fake = FakeModel(fail_text="poison", seconds_per_batch=0.01)
    async with image_host(cat=png(picture())) as host:
        client = await serve(
            fake, image_url_allowed_hosts=frozenset({host.host}), max_queue_size=3, max_inputs_per_request=3, vector_cache_mb=1
        )
        before = await samples(client)
        assert before["embedding_ready"] == 1
        assert (await client.embed({"input": ["abc", {"text": "de", "image": host.url("/cat.png")}]}))[0] == 200
        assert (await client.embed({"input": ["fgh", "fgh", "abc"]}))[0] == 200
        assert (await client.embed({"input": ["poison"]}))[0] == 500
        assert (await client.embed({"input": 7}))[0] == 400
        assert (await client.embed({"input": "a"}, headers={"Authorization": "no"}))[0] == 401
    after = await samples(client)
    assert {name.partition("{")[0] for name in after} >= METRICS
    wanted = {
        'embedding_requests_total{status="200"}': 2,
        'embedding_requests_total{status="500"}': 1,
        'embedding_requests_total{status="400"}': 1,
        'embedding_requests_total{status="401"}': 1,
        "embedding_request_seconds_count": 5,
        'embedding_inputs_total{kind="text"}': 4,
        'embedding_inputs_total{kind="image"}': 1,
        'embedding_shared_total{how="in_flight"}': 1,
        'embedding_shared_total{how="cached"}': 1,
        'embedding_tokens_total{kind="text"}': 3 + 4 + 2 + 4 + 3 + 4,
        'embedding_tokens_total{kind="image"}': 10,
        "embedding_queue_depth": 0,
        "embedding_queue_seconds_count": 5,
        "embedding_prepare_seconds_count": 3,
        "embedding_batch_size_sum": 4,
        "embedding_batch_tokens_sum": 7 + 16 + 7 + 10,
        "embedding_batch_seconds_count": after["embedding_batches_total"],
        'embedding_rejected_total{reason="invalid"}': 1,
        'embedding_rejected_total{reason="unauthorized"}': 1,
        'embedding_dropped_total{reason="fault"}': 1,
        "embedding_image_fetch_seconds_count": 1,
        "embedding_device_memory_bytes": 0,
    }
    assert {name: after.get(name) for name in wanted} == wanted
    assert after["embedding_batch_seconds_sum"] >= 0.02


async def test_metrics_of_what_is_dropped(serve: Serve, clock: Clock) -> None:
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake, max_batch_size=1, max_queue_size=4, max_inputs_per_request=4)
    assert fake.gate is not None
    scheduler = client.app[SCHEDULER]

    async def depth(wanted: int) -> None:
        async with asyncio.timeout(30):
            while scheduler.queue_depth != wanted:
                await asyncio.sleep(0.005)

    try:
        running = asyncio.create_task(client.embed({"input": ["on the device", "waits"]}))
        await depth(1)
        late = asyncio.create_task(client.embed({"input": ["a", "b"]}, headers={"X-Request-Timeout": "30"}))
        await depth(3)
        await until(lambda: len(scheduler._queue) == 3)
        clock.advance(31)
        assert (await late)[0] == 504
        leaving = asyncio.create_task(client.embed({"input": ["a", "b", "c"]}))
        await depth(4)
        assert (await samples(client))["embedding_queue_depth"] == 4
        assert (await client.embed({"input": "a"}))[0] == 429
        leaving.cancel()
        await depth(1)
    finally:
        fake.gate.set()
    assert (await running)[0] == 200
    after = await samples(client)
    assert after['embedding_dropped_total{reason="deadline"}'] == 2
    assert after['embedding_dropped_total{reason="cancelled"}'] == 3
    assert after['embedding_rejected_total{reason="overloaded"}'] == 1
    assert after['embedding_rejected_total{reason="deadline"}'] == 1


async def test_metrics_are_not_ready_while_loading(serve: Serve) -> None:
    release = threading.Event()
    try:
        client = await serve(lambda: release.wait() and FakeModel(), wait=False)
        assert (await samples(client))["embedding_ready"] == 0
    finally:
        release.set()


# The document


async def test_openapi(client: Client) -> None:
    status, headers, body = await bare(client, "/openapi.json")
    assert (status, headers["Content-Type"].partition(";")[0]) == (200, "application/json")
    document = json.loads(body)
    assert document["openapi"].startswith("3.1")
    assert {"/v1/embeddings", "/health", "/metrics", "/v1/models/{id}"} <= set(document["paths"])


def test_the_public_routes_are_those_of_the_contract() -> None:
    paths = {"/", "/health", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/docs"}
    paths |= {f"/assets/{folder}/{{name}}" for folder in ("docs", "playground", "shared")}
    assert {row.path for row in routes(DIALECTS) if row.public} == paths


@pytest.mark.parametrize("path", [*PUBLIC_PATHS, "/v1/models", "/v1/models/Qwen/Qwen3-VL-Embedding-2B"])
async def test_head_is_get_without_a_body(client: Client, path: str) -> None:
    async with client.session.get(path) as got, client.session.head(path) as head:
        assert got.status == head.status == 200
        assert head.headers["Content-Type"] == got.headers["Content-Type"]
        if path not in ("/metrics", "/health"):
            assert head.headers["Content-Length"] == got.headers["Content-Length"]
        assert await got.read()
        assert await head.read() == b""


@pytest.mark.parametrize("path", PUBLIC_PATHS)
async def test_public_routes_need_no_key_and_take_a_wrong_one(client: Client, path: str) -> None:
    assert (await bare(client, path))[0] == 200
    assert (await bare(client, path, headers={"Authorization": "Bearer wrong"}))[0] == 200


# CORS


PAGE = "https://page.example"


async def test_cors_is_off_by_default(client: Client) -> None:
    _, headers, _ = await bare(client, "/health", headers={"Origin": PAGE})
    assert "Access-Control-Allow-Origin" not in headers
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    assert (await bare(client, "/v1/embeddings", "OPTIONS", headers=preflight))[0] == 405


async def test_cors_for_the_origins_of_the_setting(serve: Serve) -> None:
    client = await serve(cors_origins=(PAGE, "http://localhost:3000"))
    for origin in (PAGE, "http://localhost:3000"):
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        status, headers, body = await bare(client, "/v1/embeddings", "OPTIONS", headers=preflight)
        assert (status, body) == (204, b"")
        assert headers["Access-Control-Allow-Origin"] == origin
        assert "POST" in headers["Access-Control-Allow-Methods"]
        assert {"authorization", "content-type"} <= set(headers["Access-Control-Allow-Headers"].lower().split(", "))
        assert headers["X-Request-Id"]
    for path, status in (("/health", 200), ("/v1/models", 401), ("/nothing", 404)):
        got, headers, _ = await bare(client, path, headers={"Origin": PAGE})
        assert (got, headers["Access-Control-Allow-Origin"]) == (status, PAGE)
        assert "Origin" in headers["Vary"]
        assert "X-Request-Id" in headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Credentials" not in headers
    for origin in ("https://other.example", "null", f"{PAGE}.evil.example", "http://page.example"):
        _, headers, _ = await bare(client, "/health", headers={"Origin": origin})
        assert "Access-Control-Allow-Origin" not in headers


async def test_cors_for_every_origin(serve: Serve) -> None:
    client = await serve(cors_origins=("*",))
    _, headers, _ = await bare(client, "/health", headers={"Origin": "https://any.example"})
    assert headers["Access-Control-Allow-Origin"] == "*"


# The log


async def test_the_log_has_one_line_without_secrets(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with image_host(cat=png(picture())) as host:
        client = await serve(image_url_allowed_hosts=frozenset({host.host}))
        body = {
            "input": [{"text": "T0p-secret", "image": host.url("/cat.png?token=s1gned")}, {"text": "b"}],
            "instruction": "Wh1sper",
            "user": "al1ce",
        }
        async with client.session.post("/v1/embeddings?key=qu3ry", json=body, headers={"X-Request-Id": "the-id"}) as reply:
            assert reply.status == 200
        body["input"] = [{"image": host.url("/missing.png?token=s1gned")}]
        assert (await client.embed(body))[0] == 400
        assert (await client.embed({"input": 7, "user": "al1ce"}, headers={"Authorization": "Bearer wr0ng"}))[0] == 401
    (line,) = (record.getMessage() for record in records_of(caplog, "the-id") if record.levelno == logging.INFO)
    assert re.fullmatch(r"POST /v1/embeddings 200 key=test inputs=2 tokens=29 \d+\.\dms", line)
    for secret in ("T0p-secret", "s1gned", "Wh1sper", "al1ce", "qu3ry", "wr0ng", KEY, AUTH["Authorization"]):
        assert secret not in caplog.text


async def test_the_log_has_no_control_characters(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with client.session.get("/nothing/%0A%1B[31mFORGED%0Dline") as reply:
        assert reply.status == 404
    async with client.session.get("/v1/models/%0A%1B[31mFORGED") as reply:
        assert reply.status == 404
    async with connect(client.port) as raw:
        await raw.send(post(b"{}", "X-Request-Id: a\x1b[31mFORGED"))
        await raw.rest()
    async with connect(client.port) as raw:
        await raw.send(b"FOR\x1bGED / HTTP/1.1\r\nHost: test\r\n\r\n")
        await raw.rest()
    for record in caplog.records:
        assert record.getMessage().isprintable()
        assert "FORGED" not in record.getMessage()


async def test_a_client_that_leaves_has_its_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake)
    assert fake.gate is not None
    try:
        leaving = asyncio.create_task(client.embed({"input": "a"}, headers={"X-Request-Id": "the-id"}))
        async with asyncio.timeout(30):
            while not client.app[LIFECYCLE].in_flight:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            leaving.cancel()
            while client.app[LIFECYCLE].in_flight:
                await asyncio.sleep(0.005)
    finally:
        fake.gate.set()
    (line,) = (record.getMessage() for record in records_of(caplog, "the-id"))
    assert re.fullmatch(r"POST /v1/embeddings client gone \d+\.\dms", line)
    assert client.app[SCHEDULER].state is State.READY
