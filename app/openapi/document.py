"""The OpenAPI 3.1 document: every route, what it takes, what it answers. Its schemas stand in app.openapi.schemas."""

from __future__ import annotations

from typing import Any

from app.openapi.schemas import DATA_URI, IMAGE_URL, PNG, ref, schemas

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
_ON_A_BODY = ("400", "404", "408", "413", "415", "429", "503")

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


def openapi_document(
    *, version: str, model_name: str, dimension: int | None, max_inputs: int, auth_required: bool, playground: bool
) -> dict[str, Any]:
    """The document of a server with these settings. `dimension` None: the model's own width, which need not be known yet.
    `playground`: whether there is a page at /."""
    components: Node = {
        "schemas": schemas(model_name=model_name, dimension=dimension, max_inputs=max_inputs),
        "parameters": _PARAMETERS | {"Model": _PARAMETERS["Model"] | {"example": model_name}},
        "headers": _HEADERS,
        "responses": {name: _error(description, header) for name, description, header in _ERRORS.values()},
    }
    protected = _protected_paths(model_name)
    if auth_required:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer", "description": "A key of the server."}}
        protected = {
            path: {method: _with_key(operation) for method, operation in methods.items()} for path, methods in protected.items()
        }
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
        "paths": protected | _operation_paths() | _page_paths() | (_playground_path() if playground else {}),
        "components": components,
    }


def _protected_paths(model_name: str) -> Node:
    body_schema = {"schema": ref("EmbeddingRequest"), "examples": _examples(model_name)}
    body: Node = {"required": True, "content": {"application/json": body_schema}}
    request_id, timeout = _component("parameters", "X-Request-Id"), _component("parameters", "X-Request-Timeout")
    vectors = _reply(
        "A row for each input.", ref("EmbeddingList"), "Server-Timing", "X-Model-Fingerprint", examples=_replies(model_name)
    )
    return {
        "/v1/embeddings": {
            "post": _operation(
                "Embeddings",
                "createEmbeddings",
                "Embed texts and images",
                "A vector for each input, in order. An input is a text, an image, or several of them fused into one vector. "
                "Unknown fields are ignored, and `null` is an absent field. Token ids and video are refused.",
                {"200": vectors},
                (*_ON_A_BODY, "504"),
                requestBody=body,
                parameters=[request_id, timeout],
            )
        },
        "/v1/embeddings/preview": {
            "post": _operation(
                "Embeddings",
                "previewEmbeddings",
                "See what the model would read",
                "Takes the same body and leaves the device alone: the rendered prompt, token counts, the size that each image "
                "is brought to, and whether an input would be cut or refused. An image over the server's limits is made smaller "
                "than the model's official code makes it.",
                {"200": _reply("A row for each input.", ref("PreviewList"))},
                _ON_A_BODY,
                requestBody=body,
                parameters=[request_id],
            )
        },
        "/v1/models": {
            "get": _operation(
                "Models",
                "listModels",
                "List what a request may name",
                "The model, with the fingerprint of its vectors.",
                {"200": _reply("The models.", ref("ModelList"))},
            )
        },
        "/v1/models/{id}": {
            "get": _operation(
                "Models",
                "getModel",
                "Describe a model",
                "One row of the list.",
                {"200": _reply("The model.", ref("Model"))},
                ("404",),
                parameters=[_component("parameters", "Model")],
            )
        },
    }


def _operation_paths() -> Node:
    probe: Node = {"type": "object"}
    return {
        "/health": {
            "get": _operation(
                "Operation",
                "getHealth",
                "State of the server",
                "Answers at once, whatever the device does.",
                {
                    "200": _reply("It takes traffic.", ref("Healthy")),
                    "503": _reply("It is loading, draining or failed.", ref("Unhealthy")),
                },
            )
        },
        "/health/live": {
            "get": _operation(
                "Operation",
                "getLiveness",
                "Should it be restarted?",
                "For probes that restart. The status says it all; loading and draining are no failures.",
                {"200": _reply("No.", probe), "503": _reply("It has failed: restart it.", probe)},
            )
        },
        "/health/ready": {
            "get": _operation(
                "Operation",
                "getReadiness",
                "Should it be sent traffic?",
                "For probes that route. The status says it all.",
                {"200": _reply("Yes.", probe), "503": _reply("It is loading, draining or failed.", probe)},
            )
        },
        "/metrics": {
            "get": _operation(
                "Operation",
                "getMetrics",
                "Metrics for Prometheus",
                "Requests, inputs, tokens, batches, the queue, and times.",
                {"200": _reply("Metrics in Prometheus' text format.", {"type": "string"}, media_type="text/plain")},
            )
        },
    }


