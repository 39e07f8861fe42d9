"""Every accepted shape of a request's body -> one EmbeddingRequest; what is malformed is refused here.

A request is fields and items; what an item may be stands in app.dialects.items. `null` is an absent field, and fields that are
not named here are ignored. Pure: no I/O, no HTTP, no images, no tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from sys import getsizeof
from typing import Any, Literal

from app.dialects.items import (
    TOKEN_IDS,
    Context,
    ImageSource,
    InvalidRequest,
    RequestItem,
    RequestLimits,
    is_conversation,
    is_token_ids,
    read_conversation,
    read_item,
    refusal,
    typed,
)
from app.dialects.json_body import decode_json

__all__ = ["EmbeddingRequest", "ImageSource", "InvalidRequest", "ModelNotFound", "RequestItem", "RequestLimits", "parse"]


class ModelNotFound(Exception):
    """The request names a model that is not served here. The message names those that are."""

    param = "model"


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A request, validated. An InvalidRequest stands in the place of a malformed item where `partial` is set, nowhere else.

    `dimensions` None is the server's own. `max_tokens` holds for each item; one that is longer is cut where `truncate` is set,
    else refused.
    """

    items: tuple[RequestItem | InvalidRequest, ...]
    dimensions: int | None
    encoding_format: Literal["float", "base64"]
    max_tokens: int
    truncate: bool
    partial: bool

    @property
    def characters(self) -> int:
        """How long the texts are together, and the instruction of each item: one that all share as often as there are items."""
        return sum(item.characters for item in self.items if isinstance(item, RequestItem))

    @property
    def num_bytes(self) -> int:
        """The memory that its items take, about. They may share an instruction: it is there once."""
        items = [item for item in self.items if isinstance(item, RequestItem)]
        instructions = {id(item.instruction): getsizeof(item.instruction) for item in items}
        return sum(item.num_bytes for item in items) + sum(instructions.values())


def parse(body: bytes | bytearray, limits: RequestLimits) -> EmbeddingRequest:
    """The request that `body` holds. Raises InvalidRequest, or ModelNotFound."""
    request = _decode(body)
    _check_model(request, limits)
    context = Context(
        limits=limits,
        instruction=typed(request, "instruction", str, "a string"),
        strings_are_images=_one_of(request, "modality", ("text", "image")) == "image",
    )
    max_tokens, truncate = _length_rule(request, limits)
    partial = _flag(request, "partial")
    return EmbeddingRequest(
        dimensions=_dimensions(request, limits),
        encoding_format="base64" if _one_of(request, "encoding_format", ("float", "base64")) == "base64" else "float",
        max_tokens=max_tokens,
        truncate=truncate,
        partial=partial,
        items=_items(request, context, partial),
    )


def _decode(body: bytes | bytearray) -> dict[str, Any]:
    request = decode_json(body)
    if not isinstance(request, dict):
        raise InvalidRequest('the body must be a JSON object with "input" or "messages"')
    return request


def _flag(request: dict[str, Any], key: str) -> bool:
    return typed(request, key, bool, "true or false") or False


def _one_of(request: dict[str, Any], key: str, choices: tuple[str, str]) -> str | None:
    what = f'"{choices[0]}" or "{choices[1]}"'
    value = typed(request, key, str, what)
    if value is None or value in choices:
        return value
    raise refusal(key, f"must be {what}")


def _check_model(request: dict[str, Any], limits: RequestLimits) -> None:
    model = typed(request, "model", str, "a string")
    if model is not None and model not in limits.model_names:
        raise ModelNotFound(f"model is not served here; this server has {', '.join(sorted(limits.model_names))}")


def _dimensions(request: dict[str, Any], limits: RequestLimits) -> int | None:
    what = f"an integer from 1 to {limits.dimension}"
    dimensions = typed(request, "dimensions", int, what)
    if dimensions is None or 1 <= dimensions <= limits.dimension:
        return dimensions
    raise refusal("dimensions", f"must be {what}")


def _length_rule(request: dict[str, Any], limits: RequestLimits) -> tuple[int, bool]:
    """(max_tokens, truncate). `truncate_prompt_tokens` asks for the cut, whatever `truncate` says."""
    truncate = _flag(request, "truncate")
    what = f"an integer from 1 to {limits.max_input_tokens}, or -1 for {limits.max_input_tokens}"
    max_tokens = typed(request, "truncate_prompt_tokens", int, what)
    if max_tokens is None:
        return limits.max_input_tokens, truncate
    if max_tokens == -1:
        return limits.max_input_tokens, True
    if 1 <= max_tokens <= limits.max_input_tokens:
        return max_tokens, True
    raise refusal("truncate_prompt_tokens", f"must be {what}")


def _items(request: dict[str, Any], context: Context, partial: bool) -> tuple[RequestItem | InvalidRequest, ...]:
    def read(reader: Callable[[Any, str, Context], RequestItem], value: Any, param: str) -> RequestItem | InvalidRequest:
        try:
            return reader(value, param, context)
        except InvalidRequest as fault:
            if not partial:
                raise
            return fault.with_traceback(None)  # its frames would hold the body for as long as the request lives

    given, messages = request.get("input"), request.get("messages")
    if (given is None) == (messages is None):
        raise InvalidRequest('exactly one of "input" and "messages" must be given', "input")
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise refusal("messages", "must be a list of at least one message")
        return (read(read_conversation, messages, "messages"),)
    if not isinstance(given, list) or is_conversation(given):
        return (read(read_item, given, "input"),)
    if not given:
        raise refusal("input", "must not be an empty list")
    if is_token_ids(given, context.limits):
        raise refusal("input", TOKEN_IDS)
    if len(given) > context.limits.max_inputs:
        raise refusal("input", f"holds {len(given)} inputs; at most {context.limits.max_inputs} are accepted in one request")
    return tuple(read(read_item, value, f"input[{index}]") for index, value in enumerate(given))
