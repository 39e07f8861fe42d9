"""Dialect: one API that clients speak. The paths that it answers on, how it reads a body, how it writes replies and errors, and
what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.dialects.contract import EmbeddingRequest, Failure, Reply, RequestLimits
from app.dialects.fields import Field, Server


@dataclass(frozen=True, slots=True)
class Manual:
    """What the OpenAPI document says of a dialect. `rules` is JSON Schema that holds for the whole request, `schemas` makes the
    named parts that the fields refer to; `reply` and `error` are the types that are written, `parts` those that `reply` names;
    `examples` and `replies` are (summary, body) by name."""

    operation: str
    summary: str
    description: str
    fields: Sequence[Field] = ()
    rules: Mapping[str, Any] = field(default_factory=dict)
    schemas: Callable[[Server], Mapping[str, Any]] = lambda server: {}
    reply: type | None = None
    parts: tuple[type, ...] = ()
    error: type | None = None
    examples: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    replies: Mapping[str, tuple[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dialect:
    """One API that clients speak, answered by POST on `paths`. `parse` raises InvalidRequest or ModelNotFound; `write` makes the
    body of a reply, `error` that of an error reply. Each may run on any thread."""

    paths: tuple[str, ...]
    parse: Callable[[bytes | bytearray, RequestLimits], EmbeddingRequest]
    write: Callable[[Reply], bytes]
    error: Callable[[Failure], bytes]
    manual: Manual | None = None
