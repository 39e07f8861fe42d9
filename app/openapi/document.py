"""The OpenAPI 3.1 document: every route, what it takes, what it answers.

It is made from what the server runs by: routes with their operations, the fields of a dialect's requests, and the types of
replies, whose JSON Schema msgspec makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from app.dialects.dialect import Manual
from app.dialects.fields import Server
from app.openapi.operations import Answer, Operation

Node = dict[str, Any]

_DESCRIPTION = """\
Turns texts and images into unit vectors of one space.

Every error, on every path, is `{"error": {"message", "type", "param", "code"}}`; `param` is the place in the body. Errors with \
`Retry-After` pass; the others need another request. Every reply carries `X-Request-Id`, by which the server's log knows it."""

_TAGS = {
    "Embeddings": "Vectors of texts and images.",
    "Models": "What is served.",
    "Operation": "For probes and dashboards. No key is needed.",
    "Pages": "To read, to try and to watch; and this document. No key is needed.",
}

# Status -> name of the reply, the schema's description, and the header that it always carries.
_ERRORS: dict[str, tuple[str, str, str | None]] = {
    "400": ("BadRequest", "A field, an image or its URL is at fault, or an input is too long. `param` says where.", None),
    "401": ("Unauthorized", "The key is missing or wrong.", "WWW-Authenticate"),
    "404": ("NotFound", "Another model is asked for, or the path is unknown.", None),
    "405": ("MethodNotAllowed", "The path takes another method.", "Allow"),
    "408": ("BodyTimeout", "The body did not arrive in time.", None),
    "413": ("BodyTooLarge", "The body has more bytes than the server takes.", None),
    "415": ("BodyCompressed", "The body is compressed.", None),
    "429": ("Overloaded", "The queue is full. Try again after `Retry-After`.", "Retry-After"),
    "500": ("ServerError", "A fault of the server. Its log has the trace under the request's id.", None),
    "503": ("Unavailable", "The model is loading, the server is stopping, or its device has failed.", "Retry-After"),
    "504": ("DeadlineExceeded", "The deadline passed before the request could be worked on.", None),
    "default": ("OtherError", "Any other error, such as one of malformed HTTP.", None),
}
_HEADERS: dict[str, Node] = {
    "X-Request-Id": {
        "description": "The caller's own, where it is 1 to 128 visible ASCII characters, else a new one.",
        "schema": {"type": "string"},
        "required": True,
    },
    "Server-Timing": {
        "description": "Milliseconds in the queue, in preparation and on the device, as far as the request came.",
        "schema": {"type": "string"},
    },
    "X-Model-Fingerprint": {
        "description": "A hash of all that decides a vector. Vectors under equal fingerprints are comparable.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds after which to try again, from the backlog and the measured rate.",
        "schema": {"type": "integer", "minimum": 1},
        "required": True,
    },
    "WWW-Authenticate": {"description": "How to authenticate.", "schema": {"const": "Bearer"}, "required": True},
    "Allow": {"description": "The methods that the path takes.", "schema": {"type": "string"}, "required": True},
}

_PARAMETERS: dict[str, Node] = {
    "X-Request-Id": {
        "name": "X-Request-Id",
        "in": "header",
        "description": "An id of yours for the request: 1 to 128 visible ASCII characters, else it is replaced.",
        "schema": {"type": "string"},
    },
    "X-Request-Timeout": {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds above 0 that the answer may take, as a decimal. More than the server's own limit is capped.",
        "schema": {"type": "string", "pattern": r"^(?!0+(\.0+)?$)[0-9]{1,9}(\.[0-9]{1,9})?$"},
        "example": "2.5",
    },
    "Model": {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "The model's name or its id. A slash in it may stand as it is or as %2F.",
        "schema": {"type": "string"},
    },
}


@dataclass(frozen=True, slots=True)
class Documented:
    """A route of the document. `public`: it needs no key."""

    method: str
    path: str
    public: bool
    operation: Operation


