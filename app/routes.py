"""The URL table."""

from __future__ import annotations

from aiohttp import hdrs, web

# Paths that need no key.
PUBLIC = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/docs", "/docs/{name}"})


async def withhold_continue(request: web.Request) -> None:
    """`Expect: 100-continue` is answered by whoever reads the body: a request that is refused never sends it."""
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        raise web.HTTPExpectationFailed(text="")


def add_routes(router: web.UrlDispatcher) -> None:
    """Every route of the service."""
    from app import handlers

    public = [
        ("GET", "/health", handlers.health),
        ("GET", "/health/live", handlers.health_live),
        ("GET", "/health/ready", handlers.health_ready),
        ("GET", "/metrics", handlers.metrics),
        ("GET", "/openapi.json", handlers.openapi),
        ("GET", "/docs", handlers.docs),
        ("GET", "/docs/{name}", handlers.docs_asset),
    ]
    protected = [
        ("POST", "/v1/embeddings", handlers.create_embeddings),
        ("POST", "/v1/embeddings/preview", handlers.preview_embeddings),
        ("GET", "/v1/models", handlers.list_models),
        ("GET", "/v1/models/{id:.+}", handlers.get_model),
    ]
    for method, path, handler in [*public, *protected]:
        router.add_route(method, path, handler, expect_handler=withhold_continue)
        if method == "GET":
            router.add_route("HEAD", path, handler, expect_handler=withhold_continue)
