"""The grammar of an item: one element of `input`, or one conversation -> one RequestItem.

An item is parts and an instruction, a part is a text or an image. `null` is an absent key; keys that no rule names are ignored.
Every refusal says where (`param`) and what is accepted, and never repeats the body. Pure: nothing is fetched, no image is
opened, no token is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from app.dialects.base64_text import WHITE_SPACE, decode_base64, decoded_size
from app.dialects.contract import MAX_URL_LENGTH, TOKEN_IDS_ADVICE, ImageSource, InvalidRequest, Part, RequestItem, RequestLimits
from app.dialects.fields import refused, typed

# type -> the keys that may carry what the part holds; "text" is a text, every other type an image.
TYPED_FORMS = {
    "text": ("text", "data"),
    "image": ("image", "data"),
    "image_url": ("image_url",),
    "image_base64": ("image_base64",),
}
PAYLOAD_KEYS = ("text", "image", "content", "data", "image_url", "image_base64")
_CONVERSATIONS = (("user",), ("system", "user"), ("user", "assistant"), ("system", "user", "assistant"))
VIDEO_KEYS = ("video", "video_url")
_VIDEO_TYPES = ("video", "video_url", "input_video")
# All that the rules read of an object. Whatever else it holds decides nothing.
ITEM_KEYS = frozenset({"type", "role", "instruction", *PAYLOAD_KEYS, *VIDEO_KEYS})
_TYPES = ", ".join(f'"{name}"' for name in TYPED_FORMS)
_IMAGE = 'an http(s) URL, a data URI or base64, as a string or as {"url": "..."}'
_NO_VIDEO = "holds video, which this server does not embed; send single frames as images"
TOKEN_IDS = f"holds numbers. {TOKEN_IDS_ADVICE}"

_MAX_SCHEME = 16  # the longest scheme worth a message of its own; longer ones are refused as base64, which has no colon
_MAX_DATA_HEADER = 1024  # a media type and its parameters are far shorter; without a bound all of the image is searched


@dataclass(frozen=True, slots=True)
class Context:
    """What the request says for all of its items."""

    limits: RequestLimits
    instruction: str | None
    strings_are_images: bool


def is_conversation(value: list[Any]) -> bool:
    """Tells whether every element has a role: such a list is one item wherever it stands."""
    return bool(value) and all(isinstance(message, dict) and message.get("role") is not None for message in value)


def is_token_ids(value: list[Any], limits: RequestLimits) -> bool:
    """Tells whether a list holds numbers, or lists of them, and nothing else. As many elements as may be inputs are proof
    enough."""
    heads = (element[0] if isinstance(element, list) and element else element for element in islice(value, limits.max_inputs))
    return bool(value) and all(type(head) in (int, float) for head in heads)


def read_item(value: Any, param: str, context: Context) -> RequestItem:
    """Reads one element of `input`. Raises InvalidRequest."""
    if isinstance(value, str):
        part = _image(value, param, context.limits) if context.strings_are_images else _bare_string(value, param, context.limits)
        return RequestItem((part,), context.instruction, False, param)
    if isinstance(value, dict):
        own = typed(value, "instruction", str, "a string", f"{param}.")
        parts = _gather(_object_parts(value, param, context.limits), param, context.limits)
        return RequestItem(parts, context.instruction if own is None else own, False, param)
    if isinstance(value, list) and is_conversation(value):
        return read_conversation(value, param, context)
    if isinstance(value, list) and is_token_ids(value, context.limits):
        raise refused(param, TOKEN_IDS)
    raise refused(param, "must be a string, an object, or a list of messages that all have a role")


def read_conversation(messages: list[Any], param: str, context: Context) -> RequestItem:
    """Reads a list of messages as one item. Raises InvalidRequest."""
    content: dict[str, tuple[Any, str]] = {}
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise refused(f"{param}[{index}].role", 'must be "system", "user" or "assistant", in an object')
        if role in content:
            raise refused(f"{param}[{index}].role", "stands there twice: a conversation has at most one message of each role")
        content[role] = (message.get("content"), f"{param}[{index}].content")
    if tuple(content) not in _CONVERSATIONS:
        raise refused(param, "must be an optional system message, one user message, an optional assistant message without text")
    instruction = _only_text(*content["system"], context.limits) if "system" in content else context.instruction
    if "assistant" in content:
        answer, at = content["assistant"]
        if answer is not None and _only_text(answer, at, context.limits):
            raise refused(at, "must be without text: what is embedded is the user message")
    asked, at = content["user"]
    parts = _gather(_content(asked, at, context.limits), at, context.limits)
    return RequestItem(parts, instruction, "system" in content, param)


def _only_text(content: Any, param: str, limits: RequestLimits) -> str:
    texts = []
    for part in _content(content, param, limits):
        if not isinstance(part, str):
            raise refused(part.param, "is an image, where only text may stand")
        texts.append(part)
    return "".join(texts)


# Parts


def _gather(parts: Iterable[Part], param: str, limits: RequestLimits) -> tuple[Part, ...]:
    gathered: list[Part] = []
    images = 0
    for part in parts:
        images += isinstance(part, ImageSource)
        if images > limits.max_input_tokens:  # each costs a token at the least: refused before a million are decoded or fetched
            raise refused(param, f"holds more images than fit into {limits.max_input_tokens} tokens")
        gathered.append(part)
    if not gathered:
        raise refused(param, "holds nothing to embed: its lists are empty")
    return tuple(gathered)


def _object_parts(value: dict[str, Any], param: str, limits: RequestLimits) -> Iterator[Part]:
    """Yields the parts of an item that is an object: one typed part, "content", or "image" and "text"."""
    _refuse_video(value, param)
    if value.get("role") is not None:
        raise refused(param, "is a message outside of a conversation: put it into a list in which every element has a role")
    held = _held(value)
    if value.get("type") is not None:
        yield _typed_part(value, param, limits)
    elif held == ["content"]:
        yield from _content(value["content"], f"{param}.content", limits)
    elif held and set(held) <= {"text", "image"}:
        yield from (_image(image, at, limits) for image, at in _one_or_many(value, "image", param))
        yield from (_text(text, at) for text, at in _one_or_many(value, "text", param))
    elif not held:
        raise refused(param, 'holds nothing to embed: it needs "text", "image", "content", or a "type" with what it names')
    elif len(held) == 1:
        raise refused(param, f'needs a "type" beside "{held[0]}": one of {_TYPES}')
    else:
        raise _two_forms(param, held)


def _one_or_many(value: dict[str, Any], key: str, param: str) -> Iterator[tuple[Any, str]]:
    given, at = value.get(key), f"{param}.{key}"
    if isinstance(given, list):
        yield from ((element, f"{at}[{index}]") for index, element in enumerate(given))
    elif given is not None:
        yield given, at


def _content(value: Any, param: str, limits: RequestLimits) -> Iterator[Part]:
    if isinstance(value, str):
        yield _bare_string(value, param, limits)
    elif isinstance(value, list):
        yield from (_part(part, f"{param}[{index}]", limits) for index, part in enumerate(value))
    else:
        raise refused(param, "must be a string or a list of parts")


def _part(value: Any, param: str, limits: RequestLimits) -> Part:
    if isinstance(value, str):
        return _bare_string(value, param, limits)
    if not isinstance(value, dict):
        raise refused(param, f'must be a string, or an object whose "type" is one of {_TYPES}')
    _refuse_video(value, param)
    if value.get("instruction") is not None:
        raise refused(f"{param}.instruction", "is out of place: an instruction is for a whole input, not for one of its parts")
    return _typed_part(value, param, limits)


def _typed_part(value: dict[str, Any], param: str, limits: RequestLimits) -> Part:
    kind, held = value.get("type"), _held(value)
    if not isinstance(kind, str) or kind not in TYPED_FORMS:
        raise refused(f"{param}.type", f"must be one of {_TYPES}")
    if not set(held) & set(TYPED_FORMS[kind]):
        raise refused(param, f"holds nothing to embed: its type needs {' or '.join(TYPED_FORMS[kind])}")
    if len(held) > 1:
        raise _two_forms(param, held)
    at = f"{param}.{held[0]}"
    return _text(value[held[0]], at) if kind == "text" else _image(value[held[0]], at, limits)


def _held(value: dict[str, Any]) -> list[str]:
    return [key for key in PAYLOAD_KEYS if value.get(key) is not None]


def _two_forms(param: str, held: list[str]) -> InvalidRequest:
    return refused(param, f"fits more than one form, for it has {' and '.join(held)}; keep what one form needs")


def _refuse_video(value: dict[str, Any], param: str) -> None:
    if value.get("type") in _VIDEO_TYPES or any(value.get(key) is not None for key in VIDEO_KEYS):
        raise refused(param, _NO_VIDEO)


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise refused(param, "must be a string")
    return value


def _bare_string(value: str, param: str, limits: RequestLimits) -> Part:
    """Reads a string that no key calls a text: what says of itself that it is an image, is one."""
    head = value[:11].lower()
    if head == "data:image/":
        return _image(value, param, limits)
    if head == "data:video/":
        raise refused(param, _NO_VIDEO)
    return value


# Images


def _image(value: Any, param: str, limits: RequestLimits) -> ImageSource:
    given = value.get("url") if isinstance(value, dict) else value
    if not isinstance(given, str):
        raise refused(param, f"must be {_IMAGE}")
    source = given.strip(WHITE_SPACE)
    scheme, colon, _ = source[:_MAX_SCHEME].partition(":")
    if not colon:
        return ImageSource(None, _base64(source, 0, param, limits), param)
    if scheme.lower() in ("http", "https"):
        return ImageSource(_url(source, param), None, param)
    if scheme.lower() == "data":
        return ImageSource(None, _base64(source, _after_header(source, param), param, limits), param)
    raise refused(param, f"must be {_IMAGE}; no other scheme is accepted")


def _url(source: str, param: str) -> str:
    if len(source) > MAX_URL_LENGTH:
        raise refused(param, f"is a URL of more than {MAX_URL_LENGTH} characters")
    try:
        parts = urlsplit(source)
        sound = bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise refused(param, "is not a valid http(s) URL")
    return source


def _after_header(source: str, param: str) -> int:
    """Finds where the data begin in data:[<media type>][;<parameter>...];base64,<data> (RFC 2397). The media type decides
    nothing."""
    comma = source.find(",", 0, _MAX_DATA_HEADER)
    if comma < 0 or not source[:comma].lower().endswith(";base64"):
        raise refused(param, "is a data URI without base64; it must be data:image/...;base64,...")
    return comma + 1


def _base64(text: str, start: int, param: str, limits: RequestLimits) -> bytes:
    if len(text) == start:
        raise refused(param, "is an empty image")
    if decoded_size(text, start) > limits.max_image_bytes:
        raise refused(param, f"is an image of more than {limits.max_image_bytes} bytes, which is the limit")
    data = decode_base64(text, start)
    if data is None:
        raise refused(param, 'is not valid base64 (A-Z a-z 0-9 + /, padded with "="), nor an http(s) URL, nor a data URI')
    return data
