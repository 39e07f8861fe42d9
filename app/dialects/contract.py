"""The contract between a dialect and the service: an EmbeddingRequest goes in, a Reply or a Failure comes back.

Pure: no I/O, no HTTP, no images, no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from sys import getsizeof
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.base import Refusal

TOKEN_IDS_ADVICE = (
    "Token ids are not accepted, because the ids of another tokenizer would give meaningless vectors: "
    "send the text itself (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)
# The request line that common servers accept. Parsing and quoting a longer URL would hold up the event loop.
MAX_URL_LENGTH = 8190


class InvalidRequest(ValueError):
    """The client's mistake. The message is safe to show; `param` is its place in the body, as in "input[3].image"."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(Exception):
    """The request names a model that is not served here. The message names those that are."""

    param = "model"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What this server accepts. `dimension` is the length of a whole vector, `max_image_bytes` that of one decoded base64."""

    model_names: frozenset[str]
    max_inputs: int
    max_input_tokens: int
    dimension: int
    max_image_bytes: int


# What a request says


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image comes from: exactly one of `url` (http or https) and `data` (its file's bytes, not yet looked at)."""

    url: str | None = field(repr=False)
    data: bytes | None = field(repr=False)
    param: str


Part = str | ImageSource


@dataclass(frozen=True, slots=True)
class RequestItem:
    """One thing to embed: at least one part, in the order that they are fused.

    `instruction` is the item's own, else the request's; None is the model's default. `verbatim`: it was a system message.
    `is_text` tells that no part is an image, `characters` how long texts and instruction are together: counted when the body is
    parsed, since there may be millions of parts. `num_bytes` is the memory that the parts take.
    """

    parts: tuple[Part, ...] = field(repr=False)
    instruction: str | None = field(repr=False)
    verbatim: bool
    param: str
    is_text: bool = field(init=False, repr=False)
    characters: int = field(init=False, repr=False)
    num_bytes: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        texts = [len(part) for part in self.parts if isinstance(part, str)]
        object.__setattr__(self, "is_text", len(texts) == len(self.parts))
        object.__setattr__(self, "characters", sum(texts) + len(self.instruction or ""))
        held = (part if isinstance(part, str) else part.data or part.url for part in self.parts)
        object.__setattr__(self, "num_bytes", sum(map(getsizeof, held)))


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A request, validated. A Refusal stands in the place of a malformed item if `partial` is set, nowhere else.

    `dimensions` None is the server's own. `max_tokens` holds for each item; one that is longer is cut if `truncate` is set, else
    refused. `encoding_format` is how vectors are written: numbers, or base64 of little-endian float32.
    """

    items: tuple[RequestItem | Refusal, ...]
    dimensions: int | None
    max_tokens: int
    truncate: bool
    partial: bool
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def characters(self) -> int:
        """The length of the texts together, and of each item's instruction: one that all share counts as often as there are
        items."""
        return sum(item.characters for item in self.items if isinstance(item, RequestItem))

    @property
    def num_bytes(self) -> int:
        """The memory that its items take, about. They may share an instruction: it is there once."""
        items = [item for item in self.items if isinstance(item, RequestItem)]
        instructions = {id(item.instruction): getsizeof(item.instruction) for item in items}
        return sum(item.num_bytes for item in items) + sum(instructions.values())


# What comes of it


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that the model read."""

    text_tokens: int
    image_tokens: int

    @property
    def total(self) -> int:
        return self.text_tokens + self.image_tokens


@dataclass(frozen=True, slots=True)
class Failure:
    """An error, ready to be written. `code` is the word by which a program may know it, None if the status says enough; `param`
    is the place in the request; `retry_after` is in seconds, for what may pass."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a dialect writes: a unit vector, float32 of shape (dimension,), or a Failure for each item of the request in order."""

    request: EmbeddingRequest
    rows: Sequence[npt.NDArray[np.float32] | Failure]
    usage: Usage
    model: str
