"""OpenAI's embeddings API, with what this server adds to it: the reading of a body, and the writing of replies and errors.

A request is fields and items; what an item may be stands in app.dialects.items. Fields that are not named here are ignored.
https://platform.openai.com/docs/api-reference/embeddings; `truncate_prompt_tokens` and `messages` are vLLM's, `modality`
Infinity's.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import orjson
from msgspec import Meta

from app.dialects import examples
from app.dialects.contract import EmbeddingRequest, Failure, InvalidRequest, ModelNotFound, Reply, RequestItem, RequestLimits
from app.dialects.dialect import Dialect, Manual
from app.dialects.fields import NULL, Choice, Field, Flag, Integer, Text, refused
from app.dialects.item_schemas import item_schemas, ref
from app.dialects.items import TOKEN_IDS, Context, is_conversation, is_token_ids, read_conversation, read_item
from app.dialects.json_body import decode_json
from models.base import Refusal

# The request's fields

INPUT = Field(
    "input",
    "What to embed: one input, or a list of them. A list gives one vector for each of its inputs, in order; the parts inside one "
    "input are fused into one vector.",
    {"anyOf": [ref("Input"), NULL]},
)
MESSAGES = Field(
    "messages",
    "One conversation, which gives one vector. Its system message, if it has one, is the instruction, taken verbatim.",
    {"anyOf": [ref("Conversation"), NULL]},
)
MODEL = Text(
    "model",
    "The model's name or its id: `id` and `root` in `/v1/models`. Another is refused with 404.",
    default=lambda server: server.model_name,
)
INSTRUCTION = Text(
    "instruction",
    "The instruction of every input that brings none of its own. It is stripped and gets a full stop unless it ends in "
    "punctuation; absent or empty, it is the model's default.",
)
DIMENSIONS = Integer(
    "dimensions",
    "Keep so many of the first components and normalise again (Matryoshka). All of them if it is absent.",
    most=lambda limits: limits.dimension,
    shown_most=lambda server: server.dimension,
)
ENCODING_FORMAT = Choice(
    "encoding_format",
    "How a vector is written: as numbers, or as base64 of little-endian float32.",
    choices=("float", "base64"),
)
TRUNCATE = Flag(
    "truncate",
    "`true`: cut an over-long input to the limit, from the end of its last text. `false`: refuse it. Images and the instruction "
    "are never cut.",
)
TRUNCATE_PROMPT_TOKENS = Integer(
    "truncate_prompt_tokens",
    "Cut every input to so many tokens, at most to the model's limit; -1 is that limit. Fewer than the prompt's template takes "
    "are refused.",
    words={-1: lambda limits: limits.max_input_tokens},
)
MODALITY = Choice("modality", "`image`: every string of `input` is an image.", choices=("text", "image"))
PARTIAL = Flag(
    "partial",
    "`true`: an input that fails, a malformed one included, becomes a row with an error, and the reply is 200 whatever the rows "
    "hold.",
)
USER = Field("user", "Accepted and kept nowhere.")

FIELDS = (
    INPUT,
    MESSAGES,
    MODEL,
    INSTRUCTION,
    DIMENSIONS,
    ENCODING_FORMAT,
    TRUNCATE,
    TRUNCATE_PROMPT_TOKENS,
    MODALITY,
    PARTIAL,
    USER,
)


# Body -> request


def parse(body: bytes | bytearray, limits: RequestLimits) -> EmbeddingRequest:
    """Reads the request that `body` holds. Raises InvalidRequest or ModelNotFound."""
    request = decode_json(body)
    if not isinstance(request, dict):
        raise InvalidRequest('the body must be a JSON object with "input" or "messages"')
    _check_model(request, limits)
    context = Context(
        limits=limits,
        instruction=INSTRUCTION.read(request),
        strings_are_images=MODALITY.read(request) == "image",
    )
    max_tokens, truncate = _length_rule(request, limits)
    partial = PARTIAL.read(request)
    return EmbeddingRequest(
        dimensions=DIMENSIONS.read(request, limits),
        encoding_format=cast(Literal["float", "base64"], ENCODING_FORMAT.read(request)),
        max_tokens=max_tokens,
        truncate=truncate,
        partial=partial,
        items=_items(request, context, partial),
    )


def _check_model(request: dict[str, Any], limits: RequestLimits) -> None:
    model = MODEL.read(request)
    if model is not None and model not in limits.model_names:
        raise ModelNotFound(f"model is not served here; this server has {', '.join(sorted(limits.model_names))}")


def _length_rule(request: dict[str, Any], limits: RequestLimits) -> tuple[int, bool]:
    """Returns (max_tokens, truncate). `truncate_prompt_tokens` asks for the cut, whatever `truncate` says."""
    truncate = TRUNCATE.read(request)
    max_tokens = TRUNCATE_PROMPT_TOKENS.read(request, limits)
    if max_tokens is None:
        return limits.max_input_tokens, truncate
    return limits.max_input_tokens if max_tokens == -1 else max_tokens, True


def _items(request: dict[str, Any], context: Context, partial: bool) -> tuple[RequestItem | Refusal, ...]:
    def read(reader: Callable[[Any, str, Context], RequestItem], value: Any, param: str) -> RequestItem | Refusal:
        try:
            return reader(value, param, context)
        except InvalidRequest as error:
            if not partial:
                raise
            return Refusal(str(error), error.param)

    given, messages = request.get("input"), request.get("messages")
    if (given is None) == (messages is None):
        raise InvalidRequest('exactly one of "input" and "messages" must be given', "input")
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise refused("messages", "must be a list of at least one message")
        return (read(read_conversation, messages, "messages"),)
    if not isinstance(given, list) or is_conversation(given):
        return (read(read_item, given, "input"),)
    if not given:
        raise refused("input", "must not be an empty list")
    if is_token_ids(given, context.limits):
        raise refused("input", TOKEN_IDS)
    if len(given) > context.limits.max_inputs:
        raise refused("input", f"holds {len(given)} inputs; at most {context.limits.max_inputs} are accepted in one request")
    return tuple(read(read_item, value, f"input[{index}]") for index, value in enumerate(given))


# What is written: orjson writes these types, and the OpenAPI document has their schemas

Count = Annotated[int, Meta(ge=0)]
Vector = Annotated[list[float], Meta(min_length=1)]
Base64 = Annotated[str, Meta(extra_json_schema={"contentEncoding": "base64"})]


@dataclass(frozen=True, slots=True)
class ErrorDetail:
    message: Annotated[str, Meta(description="What is wrong and what to do.")]
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "rate_limit_error",
        "timeout_error",
        "service_unavailable",
        "server_error",
    ]
    param: Annotated[str | None, Meta(description="The place in the body, such as `input[3].image`.")]
    code: Annotated[
        str | None,
        Meta(
            description="`invalid_api_key`, `model_not_found`, `not_found`, `overloaded`, `loading`, `draining` or "
            "`worker_died`; null if the type says enough."
        ),
    ]


@dataclass(frozen=True, slots=True)
class Error:
    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Embedding:
    object: Literal["embedding"] = field(default="embedding", kw_only=True)
    index: Count
    embedding: Annotated[
        Vector | Base64,
        Meta(description="The unit vector: numbers, or base64 of little-endian float32, as `encoding_format` asks."),
    ]


@dataclass(frozen=True, slots=True)
class FailedInput:
    """The row of an input that failed, if `partial` was asked for."""

    object: Literal["embedding"] = field(default="embedding", kw_only=True)
    index: Count
    embedding: None = field(default=None, kw_only=True)
    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class TokenDetails:
    text_tokens: Count
    image_tokens: Count


@dataclass(frozen=True, slots=True)
class UsageReply:
    prompt_tokens: Annotated[int, Meta(ge=0, description="Every token that the model read: template, text and image.")]
    total_tokens: Annotated[int, Meta(ge=0, description="The same.")]
    prompt_tokens_details: TokenDetails


@dataclass(frozen=True, slots=True)
class EmbeddingList:
    object: Literal["list"] = field(default="list", kw_only=True)
    model: Annotated[str, Meta(description="The model's name.")]
    # msgspec describes no union of two types of ours.
    data: Annotated[
        list[Any],
        Meta(
            min_length=1,
            description="A row for each input, in order.",
            extra_json_schema={"items": {"anyOf": [ref("Embedding"), ref("FailedInput")]}},
        ),
    ]
    usage: UsageReply


# Status -> `type`.
TYPES: dict[int, Any] = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}


def error_detail(failure: Failure) -> ErrorDetail:
    """Puts a failure into OpenAI's form."""
    kind = TYPES.get(failure.status, "invalid_request_error" if failure.status < 500 else "server_error")
    return ErrorDetail(failure.message, kind, failure.param, failure.code)


