"""The transport without HTTP: the service's engine in this process. The same code parses, prepares, batches and refuses bodies as
in the service."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from app.bulk.embedder import Answer, Problem
from app.bulk.ending import Stopped
from app.dialects.openai import error_detail, parse
from app.engine.engine import Engine, LoadModel
from app.engine.loading import end_on_failure, load_configured_model
from app.engine.service import EmbeddingService
from app.errors import BodyTooLarge, failure_of
from app.lifecycle import Lifecycle
from app.settings import Settings
from models.base import Refusal

log = logging.getLogger(__name__)


class InProcess:
    """A Transport to a running engine of this process."""

    name = "the model"

    def __init__(self, engine: Engine, service: EmbeddingService, lifecycle: Lifecycle) -> None:
        self._engine = engine
        self._service = service
        self._lifecycle = lifecycle

    async def post(self, body: bytes) -> Answer:
        engine, service = self._engine, self._service
        try:
            if len(body) > (most := engine.settings.max_request_bytes):
                raise BodyTooLarge(f"the body is larger than the limit of {most:,} bytes")
            with engine.memory.share() as memory:
                request = await engine.bodies.run(True, parse, body, engine.request_limits())
                memory.add(request.num_bytes)
                # Nobody waits for an answer who could go: there is no deadline, and a device that stalls is noticed.
                outcome = await service.embed(request, math.inf, memory)
        except Exception as error:
            self._check_alive()
            return Answer(failure_of(error).status, problem=_problem(error))
        rows = [_problem(row) if isinstance(row, Refusal) else row for row in outcome.rows]
        self._check_alive()
        return Answer(200, rows, fingerprint=engine.fingerprint, model=engine.settings.model_name)

    def _check_alive(self) -> None:
        """Raise Stopped if the device has failed, which is then the cause of any other error."""
        if self._lifecycle.has_ended:
            raise Stopped("the device has failed", self._lifecycle.exit_code)


@asynccontextmanager
async def in_process(settings: Settings, load_model: LoadModel | None = None) -> AsyncIterator[InProcess]:
    """Run an engine until the context is left. Raises Stopped if its model cannot be loaded."""
    lifecycle, loaded = Lifecycle(), asyncio.Event()
    engine = Engine(
        settings,
        load_model or partial(load_configured_model, settings),
        on_ready=loaded.set,
        on_failure=partial(end_on_failure, lifecycle),
    )
    async with engine.running() as service:
        waiting = [asyncio.create_task(work) for work in (loaded.wait(), lifecycle.ending())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        if lifecycle.has_ended:
            raise Stopped("the model cannot be used", lifecycle.exit_code)
        yield InProcess(engine, service, lifecycle)


def _problem(error: Exception | Refusal) -> Problem:
    failure = failure_of(error)
    if failure.status == 500 and isinstance(error, Exception):
        log.error("a request failed", exc_info=error)
    told = error_detail(failure)
    return Problem(told.message, told.type, told.param, getattr(error, "retry_after", None))
