"""One short coroutine per endpoint; those of the pages are in app.http.pages."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from app import VERSION
from app.dialects import request as dialects
from app.dialects.request import EmbeddingRequest, InvalidRequest, ModelNotFound
from app.engine.memory import MemoryShare
from app.engine.service import LARGE_ROWS
from app.errors import error_object, spec_for
from app.http.bodies import read_body
from app.http.keys import ENGINE, LIFECYCLE, LOG, MEMORY, METRICS, SCHEDULER, SERVICE, SETTINGS, RequestLog
from app.http.replies import embeddings_body
from app.openapi.document import openapi_document
from models.base import Description
from scheduler.scheduler import State

log = logging.getLogger(__name__)

# Bodies from here on are read off the event loop: about a millisecond of work.
LARGE_BODY_BYTES = 64 * 1024


async def create_embeddings(request: web.Request) -> web.Response:
    """POST /v1/embeddings"""
    deadline = request_deadline(request)
    service, entry = request.app[SERVICE], request[LOG]
    with request.app[MEMORY].share() as memory:
        parsed = await read_request(request, memory)
        entry.inputs = len(parsed.items)
        outcome = await service.embed(parsed, deadline, memory)
        entry.tokens, entry.timings = outcome.usage.total, outcome.timings
        log_fault(entry, outcome.rows)
        arguments = (outcome.rows, outcome.usage, request.app[SETTINGS].model_name, parsed.encoding_format)
        large = len(outcome.rows) > LARGE_ROWS
        body = await service.off_loop(embeddings_body, *arguments) if large else embeddings_body(*arguments)
    headers = {"X-Model-Fingerprint": fingerprint(request.app) or ""}
    return web.Response(body=body, content_type="application/json", headers=headers)


async def preview_embeddings(request: web.Request) -> web.Response:
    """POST /v1/embeddings/preview"""
    deadline = request_deadline(request)
    service, entry = request.app[SERVICE], request[LOG]
    with request.app[MEMORY].share() as memory:
        parsed = await read_request(request, memory)
        entry.inputs = len(parsed.items)
        started = time.monotonic()
        described = await service.describe(parsed, deadline, memory)
        entry.timings = {"prepare": time.monotonic() - started}
        arguments = (described, [item.param for item in parsed.items], request.app[SETTINGS].model_name)
        large = len(described) > LARGE_ROWS or parsed.characters > LARGE_BODY_BYTES
        body = await service.off_loop(preview_body, *arguments) if large else preview_body(*arguments)
    headers = {"X-Model-Fingerprint": fingerprint(request.app) or ""}
    return web.Response(body=body, content_type="application/json", headers=headers)


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    return json_reply({"object": "list", "data": [model_row(request.app)]})


async def get_model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}"""
    settings = request.app[SETTINGS]
    if request.match_info["id"] not in (settings.model_name, settings.model_id):
        raise ModelNotFound(f"no such model; this server has {settings.model_name}")
    return json_reply(model_row(request.app))


async def health(request: web.Request) -> web.Response:
    """GET /health"""
    app = request.app
    settings, scheduler = app[SETTINGS], app[SCHEDULER]
    info = app[ENGINE].info
    body = {
        "status": status(app),
        "model": settings.model_name,
        "model_path": str(settings.model_path),
        "device": info.device if info else None,
        "cuda_available": info.cuda_available if info else None,
        "embedding_dimension": embedding_dimension(app),
        "max_image_width": settings.max_image_width,
        "max_image_height": settings.max_image_height,
        "native_dimension": info.width if info else None,
        "dtype": info.dtype if info else None,
        "queue_depth": scheduler.queue_depth,
        "uptime_seconds": round(app[LIFECYCLE].uptime(), 3),
        "version": VERSION,
        "fingerprint": fingerprint(app),
    }
    return json_reply(body, 200 if body["status"] == State.READY.value else 503)


async def health_live(request: web.Request) -> web.Response:
    """GET /health/live"""
    failed = request.app[SCHEDULER].state is State.FAILED
    return json_reply({"status": status(request.app)}, 503 if failed else 200)


async def health_ready(request: web.Request) -> web.Response:
    """GET /health/ready"""
    ready = request.app[SCHEDULER].state is State.READY
    return json_reply({"status": status(request.app)}, 200 if ready else 503)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics"""
    headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    return web.Response(body=request.app[METRICS].render(), headers=headers)


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json"""
    settings = request.app[SETTINGS]
    return json_reply(
        openapi_document(
            version=VERSION,
            model_name=settings.model_name,
            dimension=embedding_dimension(request.app),
            max_inputs=settings.max_inputs_per_request,
            auth_required=not settings.auth_disabled,
            playground=settings.playground,
        )
    )