def openapi_document(routes: Sequence[Documented], server: Server, *, version: str, auth_required: bool) -> dict[str, Any]:
    """Makes the document of a server with these routes."""
    operations = [route.operation for route in routes]
    manuals = list({id(one.manual): one.manual for one in operations if one.manual}.values())
    paths: Node = {}
    for route in routes:
        written = _operation(route.operation, server)
        if auth_required and not route.public:
            refused = {"401": _component("responses", _ERRORS["401"][0])}
            written |= {"security": [{"bearer": []}], "responses": written["responses"] | refused}
        paths.setdefault(route.path, {})[route.method.lower()] = written
    components: Node = {
        "schemas": _schemas(operations, manuals, server),
        "parameters": _PARAMETERS | {"Model": _PARAMETERS["Model"] | {"example": server.model_name}},
        "headers": _HEADERS,
        "responses": {name: _error(description, header) for name, description, header in _ERRORS.values()},
    }
    if auth_required:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer", "description": "A key of the server."}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Qwen3-VL-Embedding server",
            "version": version,
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": paths,
        "components": components,
    }


# Schemas


def _schemas(operations: Iterable[Operation], manuals: Sequence[Manual], server: Server) -> Node:
    bodies = [answer.body for operation in operations for answer in operation.answers.values()]
    written = [part for manual in manuals for part in (manual.error, *manual.parts)]
    types = [body for body in (*bodies, *written) if isinstance(body, type)]
    _, found = msgspec.json.schema_components(dict.fromkeys(types), ref_template="#/components/schemas/{name}")
    schemas = {name: _written_whole(schema) for name, schema in found.items()}
    for manual in manuals:
        schemas[request_name(manual)] = _request(manual, server)
        schemas |= manual.schemas(server)
    return schemas


def _written_whole(schema: Node) -> Node:
    """The schema of a type of ours: every key of it is always written."""
    schema.pop("title", None)
    return schema | {"required": list(schema["properties"])}


def request_name(manual: Manual) -> str:
    """Names the schema of a dialect's request by its operation: createEmbeddings -> CreateEmbeddingsRequest."""
    return f"{manual.operation[0].upper()}{manual.operation[1:]}Request"


def _request(manual: Manual, server: Server) -> Node:
    return {"type": "object", "properties": {field.name: field.schema(server) for field in manual.fields}, **manual.rules}


# Operations


def _operation(operation: Operation, server: Server) -> Node:
    faults = {status: _component("responses", _ERRORS[status][0]) for status in (*operation.errors, "405", "500", "default")}
    written: Node = {
        "tags": [operation.tag],
        "operationId": operation.id,
        "summary": operation.summary,
        "description": operation.description,
    }
    if operation.parameters:
        written["parameters"] = [_component("parameters", name) for name in operation.parameters]
    replies = {status: _answer(answer) for status, answer in operation.answers.items()}
    if manual := operation.manual:
        body = {"schema": _component("schemas", request_name(manual)), "examples": _examples(manual.examples, server)}
        written["requestBody"] = {"required": True, "content": {"application/json": body}}
        if manual.operation == operation.id:
            replies["200"]["content"]["application/json"]["examples"] = _examples(manual.replies, server)
    return written | {"responses": replies | faults}


def _examples(examples: Any, server: Server) -> Node:
    return {
        name: {"summary": summary, "value": {"model": server.model_name, **body}} for name, (summary, body) in examples.items()
    }


def _answer(answer: Answer) -> Node:
    schema = _component("schemas", answer.body.__name__) if isinstance(answer.body, type) else answer.body
    if answer.narrowed:
        schema = {"allOf": [schema, answer.narrowed]}
    return _reply(answer.description, schema, *answer.headers, media_type=answer.media_type)


def _reply(description: str, schema: Node, *headers: str, media_type: str = "application/json") -> Node:
    return {
        "description": description,
        "headers": {name: _component("headers", name) for name in ("X-Request-Id", *headers)},
        "content": {media_type: {"schema": schema}},
    }


def _error(description: str, header: str | None) -> Node:
    return _reply(description, _component("schemas", "Error"), *([header] if header else []))


def _component(kind: str, name: str) -> Node:
    return {"$ref": f"#/components/{kind}/{name}"}
