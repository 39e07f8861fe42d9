"""Reply types of the routes that no dialect owns: the handlers write them, and the OpenAPI document has their schemas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from app.dialects.openai import ErrorDetail

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Pixels = Annotated[Count | None, Meta(description="In pixels; 0 is no limit.")]
Status = Literal["ok", "loading", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class Health:
    """All keys are always there; what is not yet known is null."""

    status: Status
    model: str | None
    model_path: Annotated[str | None, Meta(description="As configured.")]
    device: str | None
    cuda_available: bool | None
    embedding_dimension: Annotated[Positive | None, Meta(description="Components of a vector.")]
    max_image_width: Pixels
    max_image_height: Pixels
    native_dimension: Annotated[Positive | None, Meta(description="The model's own width.")]
    dtype: str | None
    queue_depth: Annotated[Count | None, Meta(description="Inputs that wait for the device.")]
    uptime_seconds: Annotated[float, Meta(ge=0)] | None
    version: str | None
    fingerprint: str | None


@dataclass(frozen=True, slots=True)
class Probe:
    """The status says it all."""

    status: Status


@dataclass(frozen=True, slots=True)
class Model:
    id: Annotated[str, Meta(description="The model's name.")]
    object: Literal["model"] = field(default="model", kw_only=True)
    created: Annotated[int, Meta(description="Unix time in seconds.")]
    owned_by: str
    root: Annotated[str, Meta(description="The model's id on the Hugging Face Hub.")]
    fingerprint: Annotated[
        str | None,
        Meta(
            description="A hash of all that decides a vector: weights, template, tokenizer, image settings, dtype and dimension. "
            "Vectors under equal fingerprints are comparable. null while the model loads."
        ),
    ]
    embedding_dimension: Annotated[Positive | None, Meta(description="Components of a vector; null while unknown.")]
    max_input_tokens: Annotated[int, Meta(ge=1, description="The longest input, template included.")]


@dataclass(frozen=True, slots=True)
class ModelList:
    object: Literal["list"] = field(default="list", kw_only=True)
    data: list[Model]


@dataclass(frozen=True, slots=True)
class PreviewImage:
    original_width: Annotated[int, Meta(ge=0, description="In pixels, as sent.")]
    original_height: Count
    width: Annotated[
        int, Meta(ge=0, description="In pixels, as the model sees it: within the server's image limits, on its grid.")
    ]
    height: Count
    grid_rows: Annotated[int, Meta(ge=0, description="Rows of patches.")]
    grid_columns: Count
    tokens: Count
    official_width: Annotated[int, Meta(ge=0, description="In pixels, as the model's official code would take it.")]
    official_height: Count
    smaller_than_official: Annotated[
        bool, Meta(description="Whether the server's image limits make it smaller than the official code would.")
    ]


@dataclass(frozen=True, slots=True)
class Preview:
    object: Literal["embedding.preview"] = field(default="embedding.preview", kw_only=True)
    index: Count
    prompt: Annotated[str | None, Meta(description="The prompt as the model's chat template writes it.")]
    text_tokens: Annotated[Count | None, Meta(description="Template included; null for a text too long to count.")]
    image_tokens: Count | None
    total_tokens: Count | None
    images: list[PreviewImage]
    truncated: Annotated[bool, Meta(description="Whether the input would be cut.")]
    refusal: Annotated[ErrorDetail | None, Meta(description="Why the input would be refused; null if it would not.")]


@dataclass(frozen=True, slots=True)
class PreviewList:
    object: Literal["list"] = field(default="list", kw_only=True)
    model: str
    data: Annotated[list[Preview], Meta(min_length=1, description="A row for each input, in order.")]
