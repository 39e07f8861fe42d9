"""Route: a row of the table in app.http.routes."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp.typedefs import Handler

from app.dialects.dialect import Dialect
from app.openapi.operations import Operation


@dataclass(frozen=True, slots=True)
class Route:
    """What is served at a path: its handler, what the OpenAPI document says of it, and whether a key is needed. `dialect` is the
    one in whose form its errors are written."""

    method: str
    path: str
    handler: Handler
    operation: Operation | None
    dialect: Dialect
    public: bool = False
