"""Operations: what the OpenAPI document says of each route that no dialect owns, and of a dialect's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.dialects.dialect import Dialect, Manual
from app.openapi.replies import Health, Model, ModelList, PreviewList, Probe

Node = dict[str, Any]

JSON_OBJECT: Node = {"type": "object"}
TEXT: Node = {"type": "string"}
# What may be wrong with a request that has a body, by status.
ON_A_BODY = ("400", "404", "408", "413", "415", "429", "503")


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply of an operation: a reply type or a schema, `narrowed` by more of JSON Schema."""

    description: str
    body: type | Node
    narrowed: Node = field(default_factory=dict)
    media_type: str = "application/json"
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """What the document says of a route. `errors` are statuses beside those of every route, `parameters` names of the document's
    components, `manual` the dialect's whose body it takes."""

    tag: str
    id: str
    summary: str
    description: str
    answers: Mapping[str, Answer]
    errors: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    manual: Manual | None = None


def embeddings_of(dialect: Dialect) -> Operation | None:
    """Makes the operation of a dialect's embeddings; None if it has no manual."""
    manual = dialect.manual
    if manual is None:
        return None
    headers = ("Server-Timing", "X-Model-Fingerprint")
    return Operation(
        tag="Embeddings",
        id=manual.operation,
        summary=manual.summary,
        description=manual.description,
        answers={"200": Answer("A row for each input.", manual.reply or JSON_OBJECT, headers=headers)},
        errors=(*ON_A_BODY, "504"),
        parameters=("X-Request-Id", "X-Request-Timeout"),
        manual=manual,
    )


def preview_of(dialect: Dialect) -> Operation:
    """Makes the operation of the preview, which takes the body of a dialect."""
    return Operation(
        tag="Embeddings",
        id="previewEmbeddings",
        summary="See what the model would read",
        description="Takes the same body and leaves the device alone: the rendered prompt, token counts, the size that each "
        "image is brought to, and whether an input would be cut or refused. An image over the server's limits is made smaller "
        "than the model's official code makes it.",
        answers={"200": Answer("A row for each input.", PreviewList)},
        errors=ON_A_BODY,
        parameters=("X-Request-Id",),
        manual=dialect.manual,
    )


LIST_MODELS = Operation(
    tag="Models",
    id="listModels",
    summary="List what a request may name",
    description="The model, with the fingerprint of its vectors.",
    answers={"200": Answer("The models.", ModelList)},
)
GET_MODEL = Operation(
    tag="Models",
    id="getModel",
    summary="Describe a model",
    description="One row of the list.",
    answers={"200": Answer("The model.", Model)},
    errors=("404",),
    parameters=("Model",),
)
_OK: Node = {"properties": {"status": {"const": "ok"}}}
_NOT_OK: Node = {"properties": {"status": {"enum": ["loading", "draining", "failed"]}}}
HEALTH = Operation(
    tag="Operation",
    id="getHealth",
    summary="State of the server",
    description="Answers at once, whatever the device does.",
    answers={
        "200": Answer("It takes traffic.", Health, _OK),
        "503": Answer("It is loading, draining or failed.", Health, _NOT_OK),
    },
)
LIVENESS = Operation(
    tag="Operation",
    id="getLiveness",
    summary="Should it be restarted?",
    description="For probes that restart. The status says it all; loading and draining are no failures.",
    answers={"200": Answer("No.", Probe), "503": Answer("It has failed: restart it.", Probe)},
)
READINESS = Operation(
    tag="Operation",
    id="getReadiness",
    summary="Should it be sent traffic?",
    description="For probes that route. The status says it all.",
    answers={"200": Answer("Yes.", Probe), "503": Answer("It is loading, draining or failed.", Probe)},
)
METRICS = Operation(
    tag="Operation",
    id="getMetrics",
    summary="Metrics for Prometheus",
    description="Requests, inputs, tokens, batches, the queue, and times.",
    answers={"200": Answer("Metrics in Prometheus' text format.", TEXT, media_type="text/plain")},
)
DOCUMENT = Operation(
    tag="Pages",
    id="getOpenAPI",
    summary="This document",
    description="For clients, generators and the page of it.",
    answers={"200": Answer("OpenAPI 3.1.", {"type": "object", "required": ["openapi", "info", "paths"]})},
)
DOCS = Operation(
    tag="Pages",
    id="getDocs",
    summary="A page of this document",
    description="With requests to try out. It loads nothing from elsewhere.",
    answers={"200": Answer("The page.", TEXT, media_type="text/html")},
)
PLAYGROUND = Operation(
    tag="Pages",
    id="getPlayground",
    summary="A page to try and to watch",
    description="Texts and images in, a matrix of cosines out; and the queue, batches and times as they are. It loads nothing "
    "from elsewhere.",
    answers={"200": Answer("The page.", TEXT, media_type="text/html")},
)