def write_error(failure: Failure) -> bytes:
    """Writes the body of an error reply."""
    return orjson.dumps(Error(error_detail(failure)))


def write(reply: Reply) -> bytes:
    """Writes the body of a reply.

    Row by row: a C call that writes thousands of vectors would hold the interpreter's lock for as long.
    """
    encoding = reply.request.encoding_format
    rows: list[Any] = [orjson.Fragment(_write_row(index, row, encoding)) for index, row in enumerate(reply.rows)]
    usage = reply.usage
    details = TokenDetails(usage.text_tokens, usage.image_tokens)
    return orjson.dumps(EmbeddingList(reply.model, rows, UsageReply(usage.total, usage.total, details)))


def _write_row(index: int, row: npt.NDArray[np.float32] | Failure, encoding: Literal["float", "base64"]) -> bytes:
    if isinstance(row, Failure):
        return orjson.dumps(FailedInput(index, error_detail(row)))
    if encoding == "base64":
        return orjson.dumps(Embedding(index, base64.b64encode(np.ascontiguousarray(row, dtype="<f4").data).decode()))
    vector: Any = np.ascontiguousarray(row)
    return orjson.dumps(Embedding(index, vector), option=orjson.OPT_SERIALIZE_NUMPY)


OPENAI = Dialect(
    paths=("/v1/embeddings",),
    parse=parse,
    write=write,
    error=write_error,
    manual=Manual(
        operation="createEmbeddings",
        summary="Embed texts and images",
        description="A vector for each input, in order. An input is a text, an image, or several of them fused into one vector. "
        "Unknown fields are ignored, and `null` is an absent field. Token ids and video are refused.",
        fields=FIELDS,
        rules={
            "description": "Exactly one of `input` and `messages` is given.",
            "oneOf": [
                {"required": ["input"], "properties": {"input": ref("Input"), "messages": NULL}},
                {"required": ["messages"], "properties": {"messages": ref("Conversation"), "input": NULL}},
            ],
        },
        schemas=item_schemas,
        reply=EmbeddingList,
        parts=(Embedding, FailedInput),
        error=Error,
        examples=examples.OPENAI_REQUESTS,
        replies=examples.OPENAI_REPLIES,
    ),
)
