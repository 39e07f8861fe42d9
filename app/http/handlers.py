"""Handlers: one short coroutine per endpoint, and one for all dialects; those of the pages are in app.http.pages."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from app import VERSION
from app.dialects.contract import EmbeddingRequest, InvalidRequest, ModelNotFound, Reply
from app.dialects.dialect import Dialect
from app.dialects.fields import Server
from app.dialects.openai import error_detail
from app.engine.memory import MemoryShare
from app.engine.service import LARGE_ROWS
from app.errors import failure_of
from app.http.bodies import read_body
from app.http.keys import ENGINE, LIFECYCLE, LOG, MEMORY, METRICS, ROUTES, SCHEDULER, SERVICE, SETTINGS
from app.openapi.document import Documented, openapi_document
from app.openapi.replies import Health, Model, ModelList, Preview, PreviewImage, PreviewList, Probe
from models.base import Description, ImageGrid, Refusal
from scheduler.scheduler import State

# Bodies from here on are read off the event loop: about a millisecond of work.
LARGE_BODY_BYTES = 64 * 1024


async def create_embeddings(dialect: Dialect, request: web.Request) -> web.Response:
    """Answers a request for embeddings, in whatever dialect: POST /v1/embeddings and the like."""
    deadline = request_deadline(request)
    app, entry = request.app, request[LOG]
    with app[MEMORY].share() as memory:
        parsed = await read_request(dialect, request, memory)
        entry.inputs = len(parsed.items)
        outcome = await app[SERVICE].embed(parsed, deadline, memory)
        entry.tokens, entry.timings = outcome.usage.total, outcome.timings
        rows = [failure_of(row) if isinstance(row, Refusal) else row for row in outcome.rows]
        reply = Reply(parsed, rows, outcome.usage, app[SETTINGS].model_name)
        body = await app[ENGINE].bodies.run(len(rows) > LARGE_ROWS, dialect.write, reply)
    return vectors_reply(app, body)


async def preview_embeddings(dialect: Dialect, request: web.Request) -> web.Response:
    """POST /v1/embeddings/preview"""
    deadline = request_deadline(request)
    app, entry = request.app, request[LOG]
    with app[MEMORY].share() as memory:
        parsed = await read_request(dialect, request, memory)
        entry.inputs = len(parsed.items)
        started = time.monotonic()
        described = await app[SERVICE].describe(parsed, deadline, memory)
        entry.timings = {"prepare": time.monotonic() - started}
        large = len(described) > LARGE_ROWS or parsed.characters > LARGE_BODY_BYTES
        params = [item.param for item in parsed.items]
        body = await app[ENGINE].bodies.run(large, preview_body, described, params, app[SETTINGS].model_name)
    return vectors_reply(app, body)


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    return json_reply(ModelList([served_model(request.app)]))


async def get_model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}"""
    settings = request.app[SETTINGS]
    if request.match_info["id"] not in (settings.model_name, settings.model_id):
        raise ModelNotFound(f"no such model; this server has {settings.model_name}")
    return json_reply(served_model(request.app))


async def health(request: web.Request) -> web.Response:
    """GET /health"""
    app = request.app
    settings, engine, state = app[SETTINGS], app[ENGINE], app[SCHEDULER].state
    info = engine.info
    body = Health(
        status=state.value,
        model=settings.model_name,
        model_path=str(settings.model_path),
        device=info.device if info else None,
        cuda_available=info.cuda_available if info else None,
        embedding_dimension=engine.dimension,
        max_image_width=settings.max_image_width,
        max_image_height=settings.max_image_height,
        native_dimension=info.width if info else None,
        dtype=info.dtype if info else None,
        queue_depth=app[SCHEDULER].queue_depth,
        uptime_seconds=round(app[LIFECYCLE].uptime(), 3),
        version=VERSION,
        fingerprint=engine.fingerprint,
    )
    return json_reply(body, 200 if state is State.READY else 503)


async def health_live(request: web.Request) -> web.Response:
    """GET /health/live"""
    state = request.app[SCHEDULER].state
    return json_reply(Probe(state.value), 503 if state is State.FAILED else 200)


async def health_ready(request: web.Request) -> web.Response:
    """GET /health/ready"""
    state = request.app[SCHEDULER].state
    return json_reply(Probe(state.value), 200 if state is State.READY else 503)


