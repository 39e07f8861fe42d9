"""Schemas of what an item may be: the grammar of app.dialects.items, as far as JSON Schema can say it.

The rest stands in the descriptions. `null` is an absent key, and keys that no schema names are ignored.
"""

from __future__ import annotations

from typing import Any

from app.dialects.examples import DOG
from app.dialects.fields import NULL, Schema, Server
from app.dialects.items import PAYLOAD_KEYS, VIDEO_KEYS

STRING: Schema = {"type": "string"}

# An object that is an input or a part has the keys of one form and of no other.
FORM_KEYS = (*PAYLOAD_KEYS, *VIDEO_KEYS)


def ref(name: str) -> Schema:
    """Refers to a schema of the document by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def record(properties: dict[str, Schema], **more: Any) -> Schema:
    """Makes the schema of an object with all of these keys; it may grow others."""
    return {"type": "object", "required": list(properties), "properties": properties, **more}


def optional(*types: str, **more: Any) -> Schema:
    return {"type": [*types, "null"], **more}


def item_schemas(server: Server) -> dict[str, Schema]:
    """Makes the schemas of inputs, parts and messages, by name."""
    return {"Input": _input(server.max_inputs), **_ITEMS, **_MESSAGES, **_PARTS}


def _input(max_inputs: int) -> Schema:
    return {
        "anyOf": [
            ref("Item"),
            {
                "type": "array",
                "items": ref("Item"),
                "minItems": 1,
                "maxItems": max_inputs,
                "title": "List of inputs",
                "description": "A vector for each, in order. A list in which every element has a role is one conversation.",
                "examples": [["first", {"image": DOG}]],
            },
        ]
    }


def _form(held: dict[str, Schema], title: str, description: str, example: Any, **may_hold: Schema) -> Schema:
    """Makes the schema of an object that holds these keys, and none of those that belong to another form."""
    absent = {key: NULL for key in FORM_KEYS if key not in held}
    properties = {"properties": {**absent, **held, **may_hold}}
    return record(held, title=title, description=description, examples=[example]) | properties


def _one_or_many(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}


def _any_number(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "array", "items": schema}, NULL]}


_IMAGE = ref("ImageSource")
_ITEM_KEYS: dict[str, Schema] = {"instruction": optional("string", description="The instruction of this input."), "role": NULL}
_FUSED = _form(
    {},
    "Text and image",
    "All images, then all texts, fused into one vector. Either may be missing, and either may be a list.",
    {"text": "a dog on a beach", "image": DOG, "instruction": "Retrieve photos."},
    text=_any_number(STRING),
    image=_any_number(_IMAGE),
    type=NULL,
    **_ITEM_KEYS,
)
_CONTENT = _form(
    {"content": ref("Content")},
    "Parts in order",
    "Texts and images, fused into one vector in the order given.",
    {"content": [{"type": "text", "text": "before"}, {"type": "image", "image": DOG}]},
    type=NULL,
    **_ITEM_KEYS,
)

_ITEMS: dict[str, Schema] = {
    "Item": {
        "description": "One thing to embed. It has exactly one of these forms.",
        "anyOf": [
            {
                "type": "string",
                "title": "Text",
                "description": "The text; an empty one is a text too. A string that starts with `data:image/` is an image, and "
                "with `modality` `image` every string is one.",
                "examples": ["a dog on a beach"],
            },
            {"allOf": [ref("TextPart"), {"properties": _ITEM_KEYS}]},
            {"allOf": [ref("ImagePart"), {"properties": _ITEM_KEYS}]},
            ref("FusedItem"),
            ref("ContentItem"),
            ref("Conversation"),
        ],
    },
    "FusedItem": {
        **_FUSED,
        "anyOf": [
            {"required": ["text"], "properties": {"text": _one_or_many(STRING)}},
            {"required": ["image"], "properties": {"image": _one_or_many(_IMAGE)}},
        ],
    },
    "ContentItem": _CONTENT,
}


def _in_content(part: Schema) -> Schema:
    """Makes the schema of a part of a content list. An instruction is for a whole input, never for a part."""
    return {"anyOf": [STRING, {"allOf": [part, {"properties": {"instruction": NULL}}]}]}


def _turns(*messages: str) -> Schema:
    count = len(messages)
    return {"type": "array", "prefixItems": [ref(name) for name in messages], "minItems": count, "maxItems": count}


def _message(role: str, content: Schema) -> Schema:
    return record({"role": {"const": role}, "content": content})


_MESSAGES: dict[str, Schema] = {
    "Conversation": {
        "title": "Conversation",
        "description": "One vector: that of the user message. A system message before it is the instruction, taken verbatim; an "
        "assistant message after it has no text.",
        "examples": [[{"role": "system", "content": "Retrieve photos."}, {"role": "user", "content": "a dog on a beach"}]],
        "anyOf": [
            _turns("UserMessage"),
            _turns("SystemMessage", "UserMessage"),
            _turns("UserMessage", "AssistantMessage"),
            _turns("SystemMessage", "UserMessage", "AssistantMessage"),
        ],
    },
    "SystemMessage": _message("system", {"anyOf": [STRING, {"type": "array", "items": _in_content(ref("TextPart"))}]}),
    "UserMessage": _message("user", ref("Content")),
    "AssistantMessage": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"const": "assistant"},
            "content": {
                "anyOf": [
                    NULL,
                    {"const": ""},
                    {"type": "array", "items": record({"type": {"const": "text"}, "text": {"const": ""}})},
                ]
            },
        },
    },
    "Content": {
        "anyOf": [
            STRING,
            {"type": "array", "items": _in_content({"anyOf": [ref("TextPart"), ref("ImagePart")]}), "minItems": 1},
        ],
        "description": "A text, or a list of parts: strings, and objects with a `type`.",
    },
}


def _typed(kind: str, key: str, schema: Schema, title: str, description: str, example: Any) -> Schema:
    return _form({"type": {"const": kind}, key: schema}, title, description, {"type": kind, key: example})


_PARTS: dict[str, Schema] = {
    "TextPart": {
        "anyOf": [
            _typed("text", "text", STRING, "Typed text", "The text, whatever it starts with.", "a dog on a beach"),
            _typed("text", "data", STRING, "Typed text, as data", "The same.", "a dog on a beach"),
        ]
    },
    "ImagePart": {
        "anyOf": [
            _typed("image", "image", _IMAGE, "Typed image", "The image: a URL, a data URI or base64.", DOG),
            _typed("image", "data", _IMAGE, "Typed image, as data", "The same.", DOG),
            _typed("image_url", "image_url", _IMAGE, "Image URL", "The same, as chat clients write it.", {"url": DOG}),
            _typed("image_base64", "image_base64", _IMAGE, "Image in base64", "The same.", "iVBORw0KGgo..."),
        ]
    },
    "ImageSource": {
        "description": "An http(s) URL, a data URI with base64, or bare base64. White space in base64 is dropped, all else is "
        "validated strictly; the media type of a data URI decides nothing.",
        "anyOf": [{"type": "string", "minLength": 1}, record({"url": {"type": "string", "minLength": 1}})],
    },
}
