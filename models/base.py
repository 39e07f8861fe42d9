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
    """The sizes of an image: (width, height) in pixels, as it came and as the model reads it, and `grid` (rows, columns) in
    patches.

    `official_size` is the size to which the model's official code would resize it, if our limits make it smaller; else None.
    """

    original_size: tuple[int, int]
    size: tuple[int, int]
    grid: tuple[int, int]
    num_tokens: int
    official_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image as the vision tower reads it: `patches` is uint8 (rows * columns, channels * patch_size ** 2)."""

    grid: ImageGrid
    patches: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """One thing to embed: its parts are fused into one vector, in their order. An image may be given as `prepare_image` returns
    it.

    `instruction` None is the model's default; `verbatim` leaves it without the official embedder's tidying. An input of more than
    `max_tokens` tokens (None: as many as the model reads) is cut if `truncate` is set, else refused.
    """

    parts: tuple[str | Image.Image | PreparedImage, ...]
    instruction: str | None = None
    verbatim: bool = False
    max_tokens: int | None = None
    truncate: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PreparedInput:
    """A valid, tokenised input, which fits the model and its limit.

    `token_ids` is int64 (num_tokens,), with an image's placeholder as often as the image has tokens. `positions` is int64
    (3, num_tokens): time, height and width; None if all three are 0 .. num_tokens - 1. The first `prefix_tokens` tokens are those
    that every input with the same instruction begins with; the first `unpooled_tokens` are read and not pooled.

    `content_hash` is a digest of all that decides the vector: inputs with equal ones have equal vectors. It is computed when the
    input is made, on the thread that prepares it: some microseconds for a short text, more for an image's patches, and that
    without the interpreter's lock.
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
        """The number of all tokens that the model reads: of template, text and images."""
        return len(self.token_ids)

    @property
    def image_tokens(self) -> int:
        return sum(image.grid.num_tokens for image in self.images)

    @property
    def text_tokens(self) -> int:
        return self.num_tokens - self.image_tokens

    @property
    def num_bytes(self) -> int:
        """The memory that the input's arrays take, without its images' patches."""
        return self.token_ids.nbytes + (0 if self.positions is None else self.positions.nbytes)


def _content_hash(
    token_ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64] | None,
    images: Sequence[PreparedImage],
    unpooled_tokens: int,
) -> bytes:
    """Returns the SHA-256 of all that decides a vector.

    Nobody can make two inputs with one SHA-256, and on a CPU with instructions for it, it takes half of BLAKE2b's time. The grids
    go first and every array behind its size and rows, so that no two inputs write the same bytes.
    """
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
    the input would be refused, None if it would not; `text_tokens` is None for a text too long to be worth counting."""

    prompt: str
    text_tokens: int | None
    image_tokens: int
    images: tuple[ImageGrid, ...]
    truncated: bool
    refusal: str | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a checkpoint and the device that it is to run on.

    `fingerprint` is a hex digest of all that decides a vector: weights, template, tokenizer, image settings and dtype. `width` is
    the number of a vector's components, `max_tokens` the length of the longest sequence that the model was made for;
    `cuda_available` tells whether there is a CUDA device, used or not. `largest_image` is the most bytes that a prepared image
    has, `image_token_bytes` the bytes of each of its tokens.
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
    """Makes inputs ready for the device: tokenizer, template and image processing of one checkpoint. It needs neither the weights
    in memory nor the device. Every method is safe in many threads at once."""

    @property
    def info(self) -> ModelInfo: ...

    def reduced_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Returns the size to which an image of `size` (width, height) will be resized, if our limits make it smaller than the
        official code would; None if the image must not be reduced before. Raises InvalidInput."""

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        """Preprocesses one image of mode RGB, so that its pixels need not be kept. `original_size` is the size in the file, if
        the image has been reduced. Raises InvalidInput for an image that this model cannot embed."""

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        """Tokenises and preprocesses one input. Raises InvalidInput for one that this model cannot embed; InputTooLong is a kind
        of it."""

    def prepare_all(self, items: Sequence[EmbeddingInput]) -> list[PreparedInput | Refusal]:
        """Prepares each input as `prepare` does, or says why it is refused."""

    def describe(self, item: EmbeddingInput) -> Description:
        """Describes what `prepare` would make of an input, without its pixels. Raises InvalidInput, but not for its length."""


class EmbeddingModel(Protocol):
    """Computes vectors: the weights of one checkpoint on one device. Only the device's thread may call it."""

    @property
    def device(self) -> str:
        """The torch device, such as "cpu" or "cuda:0"."""

    def embed(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Returns unit vectors, float32 (len(batch), width): row i is of batch[i].

        Raises OutOfDeviceMemory if a smaller batch may fit, DeviceLost if nothing more can be run.
        """

    def warm_up(self) -> float:
        """Runs once at every shape for which something is compiled or captured, and returns the measured rate in tokens per
        second."""

    def memory_bytes(self) -> int:
        """Returns the memory that the device has given to this process, in bytes; 0 on a CPU."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Both halves of one checkpoint."""

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
    """The client's mistake. The message is safe to show and says what to do."""


class InputTooLong(InvalidInput):
    """The input has more tokens than its limit, and may not or cannot be cut."""


class ModelLoadError(RuntimeError):
    """The checkpoint cannot be used: it is missing, incomplete, broken, or of a kind that is not known. The message is one clear
    line."""


class DeviceUnavailable(ModelLoadError):
    """The device that the settings name is not there."""


class OutOfDeviceMemory(RuntimeError):
    """The batch does not fit; a smaller one may."""


class DeviceLost(RuntimeError):
    """The device is unusable until the process is started anew."""
