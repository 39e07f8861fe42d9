"""The URL table."""

from __future__ import annotations

from aiohttp import hdrs, web

# Paths that need no key.
PUBLIC = frozenset({"/", "/health", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/docs", "/assets/{name}"})


async def withhold_continue(request: web.Request) -> None:
    """`Expect: 100-continue` is answered by whoever reads the body: a request that is refused never sends it."""
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        raise web.HTTPExpectationFailed(text="")


def add_routes(router: web.UrlDispatcher, playground: bool = True) -> None:
    """Every route of the service. Without the playground its path is like any that does not exist."""
    from app.http import handlers, pages

    public = [
        ("GET", "/health", handlers.health),
        ("GET", "/health/live", handlers.health_live),
        ("GET", "/health/ready", handlers.health_ready),
        ("GET", "/metrics", handlers.metrics),
        ("GET", "/openapi.json", handlers.openapi),
        ("GET", "/docs", pages.docs),
        ("GET", "/assets/{name}", pages.asset),
    ]
    if playground:
        public.append(("GET", "/", pages.playground))
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
