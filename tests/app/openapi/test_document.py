"""app.openapi.document: the document holds together, and what it shows is what the server takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from app.dialects.contract import Failure, InvalidRequest, ModelNotFound, RequestItem, RequestLimits
from app.dialects.examples import PNG
from app.dialects.fields import Server
from app.dialects.openai import error_detail, parse
from app.dialects.registry import DIALECTS
from app.errors import TABLE
from app.http.routes import routes
from app.openapi.document import Documented, openapi_document

LIMITS = RequestLimits(
    model_names=frozenset({"model"}), max_inputs=8, max_input_tokens=512, dimension=64, max_image_bytes=1 << 20
)
ROUTES = {
    "/v1/embeddings": "post",
    "/v1/embeddings/preview": "post",
    "/v1/models": "get",
    "/v1/models/{id}": "get",
    "/health": "get",
    "/health/live": "get",
    "/health/ready": "get",
    "/metrics": "get",
    "/openapi.json": "get",
    "/docs": "get",
    "/": "get",
}


PUBLIC = {row.path for row in routes(DIALECTS) if row.public}


def document(*, dimension: int | None = 64, auth_required: bool = True, playground: bool = True) -> dict[str, Any]:
    rows = routes(DIALECTS, playground)
    described = [Documented(row.method, row.path.replace(":.+", ""), row.public, row.operation) for row in rows if row.operation]
    written = openapi_document(described, Server("model", dimension, 8), version="1.2.3", auth_required=auth_required)
    return orjson.loads(orjson.dumps(written))


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(child)


def resolve(root: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        kind, name = node["$ref"].removeprefix("#/components/").split("/")
        node = root["components"][kind][name]
    return node


def operations(root: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {path: methods[ROUTES[path]] for path, methods in root["paths"].items()}


@pytest.mark.parametrize("auth_required", [True, False])
@pytest.mark.parametrize("dimension", [64, None])
def test_document_is_whole(dimension: int | None, auth_required: bool) -> None:
    root = document(dimension=dimension, auth_required=auth_required)
    assert root["openapi"].startswith("3.1.") and root["info"]["version"] == "1.2.3" and root["info"]["title"]
    assert {path: next(iter(methods)) for path, methods in root["paths"].items()} == ROUTES
    assert all(len(methods) == 1 for methods in root["paths"].values())
    for node in nodes(root):
        resolve(root, node)
    used = {node["$ref"].removeprefix("#/components/") for node in nodes(root) if "$ref" in node}
    kinds = ("schemas", "parameters", "headers", "responses")
    unused = {f"{kind}/{name}" for kind in kinds for name in root["components"][kind]} - used
    assert unused <= {"responses/Unauthorized"}


def test_the_playground_is_in_the_document_where_it_is_served() -> None:
    assert document()["paths"].keys() - document(playground=False)["paths"].keys() == {"/"}


def test_every_operation_is_described() -> None:
    root = document()
    described = list(operations(root).values())
    assert len({operation["operationId"] for operation in described}) == len(described)
    tags = {tag["name"] for tag in root["tags"]}
    for operation in described:
        assert operation["summary"] and operation["description"] and set(operation["tags"]) <= tags
        assert {"200", "405", "500", "default"} <= set(operation["responses"])
        for reply in (resolve(root, reply) for reply in operation["responses"].values()):
            assert reply["description"] and "X-Request-Id" in reply["headers"] and len(reply["content"]) == 1


def test_path_parameters_are_declared() -> None:
    root = document()
    for path, operation in operations(root).items():
        named = {f"{{{p['name']}}}" for p in (resolve(root, p) for p in operation.get("parameters", ())) if p["in"] == "path"}
        assert named == {part for part in path.split("/") if part.startswith("{")}


@pytest.mark.parametrize("auth_required", [True, False])
def test_a_key_where_one_is_needed_and_nowhere_else(auth_required: bool) -> None:
    root = document(auth_required=auth_required)
    assert "security" not in root
    assert ("securitySchemes" in root["components"]) == auth_required
    for path, operation in operations(root).items():
        protected = auth_required and path not in PUBLIC
        assert operation.get("security", []) == ([{"bearer": []}] if protected else [])
        assert ("401" in operation["responses"]) == protected


def test_every_error_of_the_table_is_documented() -> None:
    root = document()
    schema = resolve(root, root["components"]["schemas"]["ErrorDetail"])["properties"]
    assert {error_detail(Failure(row.status, "")).type for row in TABLE.values()} <= set(schema["type"]["enum"])
    assert all(f"`{row.code}`" in schema["code"]["description"] for row in TABLE.values() if row.code)
    statuses = {str(row.status) for row in TABLE.values()}
    assert statuses <= set(operations(root)["/v1/embeddings"]["responses"])
    for status, header in {"401": "WWW-Authenticate", "405": "Allow", "429": "Retry-After", "503": "Retry-After"}.items():
        reply = resolve(root, operations(root)["/v1/embeddings"]["responses"][status])
        assert resolve(root, reply["headers"][header])["required"]


def examples(root: dict[str, Any]) -> dict[str, Any]:
    body = operations(root)["/v1/embeddings"]["requestBody"]["content"]["application/json"]
    return {name: example["value"] for name, example in body["examples"].items()}


@pytest.mark.parametrize("name", examples(document()))
def test_examples_are_accepted(name: str) -> None:
    request = parse(orjson.dumps(examples(document())[name]), LIMITS)
    assert request.items and all(isinstance(item, RequestItem) for item in request.items)


@pytest.mark.parametrize("title", [n["title"] for n in nodes(document()["components"]["schemas"]) if "examples" in n])
def test_forms_of_an_input_are_accepted(title: str) -> None:
    (form,) = (node for node in nodes(document()["components"]["schemas"]) if node.get("title") == title)
    value = orjson.dumps(form["examples"]).replace(b"iVBORw0KGgo...", PNG.encode())
    for example in orjson.loads(value):
        parse(orjson.dumps({"input": example}), LIMITS)


def test_fields_are_those_of_the_parser() -> None:
    fields = document()["components"]["schemas"]["CreateEmbeddingsRequest"]["properties"]
    wrong = {
        "messages": [], "model": 1, "instruction": 1, "dimensions": 65, "encoding_format": "x", "truncate": 1,
        "truncate_prompt_tokens": 0, "modality": "x", "partial": 1,
    }  # fmt: skip
    assert set(fields) == {"input", "user", *wrong}
    for name, value in wrong.items():
        with pytest.raises((InvalidRequest, ModelNotFound)):
            parse(orjson.dumps({"input": "x", name: value}), LIMITS)


def test_limits_are_the_servers_own() -> None:
    schemas = document()["components"]["schemas"]
    assert schemas["CreateEmbeddingsRequest"]["properties"]["dimensions"]["maximum"] == 64
    assert schemas["Input"]["anyOf"][1]["maxItems"] == 8
    unknown = document(dimension=None)["components"]["schemas"]
    assert "maximum" not in unknown["CreateEmbeddingsRequest"]["properties"]["dimensions"]
