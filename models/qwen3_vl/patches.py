"""Images as the vision tower reads them: size, grid, patches, and the three positions of every token.

Sizes follow the official embedder (QwenLM/Qwen3-VL-Embedding): qwen_vl_utils' smart_resize between its two pixel bounds, in one
bicubic resize. Patches stay uint8 until they are on the device; the values are normalised there.
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
    """How a checkpoint cuts an image: from its image processor and vision config. Means and deviations are in [0, 1]. `whitens`
    tells whether the one transparent colour that a palette, gray or RGB image may have becomes white."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whitens: bool = False

    @classmethod
    def from_processor(cls, processor: Any) -> VisionSpec:
        """From the checkpoint's image processor, as transformers loads it."""
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
        """Sides of a resized image are multiples of this."""
        return self.patch_size * self.merge_size


def _whitens(processor: Any) -> bool:
    """Whether the processor of this transformers does it: 5.20 keeps the colour, 5.22 has it white."""
    picture = Image.new("RGB", (processor.patch_size * processor.merge_size,) * 2)
    black = processor(images=[picture], do_resize=False, return_tensors="np")["pixel_values"]
    picture.info["transparency"] = (0, 0, 0)
    return not np.array_equal(black, processor(images=[picture], do_resize=False, return_tensors="np")["pixel_values"])


def plan_image(size: tuple[int, int], limits: ImageLimits, spec: VisionSpec) -> ImageGrid:
    """The grid of an image of `size` (width, height). Raises InvalidInput for a side 200 times as long as the other."""
    # As it came, and not as the limits fit it: what smart_resize refuses may pass once it is small and rounded.
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
    """Bytes of the patches of an image within the limits, at most."""
    width, height, longest = (
        math.ceil(side / spec.factor) * spec.factor
        for side in (limits.max_width, limits.max_height, math.sqrt(MIN_PIXELS * MAX_RATIO))
    )
    # Where a side has no limit the official bound is left. What has too few pixels is made larger: most of all the narrowest.
    pixels = min(max(width * height or MAX_PIXELS, longest * spec.factor), MAX_PIXELS)
    return pixels * 3


def fit_within(size: tuple[int, int], limits: ImageLimits) -> tuple[int, int]:
    """(width, height) scaled down to the limits, its aspect kept as far as whole pixels allow."""
    width, height = size
    scale = min(1.0, (limits.max_width or width) / width, (limits.max_height or height) / height)
    if scale == 1.0:
        return size
    # Rounding must not push a permitted aspect ratio over the limit.
    shortest = math.ceil(max(width, height) * scale / MAX_RATIO)
    return max(shortest, round(width * scale)), max(shortest, round(height * scale))


def extract_patches(image: Image.Image, grid: ImageGrid, spec: VisionSpec) -> PreparedImage:
    """Resize an RGB image and cut it into patches, in the order of the stock Qwen2VLImageProcessor: merged blocks row by row,
    within a block its patches row by row, within a patch channel, row, column.

    The image may be the original at a half, a quarter or an eighth of its sides, rounded up: its last column and row may stand
    for less than a pixel, and what they lack is no part of the original.
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
    """uint8 (height, width, 3) with `colour` as white. After the resizing, as transformers' processor does it: by Pillow, which
    takes the low byte of what a PNG of 16 bits says."""
    return np.where((pixels == np.asarray(colour) & 0xFF).all(axis=-1, keepdims=True), np.uint8(255), pixels)


def mrope_positions(
    token_ids: npt.NDArray[np.int64], image_token_id: int, merge_size: int, grids: Iterable[ImageGrid]
) -> npt.NDArray[np.int64]:
    """Time, height and width of every token, int64 of shape (3, num_tokens): text counts on in all three, an image holds time
    still and counts its merged rows and columns, and what follows goes on after its longer side.

    The rule of Qwen3VLModel.get_rope_index in transformers.
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