async def read_request(request: web.Request, memory: MemoryShare) -> EmbeddingRequest:
    """The validated request, which `memory` holds then. What needs no body is refused before the body is read."""
    app = request.app
    settings, scheduler, service = app[SETTINGS], app[SCHEDULER], app[SERVICE]
    scheduler.check_open()
    body = await read_body(request, settings.max_request_bytes, settings.body_timeout_s, memory)
    scheduler.check_open()
    limits = app[ENGINE].request_limits()
    large = len(body) > LARGE_BODY_BYTES
    parsed = await service.off_loop(dialects.parse, body, limits) if large else dialects.parse(body, limits)
    memory.add(parsed.num_bytes - len(body))
    return parsed


def request_deadline(request: web.Request) -> float:
    """When the device must have taken the request, on the loop's clock. X-Request-Timeout, a number of seconds, is capped by
    REQUEST_TIMEOUT_S. Raises InvalidRequest."""
    now, longest = asyncio.get_running_loop().time(), request.app[SETTINGS].request_timeout_s
    given = request.headers.get("X-Request-Timeout")
    if given is None:
        return now + longest
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", given, re.ASCII) or not float(given):
        raise InvalidRequest("X-Request-Timeout must be a number of seconds above 0, such as 2.5", "X-Request-Timeout")
    return now + min(float(given), longest)


def log_fault(entry: RequestLog, rows: Sequence[object]) -> None:
    """A fault of ours in a row of a partial result is in the log like any other: with its trace, under the request's id."""
    faults = [row for row in rows if isinstance(row, Exception) and spec_for(row).status == 500]
    if faults:
        log.error("%s %d of %d inputs failed", entry.request_id, len(faults), len(rows), exc_info=faults[0])


def status(app: web.Application) -> str:
    return app[SCHEDULER].state.value


def embedding_dimension(app: web.Application) -> int | None:
    return app[ENGINE].dimension


def fingerprint(app: web.Application) -> str | None:
    return app[ENGINE].fingerprint


def model_row(app: web.Application) -> dict[str, Any]:
    settings = app[SETTINGS]
    return {
        "id": settings.model_name,
        "object": "model",
        "created": app[LIFECYCLE].created,
        "owned_by": settings.model_id.partition("/")[0],
        "root": settings.model_id,
        "fingerprint": fingerprint(app),
        "embedding_dimension": embedding_dimension(app),
        "max_input_tokens": app[ENGINE].max_input_tokens,
    }


def preview_body(described: Sequence[Description | Exception], params: Sequence[str | None], model: str) -> bytes:
    """The body of a preview's reply, written row by row as that of embeddings is."""
    places = enumerate(zip(described, params, strict=True))
    rows = b",".join(orjson.dumps(preview_row(index, row, param)) for index, (row, param) in places)
    return b'{"object":"list","model":%b,"data":[%b]}' % (orjson.dumps(model), rows)


def preview_row(index: int, row: Description | Exception, param: str | None) -> dict[str, Any]:
    """What the model would read of an input at place `param`, or why it cannot be had."""
    head = {"object": "embedding.preview", "index": index}
    if isinstance(row, Exception):
        unknown = dict.fromkeys(("prompt", "text_tokens", "image_tokens", "total_tokens"))
        return {**head, **unknown, "images": [], "truncated": False, "refusal": error_object(row)}
    return {
        **head,
        "prompt": row.prompt,
        "text_tokens": row.text_tokens,
        "image_tokens": row.image_tokens,
        "total_tokens": None if row.text_tokens is None else row.text_tokens + row.image_tokens,
        "images": [
            {
                "original_width": image.original_size[0],
                "original_height": image.original_size[1],
                "width": image.size[0],
                "height": image.size[1],
                "grid_rows": image.grid[0],
                "grid_columns": image.grid[1],
                "tokens": image.num_tokens,
                "official_width": (image.official_size or image.size)[0],
                "official_height": (image.official_size or image.size)[1],
                "smaller_than_official": image.official_size is not None,
            }
            for image in row.images
        ],
        "truncated": row.truncated,
        "refusal": error_object(InvalidRequest(row.refusal, param)) if row.refusal else None,
    }


def json_reply(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
