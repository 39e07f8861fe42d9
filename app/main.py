"""The composition root: what the service is made of, and in what order it starts and stops."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aiohttp import web

from app.auth import auth_middleware
from app.cores import usable_cores
from app.embedding_service import EmbeddingService
from app.image_fetch import ImageFetcher
from app.keys import LIFECYCLE, MEMORY, METRICS, SCHEDULER, SERVICE, SETTINGS
from app.lifecycle import ExitCode, Lifecycle
from app.memory import MemoryBudget, PixelBudget
from app.metrics import Metrics
from app.middlewares import cors_middleware, error_middleware
from app.preparation import Tools
from app.preparation_threads import PreparationThreads
from app.routes import add_routes
from app.settings import Settings
from models.base import DeviceUnavailable, EmbeddingModel, ModelLoadError
from scheduler.scheduler import Limits, Scheduler, State

log = logging.getLogger(__name__)

# Images of MAX_IMAGE_PIXELS that are decoded at the same time, at most; of smaller ones as many as there are threads.
DECODED_AT_ONCE = 2

LoadModel = Callable[[], EmbeddingModel]


def create_app(
    settings: Settings, load_model: LoadModel | None = None, on_ready: Callable[[], None] = lambda: None
) -> web.Application:
    """The application. `load_model` runs in the device's thread; by default it loads what the settings name. `on_ready` is called
    on the event loop when the model is ready, before any request is taken."""
    app = web.Application(middlewares=[cors_middleware, error_middleware, auth_middleware])
    app[SETTINGS] = settings
    app[METRICS] = Metrics()
    app[LIFECYCLE] = Lifecycle()
    app[SCHEDULER] = make_scheduler(app, load_model or partial(load_configured_model, settings), on_ready)
    app[MEMORY] = MemoryBudget(settings.max_bytes_in_flight, app[SCHEDULER].retry_after)
    add_routes(app.router, settings.playground)
    app.cleanup_ctx.extend([run_scheduler, run_service])
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


def make_scheduler(app: web.Application, load_model: LoadModel, on_ready: Callable[[], None]) -> Scheduler:
    """The scheduler, its limits from the settings and its reports to metrics and lifecycle."""
    settings, metrics = app[SETTINGS], app[METRICS]
    limits = Limits(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_wait=settings.max_batch_wait_ms / 1000,
        max_queue_size=settings.max_queue_size,
        max_input_tokens=settings.max_input_tokens,
        worker_stall=settings.worker_stall_s,
        vector_cache_bytes=settings.vector_cache_mb << 20,
    )

    def ready(model: EmbeddingModel) -> None:
        note_ready(settings, model)
        on_ready()

    return Scheduler(
        load_model,
        limits,
        on_ready=ready,
        on_batch=metrics.on_batch,
        on_failure=partial(end_on_failure, app[LIFECYCLE]),
    )


async def run_scheduler(app: web.Application) -> AsyncIterator[None]:
    """Start and stop of the device's thread."""
    scheduler = app[SCHEDULER]
    app[METRICS].watch(
        queue_depth=lambda: scheduler.queue_depth,
        device_memory=lambda: scheduler.loaded_model.memory_bytes() if scheduler.loaded_model else 0,
        ready=lambda: scheduler.state is State.READY,
    )
    await scheduler.start()
    yield
    await scheduler.stop()


async def run_service(app: web.Application) -> AsyncIterator[None]:
    """Start and stop of the image downloads and the threads for preprocessing and for bodies."""
    settings = app[SETTINGS]
    fetcher = ImageFetcher(
        timeout_s=settings.image_fetch_timeout_s,
        max_bytes=settings.max_image_bytes,
        allowed_hosts=settings.image_url_allowed_hosts,
    )
    threads = PreparationThreads(usable_cores())
    bodies = ThreadPoolExecutor(2, thread_name_prefix="bodies")
    with threads, bodies:
        async with fetcher:
            tools = Tools(settings, fetcher, app[METRICS], threads, PixelBudget(DECODED_AT_ONCE * settings.max_image_pixels))
            app[SERVICE] = EmbeddingService(app[SCHEDULER], tools, bodies)
            yield


def note_ready(settings: Settings, model: EmbeddingModel) -> None:
    """Say what is served, and what the operator may not expect of it."""
    info = model.info
    log.info("serving %s (%s) on %s in %s, width %d", settings.model_name, info.model_type, info.device, info.dtype, info.width)
    wanted = settings.embedding_dimension
    if wanted is not None and wanted > info.width:
        log.warning(
            "EMBEDDING_DIMENSION=%d is more than the model's width of %d: vectors are filled up with zeros, which leaves every "
            "cosine as it was; EMBEDDING_DIMENSION=native gives the model's own width",
            wanted,
            info.width,
        )


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
