"""Images as the vision tower reads them: size, grid, patches, and the three positions of every token.

Sizes follow the official embedder (QwenLM/Qwen3-VL-Embedding): qwen_vl_utils' smart_resize between its two pixel bounds, in one
bicubic resize. Patches stay uint8 until they are on the device, where their values are normalised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from qwen_vl_utils.vision_process import MAX_RATIO, smart_resize

from models.base import ImageGrid, ImageLimits, InvalidInput, PreparedImage

# The official embedder's constants, in pixels.
MIN_PIXELS = 4 * 32 * 32
MAX_PIXELS = 1800 * 32 * 32


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """How a checkpoint cuts and normalises images, by its image processor. Means and deviations are in [0, 1]. `whitens` tells
    whether the one transparent colour that a palette, gray or RGB image may have becomes white."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whitens: bool = False

    @classmethod
    def from_processor(cls, processor: Any) -> VisionSpec:
        """Reads the checkpoint's image processor, as transformers loads it."""
        return cls(
            patch_size=processor.patch_size,
            merge_size=processor.merge_size,
            temporal_patch_size=processor.temporal_patch_size,
            rescale_factor=processor.rescale_factor,
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            whitens=_whitens(processor),
        )

    @property
    def factor(self) -> int:
        """The pixels of which a resized image's sides are multiples."""
        return self.patch_size * self.merge_size


def _whitens(processor: Any) -> bool:
    """Tells whether the installed transformers' processor does so: 5.20 keeps the colour, 5.22 makes it white."""
    picture = Image.new("RGB", (processor.patch_size * processor.merge_size,) * 2)
    black = processor(images=[picture], do_resize=False, return_tensors="np")["pixel_values"]
    picture.info["transparency"] = (0, 0, 0)
    return not np.array_equal(black, processor(images=[picture], do_resize=False, return_tensors="np")["pixel_values"])


def plan_image(size: tuple[int, int], limits: ImageLimits, spec: VisionSpec) -> ImageGrid:
    """Plans the grid of an image of `size` (width, height). Raises InvalidInput if one side is more than 200 times the other."""
    # The size as it came, and not as the limits fit it: rounded to a small size, what smart_resize refuses might pass.
    if max(size) > MAX_RATIO * min(size):
        raise InvalidInput(f"one side of the image is more than {MAX_RATIO} times as long as the other")
    fitted, official = (_resized(side, spec) for side in (fit_within(size, limits), size))
    columns, rows = (side // spec.patch_size for side in fitted)
    tokens = rows * columns // spec.merge_size**2
    return ImageGrid(size, fitted, (rows, columns), tokens, None if fitted == official else official)


def _resized(size: tuple[int, int], spec: VisionSpec) -> tuple[int, int]:
    height, width = smart_resize(size[1], size[0], spec.factor, MIN_PIXELS, MAX_PIXELS)
    return width, height


def largest_image(limits: ImageLimits, spec: VisionSpec) -> int:
    """Returns the bytes of the patches of the largest image that the limits allow."""
    width, height, longest = (
        math.ceil(side / spec.factor) * spec.factor
        for side in (limits.max_width, limits.max_height, math.sqrt(MIN_PIXELS * MAX_RATIO))
    )
    # A side without a limit leaves the official bound. An image of too few pixels is made larger, and most so the narrowest.
    pixels = min(max(width * height or MAX_PIXELS, longest * spec.factor), MAX_PIXELS)
    return pixels * 3


def fit_within(size: tuple[int, int], limits: ImageLimits) -> tuple[int, int]:
    """Scales (width, height) down to the limits, and keeps the aspect ratio as far as integers allow."""
    width, height = size
    scale = min(1.0, (limits.max_width or width) / width, (limits.max_height or height) / height)
    if scale == 1.0:
        return size
    # Rounding must not push a permitted aspect ratio over the limit.
    shortest = math.ceil(max(width, height) * scale / MAX_RATIO)
    return max(shortest, round(width * scale)), max(shortest, round(height * scale))


def extract_patches(image: Image.Image, grid: ImageGrid, spec: VisionSpec) -> PreparedImage:
    """Resizes an RGB image and cuts it into patches, in the order of the stock Qwen2VLImageProcessor: merged blocks row by row,
    within a block its patches row by row, within a patch channel, row, column.

    The image may be the original reduced to a half, a quarter or an eighth of its sides, rounded up: the part of its last column
    and row that no pixel of the original stands behind is left out.
    """
    scale = round(max(grid.original_size) / max(image.size))
    box = (0, 0, grid.original_size[0] / scale, grid.original_size[1] / scale)
    resized = image if image.size == grid.size else image.resize(grid.size, Image.Resampling.BICUBIC, box)
    rows, columns = (side // spec.merge_size for side in grid.grid)
    pixels = np.asarray(resized)
    if spec.whitens and (colour := image.info.get("transparency")) is not None:
        pixels = _on_white(pixels, colour)
    pixels = pixels.reshape(rows, spec.merge_size, spec.patch_size, columns, spec.merge_size, spec.patch_size, 3)
    patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(grid.grid[0] * grid.grid[1], -1)
    return PreparedImage(grid, np.ascontiguousarray(patches))


def _on_white(pixels: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Makes the pixels of `colour` white in uint8 (height, width, 3). transformers' processor does so after resizing, by Pillow,
    which takes the low byte of a colour of 16 bits, as a PNG may name it."""
    return np.where((pixels == np.asarray(colour) & 0xFF).all(axis=-1, keepdims=True), np.uint8(255), pixels)


def mrope_positions(
    token_ids: npt.NDArray[np.int64], image_token_id: int, merge_size: int, grids: Iterable[ImageGrid]
) -> npt.NDArray[np.int64]:
    """Returns time, height and width of every token, int64 (3, num_tokens). Text counts on in all three; an image holds time
    still and counts its merged rows and columns; the token after an image goes on from its longer side.

    The rule is that of Qwen3VLModel.get_rope_index in transformers.
    """
    positions = np.empty((3, len(token_ids)), dtype=np.int64)
    is_image = token_ids == image_token_id
    done, next_position = 0, 0
    for grid in grids:
        start = done + int(np.argmax(is_image[done:]))
        text = start - done
        positions[:, done:start] = np.arange(next_position, next_position + text)
        next_position += text
        rows, columns = (side // merge_size for side in grid.grid)
        done = start + rows * columns
        positions[0, start:done] = next_position
        positions[1, start:done] = next_position + np.repeat(np.arange(rows), columns)
        positions[2, start:done] = next_position + np.tile(np.arange(columns), rows)
        next_position += max(rows, columns)
    positions[:, done:] = np.arange(next_position, next_position + len(token_ids) - done)
    return positions
