"""Routes: a row for each path, with its handler, whether it needs a key, and what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from aiohttp import hdrs, web

from app.dialects.dialect import Dialect
from app.http import handlers, pages
from app.http.keys import ROUTES
from app.http.route import Route
from app.openapi import operations
from app.openapi.operations import embeddings_of, preview_of


def routes(dialects: Sequence[Dialect], playground: bool = True) -> list[Route]:
    """Lists every route of a server that speaks these dialects. Without the playground its path is like any that is not there."""
    first = dialects[0]
    rows = [
        Route("POST", path, partial(handlers.create_embeddings, dialect), embeddings_of(dialect), dialect)
        for dialect in dialects
        for path in dialect.paths
    ]
    preview = partial(handlers.preview_embeddings, first)
    rows += [
        Route("POST", "/v1/embeddings/preview", preview, preview_of(first), first),
        Route("GET", "/v1/models", handlers.list_models, operations.LIST_MODELS, first),
        Route("GET", "/v1/models/{id:.+}", handlers.get_model, operations.GET_MODEL, first),
        Route("GET", "/health", handlers.health, operations.HEALTH, first, public=True),
        Route("GET", "/health/live", handlers.health_live, operations.LIVENESS, first, public=True),
        Route("GET", "/health/ready", handlers.health_ready, operations.READINESS, first, public=True),
        Route("GET", "/metrics", handlers.metrics, operations.METRICS, first, public=True),
        Route("GET", "/openapi.json", handlers.openapi, operations.DOCUMENT, first, public=True),
        Route("GET", "/docs", pages.docs, operations.DOCS, first, public=True),
        Route("GET", "/assets/docs/{name}", partial(pages.asset, pages.DOCS), None, first, public=True),
        Route("GET", "/assets/shared/{name}", partial(pages.asset, pages.SHARED), None, first, public=True),
    ]
    if playground:
        rows += [
            Route("GET", "/", pages.playground, operations.PLAYGROUND, first, public=True),
            Route("GET", "/assets/playground/{name}", partial(pages.asset, pages.PLAYGROUND), None, first, public=True),
        ]
    return rows


def add_routes(app: web.Application, rows: Sequence[Route]) -> None:
    """Adds routes to an application; what can be read by GET can be asked for by HEAD."""
    table: dict[str, Route] = {}
    for row in rows:
        for method in (row.method, *(["HEAD"] if row.method == "GET" else [])):
            route = app.router.add_route(method, row.path, row.handler, expect_handler=withhold_continue)
            assert route.resource is not None
            table[route.resource.canonical] = row
    app[ROUTES] = table


async def withhold_continue(request: web.Request) -> None:
    """Leaves `Expect: 100-continue` to whoever reads the body: a request that is refused never sends it."""
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        raise web.HTTPExpectationFailed(text="")