def _page_paths() -> Node:
    document: Node = {"type": "object", "required": ["openapi", "info", "paths"]}
    return {
        "/openapi.json": {
            "get": _operation(
                "Pages",
                "getOpenAPI",
                "This document",
                "For clients, generators and the page of it.",
                {"200": _reply("OpenAPI 3.1.", document)},
            )
        },
        "/docs": {
            "get": _operation(
                "Pages",
                "getDocs",
                "A page of this document",
                "With requests to try out. It loads nothing from elsewhere.",
                {"200": _reply("The page.", {"type": "string"}, media_type="text/html")},
            )
        },
    }


def _playground_path() -> Node:
    return {
        "/": {
            "get": _operation(
                "Pages",
                "getPlayground",
                "A page to try and to watch",
                "Texts and images in, a matrix of cosines out; and the queue, batches and times as they are. "
                "It loads nothing from elsewhere.",
                {"200": _reply("The page.", {"type": "string"}, media_type="text/html")},
            )
        }
    }


def _with_key(operation: Node) -> Node:
    refused = {"401": _component("responses", _ERRORS["401"][0])}
    return operation | {"security": [{"bearer": []}], "responses": operation["responses"] | refused}


def _operation(
    tag: str, operation_id: str, summary: str, description: str, replies: Node, errors: tuple[str, ...] = (), **more: Any
) -> Node:
    faults = {status: _component("responses", _ERRORS[status][0]) for status in (*errors, "405", "500", "default")}
    return {
        "tags": [tag],
        "operationId": operation_id,
        "summary": summary,
        "description": description,
        **more,
        "responses": replies | faults,
    }


def _reply(description: str, schema: Node, *headers: str, media_type: str = "application/json", **more: Any) -> Node:
    return {
        "description": description,
        "headers": {name: _component("headers", name) for name in ("X-Request-Id", *headers)},
        "content": {media_type: {"schema": schema, **more}},
    }


def _error(description: str, header: str | None) -> Node:
    return _reply(description, ref("Error"), *([header] if header else []))


def _component(kind: str, name: str) -> Node:
    return {"$ref": f"#/components/{kind}/{name}"}


# Examples


def _examples(model_name: str) -> Node:
    bodies: dict[str, tuple[str, Node]] = {
        "text": ("A text", {"input": "a dog on a beach"}),
        "batch": ("Several texts, a vector for each", {"input": ["a dog on a beach", "a cat on a sofa", "quarterly results"]}),
        "image_url": ("An image from a URL", {"input": {"type": "image_url", "image_url": {"url": IMAGE_URL}}}),
        "image_base64": ("An image in base64", {"input": {"type": "image_base64", "image_base64": PNG}}),
        "mixed": ("A text and an image, a vector for each", {"input": ["the sun in a blue sky", {"type": "image", "data": PNG}]}),
        "fused": (
            "A text and an image, fused into one vector",
            {"input": {"text": "the sun in a blue sky", "image": DATA_URI, "instruction": "Retrieve drawings of it."}},
        ),
        "instruction": (
            "An instruction for every input",
            {"input": ["how to descale a kettle"], "instruction": "Retrieve passages that answer the question."},
        ),
        "dimensions": (
            "Short vectors, in base64",
            {"input": ["a dog on a beach"], "dimensions": 64, "encoding_format": "base64"},
        ),
        "messages": (
            "A conversation, one vector",
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "Represent the user's input."}]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": DATA_URI}},
                            {"type": "text", "text": "the sun in a blue sky"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": ""}]},
                ]
            },
        ),
        "partial": (
            "Rows with errors in place of a refusal",
            {"input": ["a dog on a beach", {"image": DATA_URI}], "partial": True, "truncate": True},
        ),
    }
    return {name: {"summary": summary, "value": {"model": model_name, **body}} for name, (summary, body) in bodies.items()}


def _replies(model_name: str) -> Node:
    def reply(*rows: Node) -> Node:
        details = {"text_tokens": 23, "image_tokens": 0}
        usage = {"prompt_tokens": 23, "total_tokens": 23, "prompt_tokens_details": details}
        data = [{"object": "embedding", "index": index, **row} for index, row in enumerate(rows)]
        return {"object": "list", "model": model_name, "data": data, "usage": usage}

    vector = {"embedding": [0.0312]}
    where = "input[1].image"
    error = {"message": f"{where} is an empty image", "type": "invalid_request_error", "param": where, "code": None}
    failed = {"embedding": None, "error": error}
    return {
        "vectors": {"summary": "Vectors (shortened)", "value": reply(vector)},
        "partial": {"summary": "With `partial`, where an input failed", "value": reply(vector, failed)},
    }