async def metrics(request: web.Request) -> web.StreamResponse:
    """GET /metrics"""
    return await make_aiohttp_handler(request.app[METRICS].registry)(request)


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json"""
    app = request.app
    settings = app[SETTINGS]
    routes = [Documented(row.method, path, row.public, row.operation) for path, row in app[ROUTES].items() if row.operation]
    server = Server(settings.model_name, app[ENGINE].dimension, settings.max_inputs_per_request)
    return json_reply(openapi_document(routes, server, version=VERSION, auth_required=not settings.auth_disabled))


async def read_request(dialect: Dialect, request: web.Request, memory: MemoryShare) -> EmbeddingRequest:
    """Reads and validates a request, which `memory` holds then. What needs no body is refused before the body is read."""
    app = request.app
    settings, scheduler, engine = app[SETTINGS], app[SCHEDULER], app[ENGINE]
    scheduler.check_open()
    body = await read_body(request, settings.max_request_bytes, settings.body_timeout_s, memory)
    scheduler.check_open()
    parsed = await engine.bodies.run(len(body) > LARGE_BODY_BYTES, dialect.parse, body, engine.request_limits())
    memory.add(parsed.num_bytes - len(body))
    return parsed


def request_deadline(request: web.Request) -> float:
    """Returns when the device must have taken the request, on the loop's clock. X-Request-Timeout, a number of seconds, is capped
    by REQUEST_TIMEOUT_S. Raises InvalidRequest."""
    now, longest = asyncio.get_running_loop().time(), request.app[SETTINGS].request_timeout_s
    given = request.headers.get("X-Request-Timeout")
    if given is None:
        return now + longest
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", given, re.ASCII) or not float(given):
        raise InvalidRequest("X-Request-Timeout must be a number of seconds above 0, such as 2.5", "X-Request-Timeout")
    return now + min(float(given), longest)


def served_model(app: web.Application) -> Model:
    """Describes the model as /v1/models lists it."""
    settings, engine = app[SETTINGS], app[ENGINE]
    return Model(
        id=settings.model_name,
        created=app[LIFECYCLE].created,
        owned_by=settings.model_id.partition("/")[0],
        root=settings.model_id,
        fingerprint=engine.fingerprint,
        embedding_dimension=engine.dimension,
        max_input_tokens=engine.max_input_tokens,
    )


def preview_body(described: Sequence[Description | Refusal], params: Sequence[str | None], model: str) -> bytes:
    """Writes the body of a preview's reply, row by row as that of embeddings is."""
    places = enumerate(zip(described, params, strict=True))
    rows: list[Any] = [orjson.Fragment(orjson.dumps(preview(index, row, param))) for index, (row, param) in places]
    return orjson.dumps(PreviewList(model=model, data=rows))


def preview(index: int, row: Description | Refusal, param: str | None) -> Preview:
    """Says what the model would read of an input at place `param`, or why it cannot be had."""
    if isinstance(row, Refusal):
        return Preview(
            index=index,
            prompt=None,
            text_tokens=None,
            image_tokens=None,
            total_tokens=None,
            images=[],
            truncated=False,
            refusal=error_detail(failure_of(row)),
        )
    return Preview(
        index=index,
        prompt=row.prompt,
        text_tokens=row.text_tokens,
        image_tokens=row.image_tokens,
        total_tokens=None if row.text_tokens is None else row.text_tokens + row.image_tokens,
        images=[preview_image(image) for image in row.images],
        truncated=row.truncated,
        refusal=error_detail(failure_of(Refusal(row.refusal, param))) if row.refusal else None,
    )


def preview_image(image: ImageGrid) -> PreviewImage:
    """Says how an image is read."""
    official = image.official_size or image.size
    return PreviewImage(
        original_width=image.original_size[0],
        original_height=image.original_size[1],
        width=image.size[0],
        height=image.size[1],
        grid_rows=image.grid[0],
        grid_columns=image.grid[1],
        tokens=image.num_tokens,
        official_width=official[0],
        official_height=official[1],
        smaller_than_official=image.official_size is not None,
    )


def vectors_reply(app: web.Application, body: bytes) -> web.Response:
    """Makes a reply that says which model its body speaks of."""
    headers = {"X-Model-Fingerprint": app[ENGINE].fingerprint or ""}
    return web.Response(body=body, content_type="application/json", headers=headers)


def json_reply(body: Any, status: int = 200) -> web.Response:
    """Makes a reply of a reply type, or of a dict."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
