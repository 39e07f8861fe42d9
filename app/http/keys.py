"""Typed keys under which things of the application and of a request are kept, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from app.dialects.dialect import Dialect
    from app.engine.engine import Engine
    from app.engine.memory import MemoryBudget
    from app.engine.metrics import Metrics
    from app.engine.service import EmbeddingService
    from app.http.route import Route
    from app.lifecycle import Lifecycle
    from app.settings import Settings
    from scheduler.scheduler import Scheduler


@dataclass(slots=True)
class RequestLog:
    """What one request adds to its log line, its headers and the metrics as it goes along."""

    key_name: str = "-"
    inputs: int = 0
    tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)


SETTINGS: web.AppKey[Settings] = web.AppKey("SETTINGS")
ENGINE: web.AppKey[Engine] = web.AppKey("ENGINE")
SCHEDULER: web.AppKey[Scheduler] = web.AppKey("SCHEDULER")
SERVICE: web.AppKey[EmbeddingService] = web.AppKey("SERVICE")
MEMORY: web.AppKey[MemoryBudget] = web.AppKey("MEMORY")
METRICS: web.AppKey[Metrics] = web.AppKey("METRICS")
LIFECYCLE: web.AppKey[Lifecycle] = web.AppKey("LIFECYCLE")
# The dialect of what no route is for.
DIALECT: web.AppKey[Dialect] = web.AppKey("DIALECT")
# Canonical path -> its route.
ROUTES: web.AppKey[Mapping[str, Route]] = web.AppKey("ROUTES")
LOG: web.RequestKey[RequestLog] = web.RequestKey("LOG")
