"""The composition root: what the service is made of, and in what order it starts and stops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from aiohttp import web

from app.dialects.dialect import Dialect
from app.dialects.registry import DIALECTS
from app.engine.engine import Engine, LoadModel
from app.engine.loading import end_on_failure, load_configured_model
from app.http.auth import auth_middleware
from app.http.keys import DIALECT, ENGINE, LIFECYCLE, MEMORY, METRICS, SCHEDULER, SERVICE, SETTINGS
from app.http.middlewares import cors_middleware, error_middleware
from app.http.routes import add_routes, routes
from app.lifecycle import Lifecycle
from app.settings import Settings


def create_app(
    settings: Settings,
    load_model: LoadModel | None = None,
    on_ready: Callable[[], None] = lambda: None,
    dialects: Sequence[Dialect] = DIALECTS,
) -> web.Application:
    """Makes the application. `load_model` runs in the device's thread; by default it loads what the settings name. `on_ready`
    is called on the event loop when the model is ready, before any request is taken."""
    app = web.Application(middlewares=[cors_middleware, error_middleware, auth_middleware])
    app[SETTINGS] = settings
    app[LIFECYCLE] = Lifecycle()
    app[ENGINE] = engine = Engine(
        settings,
        load_model or partial(load_configured_model, settings),
        on_ready=on_ready,
        on_failure=partial(end_on_failure, app[LIFECYCLE]),
    )
    app[METRICS], app[SCHEDULER], app[MEMORY] = engine.metrics, engine.scheduler, engine.memory
    app[DIALECT] = dialects[0]
    add_routes(app, routes(dialects, settings.playground))
    app.cleanup_ctx.append(run_engine)
    return app


async def run_engine(app: web.Application) -> AsyncIterator[None]:
    """Starts and stops what turns requests into vectors."""
    async with app[ENGINE].running() as app[SERVICE]:
        yield
