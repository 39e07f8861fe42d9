"""The schemas of the OpenAPI document: what a request may hold and what a reply holds, in JSON Schema 2020-12.

A request's schemas repeat the rules of app.dialects as far as JSON Schema can say them; the rest stands in the descriptions.
In requests null is an absent key, and keys that no schema names are ignored.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}

# An object that is an input or a part has the keys of one form and of no other.
_FORM_KEYS = ("text", "image", "content", "data", "image_url", "image_base64", "video", "video_url")

# A sun on a blue sky, 64 x 64 pixels: small enough to be read in an example, and an image all the same.
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEUuhqv2ri34H8TPAAAAeElEQVR42s3QsQ2DQBBE0Xd7SCakBHdi3KlLuVIo4UIC4JwY"
    "CSQCZ/ZEX/tXEwx/k1v9wGNDxpRSgdzaRNAxEPT0BAMdwZ0g9rJgJB0umYJUjj87JBhdqW+gQblQGSPPkyq0c8/ERlBZCGZmgoVKsPI67HNa7Hd5AyMPGMp/"
    "r+FIAAAAAElFTkSuQmCC"
)
DATA_URI = f"data:image/png;base64,{PNG}"
_DOG = "https://example.com/dog.jpg"
IMAGE_URL = "https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen-VL/assets/demo.jpeg"


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def record(properties: dict[str, Schema], **more: Any) -> Schema:
    """An object with all of these keys; it may grow others."""
    return {"type": "object", "required": list(properties), "properties": properties, **more}


def optional(*types: str, **more: Any) -> Schema:
    return {"type": [*types, "null"], **more}


def schemas(*, model_name: str, dimension: int | None, max_inputs: int) -> dict[str, Schema]:
    return {
        "EmbeddingRequest": _request(model_name, dimension),
        "Input": _input(max_inputs),
        **_ITEMS,
        **_MESSAGES,
        **_PARTS,
        **_embedding_replies(dimension),
        **_PREVIEW_REPLIES,
        **_MODEL_REPLIES,
        **_HEALTH_REPLIES,
        **_ERRORS,
    }


# Requests


def _request(model_name: str, dimension: int | None) -> Schema:
    return {
        "type": "object",
        "description": "Exactly one of `input` and `messages` is given.",
        "properties": {
            "input": {
                "anyOf": [ref("Input"), NULL],
                "description": "What to embed: one input, or a list of them. A list gives one vector for each of its inputs, in "
                "order; the parts inside one input are fused into one vector.",
            },
            "messages": {
                "anyOf": [ref("Conversation"), NULL],
                "description": "One conversation, which gives one vector. Its system message, where it has one, is the "
                "instruction, taken verbatim.",
            },
            "model": optional(
                "string",
                description="The model's name or its id: `id` and `root` in `/v1/models`. Another is refused with 404.",
                default=model_name,
            ),
            "instruction": optional(
                "string",
                description="The instruction of every input that brings none of its own. It is stripped and gets a full stop "
                "unless it ends in punctuation; absent or empty, it is the model's default.",
            ),
            "dimensions": optional(
                "integer",
                minimum=1,
                description="Keep so many of the first components and normalise again (Matryoshka). "
                + (f"All {dimension} where it is absent." if dimension else "All of them where it is absent."),
                **({"maximum": dimension} if dimension else {}),
            ),
            "encoding_format": {
                "enum": ["float", "base64", None],
                "default": "float",
                "description": "How a vector is written: as numbers, or as base64 of little-endian float32.",
            },
            "truncate": optional(
                "boolean",
                default=False,
                description="`true`: cut an over-long input to the limit, from the end of its last text. `false`: refuse it. "
                "Images and the instruction are never cut.",
            ),
            "truncate_prompt_tokens": {
                "anyOf": [{"type": "integer", "minimum": 1}, {"const": -1}, NULL],
                "description": "Cut every input to so many tokens, at most to the model's limit; -1 is that limit. Fewer than "
                "the prompt's template takes are refused.",
            },
            "modality": {
                "enum": ["text", "image", None],
                "default": "text",
                "description": "`image`: every string of `input` is an image.",
            },
            "partial": optional(
                "boolean",
                default=False,
                description="`true`: an input that fails, a malformed one included, becomes a row with an error, and the reply "
                "is 200 whatever the rows hold.",
            ),
            "user": {"description": "Accepted and kept nowhere."},
        },
        "oneOf": [
            {"required": ["input"], "properties": {"input": ref("Input"), "messages": NULL}},
            {"required": ["messages"], "properties": {"messages": ref("Conversation"), "input": NULL}},
        ],
    }


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
                "examples": [["first", {"image": _DOG}]],
            },
        ]
    }


def _form(held: dict[str, Schema], title: str, description: str, example: Any, **may_hold: Schema) -> Schema:
    """An object that holds these keys, and none of the keys that belong to another form."""
    absent = {key: NULL for key in _FORM_KEYS if key not in held}
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
    {"text": "a dog on a beach", "image": _DOG, "instruction": "Retrieve photos."},
    text=_any_number(STRING),
    image=_any_number(_IMAGE),
    type=NULL,
    **_ITEM_KEYS,
)
_CONTENT = _form(
    {"content": ref("Content")},
    "Parts in order",
    "Texts and images, fused into one vector in the order given.",
    {"content": [{"type": "text", "text": "before"}, {"type": "image", "image": _DOG}]},
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
    """A part of a content list. An instruction is for a whole input, never for a part."""
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
            _typed("image", "image", _IMAGE, "Typed image", "The image: a URL, a data URI or base64.", _DOG),
            _typed("image", "data", _IMAGE, "Typed image, as data", "The same.", _DOG),
            _typed("image_url", "image_url", _IMAGE, "Image URL", "The same, as chat clients write it.", {"url": _DOG}),
            _typed("image_base64", "image_base64", _IMAGE, "Image in base64", "The same.", "iVBORw0KGgo..."),
        ]
    },
    "ImageSource": {
        "description": "An http(s) URL, a data URI with base64, or bare base64. White space in base64 is dropped, all else is "
        "validated strictly; the media type of a data URI decides nothing.",
        "anyOf": [{"type": "string", "minLength": 1}, record({"url": {"type": "string", "minLength": 1}})],
    },
}

# Replies


def _embedding_replies(dimension: int | None) -> dict[str, Schema]:
    vector: Schema = {"type": "array", "items": {"type": "number"}, "minItems": 1}
    if dimension:
        vector["maxItems"] = dimension
    row = {"object": {"const": "embedding"}, "index": COUNT}
    return {
        "EmbeddingList": record(
            {
                "object": {"const": "list"},
                "model": {"type": "string", "description": "The model's name."},
                "data": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"anyOf": [ref("Embedding"), ref("FailedInput")]},
                    "description": "A row for each input, in order.",
                },
                "usage": ref("Usage"),
            }
        ),
        "Embedding": record(
            {
                **row,
                "embedding": {
                    "anyOf": [vector, {"type": "string", "contentEncoding": "base64"}],
                    "description": "The unit vector: numbers, or base64 of little-endian float32, as `encoding_format` asks.",
                },
            }
        ),
        "FailedInput": record(
            {**row, "embedding": NULL, "error": ref("ErrorDetail")},
            description="The row of an input that failed, where `partial` was asked for.",
        ),
        "Usage": record(
            {
                "prompt_tokens": {**COUNT, "description": "Every token that the model read: template, text and image."},
                "total_tokens": {**COUNT, "description": "The same."},
                "prompt_tokens_details": record({"text_tokens": COUNT, "image_tokens": COUNT}),
            }
        ),
    }


_PREVIEW_REPLIES: dict[str, Schema] = {
    "PreviewList": record(
        {
            "object": {"const": "list"},
            "model": STRING,
            "data": {"type": "array", "minItems": 1, "items": ref("Preview"), "description": "A row for each input, in order."},
        }
    ),
    "Preview": record(
        {
            "object": {"const": "embedding.preview"},
            "index": COUNT,
            "prompt": optional("string", description="The prompt as the model's chat template writes it."),
            "text_tokens": optional("integer", minimum=0, description="Template included; null for a text too long to count."),
            "image_tokens": optional("integer", minimum=0),
            "total_tokens": optional("integer", minimum=0),
            "images": {"type": "array", "items": ref("PreviewImage")},
            "truncated": {"type": "boolean", "description": "Whether the input would be cut."},
            "refusal": {
                "anyOf": [ref("ErrorDetail"), NULL],
                "description": "Why the input would be refused; null where it would not.",
            },
        }
    ),
    "PreviewImage": record(
        {
            "original_width": {**COUNT, "description": "In pixels, as sent."},
            "original_height": COUNT,
            "width": {**COUNT, "description": "In pixels, as the model sees it: within the server's image limits, on its grid."},
            "height": COUNT,
            "grid_rows": {**COUNT, "description": "Rows of patches."},
            "grid_columns": COUNT,
            "tokens": COUNT,
            "official_width": {**COUNT, "description": "In pixels, as the model's official code would take it."},
            "official_height": COUNT,
            "smaller_than_official": {
                "type": "boolean",
                "description": "Whether the server's image limits make it smaller than the official code would.",
            },
        }
    ),
}

_MODEL_REPLIES: dict[str, Schema] = {
    "ModelList": record({"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}),
    "Model": record(
        {
            "id": {"type": "string", "description": "The model's name."},
            "object": {"const": "model"},
            "created": {"type": "integer", "description": "Unix time in seconds."},
            "owned_by": STRING,
            "root": {"type": "string", "description": "The model's id on the Hugging Face Hub."},
            "fingerprint": optional(
                "string",
                description="A hash of all that decides a vector: weights, template, tokenizer, image settings, dtype and "
                "dimension. Vectors under equal fingerprints are comparable. null while the model loads.",
            ),
            "embedding_dimension": optional("integer", minimum=1, description="Components of a vector; null while unknown."),
            "max_input_tokens": {"type": "integer", "minimum": 1, "description": "The longest input, template included."},
        }
    ),
}

_HEALTH_REPLIES: dict[str, Schema] = {
    "Health": record(
        {
            "status": {"enum": ["ok", "loading", "draining", "failed"]},
            "model": optional("string"),
            "model_path": optional("string", description="As configured."),
            "device": optional("string"),
            "cuda_available": optional("boolean"),
            "embedding_dimension": optional("integer", minimum=1, description="Components of a vector."),
            "native_dimension": optional("integer", minimum=1, description="The model's own width."),
            "max_image_width": optional("integer", minimum=0, description="In pixels; 0 is no limit."),
            "max_image_height": optional("integer", minimum=0, description="In pixels; 0 is no limit."),
            "dtype": optional("string"),
            "queue_depth": optional("integer", minimum=0, description="Inputs that wait for the device."),
            "uptime_seconds": optional("number", minimum=0),
            "version": optional("string"),
            "fingerprint": optional("string"),
        },
        description="All keys are always there; what is not yet known is null.",
    ),
    "Healthy": {"allOf": [ref("Health"), {"properties": {"status": {"const": "ok"}}}]},
    "Unhealthy": {"allOf": [ref("Health"), {"properties": {"status": {"enum": ["loading", "draining", "failed"]}}}]},
}

_ERRORS: dict[str, Schema] = {
    "Error": record({"error": ref("ErrorDetail")}),
    "ErrorDetail": record(
        {
            "message": {"type": "string", "description": "What is wrong and what to do."},
            "type": {
                "enum": [
                    "invalid_request_error",
                    "authentication_error",
                    "rate_limit_error",
                    "timeout_error",
                    "service_unavailable",
                    "server_error",
                ]
            },
            "param": optional("string", description="The place in the body, such as `input[3].image`."),
            "code": optional(
                "string",
                description="`invalid_api_key`, `model_not_found`, `not_found`, `overloaded`, `loading`, `draining` or "
                "`worker_died`; null where the type says enough.",
            ),
        }
    ),
}
