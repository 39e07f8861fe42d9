"""The seam: all that the scheduler and the engine know of a model.

A family (models/qwen3_vl and others) has two halves. A Preparer turns inputs into token ids and patches, on CPU threads, each
input by itself, and finds everything that is wrong with one; it holds no weights. An EmbeddingModel holds the weights and turns
prepared inputs into vectors, on the one thread that owns the device. Nothing here knows HTTP or asyncio, and torch is not
imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest width and height in pixels that an image keeps; 0 is no limit."""

    max_width: int = 0
    max_height: int = 0


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """How an image is read: sizes are (width, height) in pixels, `grid` is (rows, columns) in patches.

    `official_size` is what the model's official code would resize it to, where our limits make it smaller; else None.
    """

    original_size: tuple[int, int]
    size: tuple[int, int]
    grid: tuple[int, int]
    num_tokens: int
    official_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image as the vision tower reads it: `patches` is uint8 of shape (rows * columns, channels * patch_size ** 2)."""

    grid: ImageGrid
    patches: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """One thing to embed: its parts are fused into one vector, in their order. An image may be given as `prepare_image` made it.

    `instruction` None is the model's default; `verbatim` takes it as it stands, without the official embedder's tidying.
    More than `max_tokens` tokens (None: as many as the model reads) are cut where `truncate` is set, else refused.
    """

    parts: tuple[str | Image.Image | PreparedImage, ...]
    instruction: str | None = None
    verbatim: bool = False
    max_tokens: int | None = None
    truncate: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PreparedInput:
    """A valid input, tokenised, its cost known: it fits the model and the limit.

    `token_ids` is int64 of shape (num_tokens,); image placeholders in it are as many as the images' tokens. `positions` is
    int64 of shape (3, num_tokens): time, height and width; None where all three are 0 .. num_tokens - 1. The first
    `prefix_tokens` tokens are those that every input with the same instruction begins with; the first `unpooled_tokens` are read
    and not pooled.

    `content_hash` is a digest of all that decides the vector: inputs with equal ones have the same. It is taken when the input is
    made: a short text takes some microseconds, an image's patches longer, on a thread and without the interpreter's lock.
    """

    token_ids: npt.NDArray[np.int64]
    images: tuple[PreparedImage, ...] = ()
    positions: npt.NDArray[np.int64] | None = None
    truncated: bool = False
    prefix_tokens: int = 0
    unpooled_tokens: int = 0
    content_hash: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        content_hash = _content_hash(self.token_ids, self.positions, self.images, self.unpooled_tokens)
        object.__setattr__(self, "content_hash", content_hash)

    @property
    def num_tokens(self) -> int:
        """Every token that the model reads: template, text and image."""
        return len(self.token_ids)

    @property
    def image_tokens(self) -> int:
        return sum(image.grid.num_tokens for image in self.images)

    @property
    def text_tokens(self) -> int:
        return self.num_tokens - self.image_tokens

    @property
    def num_bytes(self) -> int:
        """The memory that its arrays take, without its images'."""
        return self.token_ids.nbytes + (0 if self.positions is None else self.positions.nbytes)


def _content_hash(
    token_ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64] | None,
    images: Sequence[PreparedImage],
    unpooled_tokens: int,
) -> bytes:
    """SHA-256: nobody can make two inputs with one digest, and it takes half of BLAKE2b's time where the CPU has instructions
    for it. Every array stands behind its size and rows, every grid in the head, so that no two inputs write the same bytes."""
    arrays: list[npt.NDArray[Any]] = [token_ids] if positions is None else [token_ids, positions]
    grids = b";".join(b"%d,%d" % image.grid.grid for image in images)
    digest = hashlib.sha256(b"%d:%d:%b:" % (unpooled_tokens, len(arrays), grids))
    for array in (*arrays, *(image.patches for image in images)):
        digest.update(b"%d,%d:" % (array.nbytes, len(array)))
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Description:
    """What the model would read of an input. `prompt` has image placeholders as the template writes them; `refusal` says why
    the input would be refused, None where it would not; `text_tokens` is None for a text too long to be worth counting."""

    prompt: str
    text_tokens: int | None
    image_tokens: int
    images: tuple[ImageGrid, ...]
    truncated: bool
    refusal: str | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is.

    `fingerprint` is a hex digest of all that decides a vector: weights, template, tokenizer, image settings and dtype. `width` is
    the number of components, `max_tokens` the longest sequence it was made for, `cuda_available` whether there is a CUDA device,
    used or not, `largest_image` the bytes of a prepared image at most, `image_token_bytes` those for each of its tokens.
    """

    model_type: str
    width: int
    max_tokens: int
    device: str
    dtype: str
    fingerprint: str
    supports_images: bool
    cuda_available: bool = False
    largest_image: int = 0
    image_token_bytes: int = 0


class Preparer(Protocol):
    """What makes inputs ready for the device: tokenizer, template and image processing of one checkpoint. It needs neither the
    weights in memory nor the device. Every method is safe in many threads at once."""

    @property
    def info(self) -> ModelInfo: ...

    def reduced_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Returns what an image of `size` (width, height) will be resized to, if limits of ours make it smaller than the
        official code would; None if it must come as it is. Raises InvalidInput."""

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        """Preprocesses one image, of mode RGB, so that it need not be kept whole. `original_size` is that of the file, if the
        image was reduced already. Raises InvalidInput for what this model cannot embed."""

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        """Tokenises and preprocesses one input. Raises InvalidInput for what this model cannot embed, InputTooLong among it."""

    def prepare_all(self, items: Sequence[EmbeddingInput]) -> list[PreparedInput | Refusal]:
        """Prepares several inputs at once, each as `prepare` does, or says why not."""

    def describe(self, item: EmbeddingInput) -> Description:
        """Describes what `prepare` would make of an input, without its pixels. Raises InvalidInput, but not for its length."""


class EmbeddingModel(Protocol):
    """What computes: the weights of one checkpoint on one device. Only ever called by the device's thread."""

    @property
    def device(self) -> str:
        """The torch device, such as "cpu" or "cuda:0"."""

    def embed(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Returns unit vectors, float32 of shape (len(batch), width), row i of batch[i].

        Raises OutOfDeviceMemory if a smaller batch may fit, DeviceLost if nothing more can be run.
        """

    def warm_up(self) -> float:
        """Runs once at every shape that pays, and returns the measured rate in tokens per second."""

    def memory_bytes(self) -> int:
        """Returns the memory that the device has given to this process, in bytes; 0 on a CPU."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint, loaded: what prepares its inputs and what computes their vectors."""

    preparer: Preparer
    model: EmbeddingModel


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an input gets no vector, as a value. `message` is safe to show and says what to do; `param` is the input's place in
    the request, such as "input[3].image", if it has one; `reason` is the name under which app.errors knows its kind."""

    message: str
    param: str | None = None
    reason: str = "invalid"


class InvalidInput(ValueError):
    """The client's mistake. The message is safe to show, and says what to do."""


class InputTooLong(InvalidInput):
    """More tokens than the limit, and not to be cut."""


class ModelLoadError(RuntimeError):
    """No usable checkpoint: missing, incomplete, broken, or of a kind that is not known. The message is one clear line."""


class DeviceUnavailable(ModelLoadError):
    """The device that the settings name is not there."""


class OutOfDeviceMemory(RuntimeError):
    """This batch does not fit; a smaller one may."""


class DeviceLost(RuntimeError):
    """The device is unusable until the process is started anew."""
