"""Engine: all that turns a request into vectors, put together once. app.http puts HTTP around it; `python -m app embed` uses it
as it is."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from app.dialects.contract import MAX_URL_LENGTH, RequestLimits
from app.engine.memory import MemoryBudget, PixelBudget
from app.engine.metrics import Metrics
from app.engine.preparation import Tools
from app.engine.service import EmbeddingService
from app.engine.threads import BodyThreads, PreparationThreads
from app.media.fetch import ImageFetcher
from app.process import usable_cores
from app.settings import Settings
from models.base import EmbeddingModel, LoadedModel, ModelInfo, Preparer
from scheduler.errors import NotReady
from scheduler.scheduler import Limits, Scheduler, State

log = logging.getLogger(__name__)

# Images of MAX_IMAGE_PIXELS that are decoded at the same time, at most; of smaller ones as many as there are threads.
DECODED_AT_ONCE = 2

LoadModel = Callable[[], LoadedModel]


class Engine:
    """Model, scheduler, memory and metrics of one process. `load_model` runs in the device's thread; `on_ready` is called on the
    event loop when the model is ready, before any request is taken; `on_failure(error, loaded)` when it cannot be loaded, or the
    device is lost."""

    def __init__(
        self,
        settings: Settings,
        load_model: LoadModel,
        *,
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException, bool], None],
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self._preparer: Preparer | None = None

        def load() -> EmbeddingModel:
            loaded = load_model()
            self._preparer = loaded.preparer
            return loaded.model

        def ready() -> None:
            note_ready(settings, self.preparer.info)
            on_ready()

        self.scheduler = Scheduler(
            load,
            scheduler_limits(settings),
            on_ready=ready,
            on_batch=self.metrics.on_batch,
            on_failure=on_failure,
        )
        self.bodies = BodyThreads()
        self.memory = MemoryBudget(settings.max_bytes_in_flight, self.scheduler.retry_after)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[EmbeddingService]:
        """Starts and stops the device's thread, the image downloads, and the threads for preprocessing and for bodies."""
        scheduler, settings = self.scheduler, self.settings
        self.metrics.watch(
            queue_depth=lambda: scheduler.queue_depth,
            device_memory=lambda: scheduler.loaded_model.memory_bytes() if scheduler.loaded_model else 0,
            ready=lambda: scheduler.state is State.READY,
        )
        fetcher = ImageFetcher(
            timeout_s=settings.image_fetch_timeout_s,
            max_bytes=settings.max_image_bytes,
            max_url_length=MAX_URL_LENGTH,
            allowed_hosts=settings.image_url_allowed_hosts,
        )
        await scheduler.start()
        try:
            with PreparationThreads(usable_cores()) as threads, self.bodies:
                async with fetcher:
                    pixels = PixelBudget(DECODED_AT_ONCE * settings.max_image_pixels)
                    tools = Tools(settings, fetcher, self.metrics, threads, pixels)
                    yield EmbeddingService(scheduler, lambda: self.preparer, tools, self.bodies)
        finally:
            await scheduler.stop()

    @property
    def preparer(self) -> Preparer:
        """What prepares the model's inputs. Raises NotReady while the model loads."""
        if self._preparer is None or self.scheduler.loaded_model is None:
            raise NotReady("the model is loading")
        return self._preparer

    @property
    def info(self) -> ModelInfo | None:
        """What the loaded model is; None while it loads."""
        return self._preparer.info if self._preparer and self.scheduler.loaded_model else None

    @property
    def dimension(self) -> int | None:
        """The components of a vector; None if they are the model's own and the model is loading."""
        return self.settings.embedding_dimension or (self.info.width if self.info else None)

    @property
    def max_input_tokens(self) -> int:
        """The most tokens of an input: as set, and no more than the model reads."""
        limit = self.settings.max_input_tokens
        return min(limit, self.info.max_tokens) if self.info else limit

    @property
    def fingerprint(self) -> str | None:
        """The model's fingerprint and the dimension in one: equal ones mean comparable vectors. None while the model loads."""
        if self.info is None:
            return None
        return hashlib.sha256(f"{self.info.fingerprint}:{self.dimension}".encode()).hexdigest()[:16]

    def request_limits(self) -> RequestLimits:
        """Returns what a request may ask for. Raises NotReady."""
        settings = self.settings
        return RequestLimits(
            model_names=frozenset({settings.model_name, settings.model_id}),
            max_inputs=settings.max_inputs_per_request,
            max_input_tokens=self.max_input_tokens,
            dimension=settings.embedding_dimension or self.preparer.info.width,
            max_image_bytes=settings.max_image_bytes,
        )


def scheduler_limits(settings: Settings) -> Limits:
    """Makes the scheduler's limits of the settings."""
    return Limits(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_wait=settings.max_batch_wait_ms / 1000,
        max_queue_size=settings.max_queue_size,
        max_input_tokens=settings.max_input_tokens,
        worker_stall=settings.worker_stall_s,
        vector_cache_bytes=settings.vector_cache_mb << 20,
    )


def note_ready(settings: Settings, info: ModelInfo) -> None:
    """Logs what is served, and warns of what the operator may not expect."""
    log.info("serving %s (%s) on %s in %s, width %d", settings.model_name, info.model_type, info.device, info.dtype, info.width)
    wanted = settings.embedding_dimension
    if wanted is not None and wanted > info.width:
        log.warning(
            "EMBEDDING_DIMENSION=%d is more than the model's width of %d: vectors are filled up with zeros, which leaves every "
            "cosine as it was; EMBEDDING_DIMENSION=native gives the model's own width",
            wanted,
            info.width,
        )
