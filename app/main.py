"""The composition root: what the service is made of, and in what order it starts and stops."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from functools import partial

from aiohttp import web

from app.auth import auth_middleware
from app.engine import Engine, LoadModel
from app.keys import ENGINE, LIFECYCLE, MEMORY, METRICS, SCHEDULER, SERVICE, SETTINGS
from app.lifecycle import ExitCode, Lifecycle
from app.middlewares import cors_middleware, error_middleware
from app.routes import add_routes
from app.settings import Settings
from models.base import DeviceUnavailable, EmbeddingModel, ModelLoadError

log = logging.getLogger(__name__)


def create_app(
    settings: Settings, load_model: LoadModel | None = None, on_ready: Callable[[], None] = lambda: None
) -> web.Application:
    """The application. `load_model` runs in the device's thread; by default it loads what the settings name. `on_ready` is called
    on the event loop when the model is ready, before any request is taken."""
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
    add_routes(app.router, settings.playground)
    app.cleanup_ctx.append(run_engine)
    return app


def load_configured_model(settings: Settings) -> EmbeddingModel:
    """Find or download the checkpoint, and load it. Raises ModelLoadError."""
    # torch and transformers take seconds to import: the port is open by then.
    from models.devices import resolve_device
    from models.registry import load_model
    from models.weights import find_or_download

    device = resolve_device(settings.device)
    path = find_or_download(
        settings.model_path, settings.model_id, may_download=settings.may_download, allow_pickle=settings.allow_pickle
    )
    return load_model(
        path,
        device=device,
        dtype=settings.dtype,
        backend=settings.backend,
        compile=settings.compile,
        max_image_width=settings.max_image_width,
        max_image_height=settings.max_image_height,
        allow_pickle=settings.allow_pickle,
    )


async def run_engine(app: web.Application) -> AsyncIterator[None]:
    """Start and stop of what turns requests into vectors."""
    async with app[ENGINE].running() as app[SERVICE]:
        yield


def end_on_failure(lifecycle: Lifecycle, error: BaseException, loaded: bool) -> None:
    """A model that does not load, or a device that is lost, ends the process: with a code that says which."""
    if loaded:
        log.critical("the device has failed: %s", error)
        lifecycle.end(ExitCode.DEVICE_FAILED)
    elif isinstance(error, ModelLoadError):
        log.critical("%s", error)
        lifecycle.end(ExitCode.SETTINGS_WRONG if isinstance(error, DeviceUnavailable) else ExitCode.START_FAILED)
    else:
        log.critical("the model cannot be loaded", exc_info=error)
        lifecycle.end(ExitCode.START_FAILED)
