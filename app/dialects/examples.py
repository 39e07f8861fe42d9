"""Examples of the OpenAPI document: bodies that a reader can send as they are, and what comes back."""

from __future__ import annotations

from typing import Any

# A sun on a blue sky, 64 x 64 pixels: small enough to be read in an example, and an image all the same.
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEUuhqv2ri34H8TPAAAAeElEQVR42s3QsQ2DQBBE0Xd7SCakBHdi3KlLuVIo4UIC4JwY"
    "CSQCZ/ZEX/tXEwx/k1v9wGNDxpRSgdzaRNAxEPT0BAMdwZ0g9rJgJB0umYJUjj87JBhdqW+gQblQGSPPkyq0c8/ERlBZCGZmgoVKsPI67HNa7Hd5AyMPGMp/"
    "r+FIAAAAAElFTkSuQmCC"
)
DATA_URI = f"data:image/png;base64,{PNG}"
DOG = "https://example.com/dog.jpg"
IMAGE_URL = "https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen-VL/assets/demo.jpeg"

# (summary, body); the document adds the model's name.
OPENAI_REQUESTS: dict[str, tuple[str, Any]] = {
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

_WHERE = "input[1].image"
_USAGE = {"prompt_tokens": 23, "total_tokens": 23, "prompt_tokens_details": {"text_tokens": 23, "image_tokens": 0}}
_VECTOR = {"object": "embedding", "index": 0, "embedding": [0.0312]}
_FAILED = {
    "object": "embedding",
    "index": 1,
    "embedding": None,
    "error": {"message": f"{_WHERE} is an empty image", "type": "invalid_request_error", "param": _WHERE, "code": None},
}
OPENAI_REPLIES: dict[str, tuple[str, Any]] = {
    "vectors": ("Vectors (shortened)", {"object": "list", "data": [_VECTOR], "usage": _USAGE}),
    "partial": ("With `partial`, if an input failed", {"object": "list", "data": [_VECTOR, _FAILED], "usage": _USAGE}),
}
