"""Fields of a request: one row each, from which the parser reads a body and the OpenAPI document takes its schema.

`null` is an absent field. A refusal says what is accepted, and never repeats the body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as field_of
from typing import Any, TypeVar

from app.dialects.contract import InvalidRequest, RequestLimits

T = TypeVar("T")

Schema = dict[str, Any]
Body = dict[str, Any]

NULL: Schema = {"type": "null"}


def refused(param: str, what: str) -> InvalidRequest:
    """Makes the refusal of what stands at a place of the body."""
    return InvalidRequest(f"{param} {what}", param)


def typed(holder: Body, key: str, kind: type[T], what: str, prefix: str = "") -> T | None:
    """Reads holder[key], None if it is absent; by its exact type, so that true is no integer. Raises InvalidRequest."""
    value = holder.get(key)
    if value is None or (isinstance(value, kind) and type(value) is kind):
        return value
    raise refused(prefix + key, f"must be {what}")


@dataclass(frozen=True, slots=True)
class Server:
    """What a schema says of the server that it is written for. `dimension` is None while it is not known."""

    model_name: str
    dimension: int | None
    max_inputs: int


@dataclass(frozen=True, slots=True)
class Field:
    """A field that has rules of its own, which its dialect's parser holds. `json` is its schema."""

    name: str
    description: str
    json: Schema = field_of(default_factory=dict)

    def schema(self, server: Server) -> Schema:
        """Returns the field's JSON Schema, in the document of a server."""
        return {**self.json, "description": self.description}


@dataclass(frozen=True, slots=True)
class Text(Field):
    """A field with a string. `default` is what the document shows for a server."""

    default: Callable[[Server], str] | None = None

    def read(self, body: Body) -> str | None:
        """Reads the string; None if it is absent. Raises InvalidRequest."""
        return typed(body, self.name, str, "a string")

    def schema(self, server: Server) -> Schema:
        shown = {"default": self.default(server)} if self.default else {}
        return {"type": ["string", "null"], "description": self.description, **shown}


@dataclass(frozen=True, slots=True)
class Flag(Field):
    """A field with true or false; false if it is absent."""

    def read(self, body: Body) -> bool:
        """Reads the flag. Raises InvalidRequest."""
        return typed(body, self.name, bool, "true or false") or False

    def schema(self, server: Server) -> Schema:
        return {"type": ["boolean", "null"], "description": self.description, "default": False}


@dataclass(frozen=True, slots=True)
class Choice(Field):
    """A field with one of some words; the first of them if it is absent."""

    choices: tuple[str, ...] = ()

    def read(self, body: Body) -> str:
        """Reads the word. Raises InvalidRequest."""
        what = " or ".join(f'"{choice}"' for choice in self.choices)
        value = typed(body, self.name, str, what)
        if value is None:
            return self.choices[0]
        if value not in self.choices:
            raise refused(self.name, f"must be {what}")
        return value

    def schema(self, server: Server) -> Schema:
        return {"enum": [*self.choices, None], "default": self.choices[0], "description": self.description}


@dataclass(frozen=True, slots=True)
class Integer(Field):
    """A field with an integer from 1 to `most`. `words` are other numbers that are accepted, each with what it stands for."""

    most: Callable[[RequestLimits], int] = lambda limits: limits.max_input_tokens
    shown_most: Callable[[Server], int | None] = lambda server: None
    words: Mapping[int, Callable[[RequestLimits], int]] = field_of(default_factory=dict)

    def read(self, body: Body, limits: RequestLimits) -> int | None:
        """Returns the number as it was given. Raises InvalidRequest."""
        most = self.most(limits)
        what = f"an integer from 1 to {most}"
        what += "".join(f", or {number} for {meant(limits)}" for number, meant in self.words.items())
        value = typed(body, self.name, int, what)
        if value is None or 1 <= value <= most or value in self.words:
            return value
        raise refused(self.name, f"must be {what}")

    def schema(self, server: Server) -> Schema:
        number: Schema = {"type": "integer", "minimum": 1}
        if most := self.shown_most(server):
            number["maximum"] = most
        if not self.words:
            return {**number, "type": ["integer", "null"], "description": self.description}
        return {"anyOf": [number, *({"const": word} for word in self.words), NULL], "description": self.description}
