"""The vision tower: makes features of the patches of all images of a batch, packed into one row.

transformers' Qwen3VLVisionModel is the reference, and its modules hold the weights. They are called in another way: pixels come
as uint8 and are normalised on the device, the places of patches are computed on the CPU once for each grid, attention is planned
once for all images, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from models.base import ImageGrid, ModelLoadError, PreparedImage
from models.packed.attention import AttentionKernel
from models.packed.rotary import Rotation, rotate
from models.packed.staging import Staging
from models.qwen3_vl.patches import VisionSpec, extract_patches

# Grids whose tables are kept: one takes 60 KiB for an image of 512 x 512.
MAX_KEPT_GRIDS = 64


@dataclass(frozen=True, slots=True)
class VisionBlock:
    """Weights of a block of the tower, matrices as (out, in), each with its bias."""

    norm: tuple[torch.Tensor, torch.Tensor]
    qkv: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor]
    mlp_norm: tuple[torch.Tensor, torch.Tensor]
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    epsilon: float
    activation: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def from_module(cls, module: Any) -> VisionBlock:
        """Takes the weights of a Qwen3VLVisionBlock."""
        attention, mlp = module.attn, module.mlp
        return cls(
            norm=_weights(module.norm1),
            qkv=_weights(attention.qkv),
            out=_weights(attention.proj),
            mlp_norm=_weights(module.norm2),
            up=_weights(mlp.linear_fc1),
            down=_weights(mlp.linear_fc2),
            epsilon=module.norm1.eps,
            activation=mlp.act_fn,
        )


@dataclass(frozen=True, slots=True)
class GridTable:
    """The places of a grid's patches, in the order of its merged blocks: `places` float32 (patches, 2) has row and column; `taps`
    int64 and `weights` float32 (patches, 4) interpolate the learned position embeddings."""

    places: npt.NDArray[np.float32]
    taps: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def project(
    hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, block: VisionBlock, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Does a block's work before attention: returns queries and keys, both rotated, and values, each
    (patches, heads, head_dim)."""
    normed = F.layer_norm(hidden, hidden.shape[-1:], *block.norm, block.epsilon)
    q, k, v = F.linear(normed, *block.qkv).view(hidden.shape[0], 3, heads, -1).unbind(1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def finish(hidden: torch.Tensor, attended: torch.Tensor, block: VisionBlock) -> torch.Tensor:
    """Does a block's work after attention: output projection and MLP, each added to its input."""
    hidden = hidden + F.linear(attended, *block.out)
    normed = F.layer_norm(hidden, hidden.shape[-1:], *block.mlp_norm, block.epsilon)
    return hidden + F.linear(block.activation(F.linear(normed, *block.up)), *block.down)


@dataclass(frozen=True, slots=True)
class VisionSteps:
    """The functions that run a block: as they are written, or compiled."""

    project: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = project
    finish: Callable[..., torch.Tensor] = finish


class PixelNormalizer:
    """Normalises pixels as the stock processor does, on their device."""

    def __init__(self, spec: VisionSpec, device: torch.device) -> None:
        self._frames = spec.temporal_patch_size
        # As in the processor's arithmetic, the rescaling is folded into mean and deviation.
        self._mean = torch.tensor(spec.mean, device=device).view(-1, 1, 1) / spec.rescale_factor
        self._std = torch.tensor(spec.std, device=device).view(-1, 1, 1) / spec.rescale_factor

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalises uint8 (patches, channels * patch_size ** 2) to float32 (patches, channels * frames * patch_size ** 2)."""
        patches = (pixels.view(len(pixels), len(self._mean), 1, -1).float() - self._mean) / self._std
        # A still image fills every frame of a temporal patch.
        return patches.expand(-1, -1, self._frames, -1).reshape(len(pixels), -1)


def check_pixels(spec: VisionSpec, processor: Any) -> None:
    """Raises ModelLoadError if the checkpoint's image processor makes other values of a picture than PixelNormalizer does."""
    size = (3 * spec.factor, 2 * spec.factor)
    picture = Image.frombytes("RGB", size, bytes(index * 37 % 251 for index in range(size[0] * size[1] * 3)))
    patches = extract_patches(picture, ImageGrid(size, size, (2 * spec.merge_size, 3 * spec.merge_size), 6), spec).patches
    theirs = processor(images=[picture], do_resize=False, return_tensors="pt")["pixel_values"]
    ours = PixelNormalizer(spec, torch.device("cpu"))(torch.from_numpy(patches)) if len(spec.mean) == len(spec.std) == 3 else None
    if ours is None or ours.shape != theirs.shape or not torch.allclose(ours, theirs.float(), rtol=1e-3, atol=1e-3):
        raise ModelLoadError(
            "the checkpoint's image processor makes other values of pixels than to rescale them and to normalise each channel "
            "(do_rescale, do_normalize, image_mean, image_std)"
        )


class VisionTower:
    """The forward of a checkpoint's vision model, as transformers loads it."""

    def __init__(self, visual: Any, spec: VisionSpec, kernel: AttentionKernel, staging: Staging) -> None:
        self._visual = visual
        self._kernel = kernel
        self._staging = staging
        self._heads: int = visual.config.num_heads
        self._blocks = [VisionBlock.from_module(block) for block in visual.blocks]
        self.steps = VisionSteps()
        self._normalize = PixelNormalizer(spec, visual.device)
        side = round(visual.config.num_position_embeddings**0.5)
        self._table = lru_cache(maxsize=MAX_KEPT_GRIDS)(lambda grid: make_table(grid, spec.merge_size, side))

    def __call__(self, images: Sequence[PreparedImage]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns features for the text model's input, and deepstack features for its first layers: each (image tokens, width),
        in the order of the images."""
        send, visual = self._staging, self._visual
        tables = [self._table(image.grid.grid) for image in images]
        pixels = send.send_joined([image.patches for image in images])
        places = send.send_joined([table.places for table in tables])
        taps = send.send_joined([table.taps for table in tables])
        weights = send.send_joined([table.weights for table in tables])
        attend = self._kernel.bidirectional([len(table.places) for table in tables], send.send)

        hidden = self._embed(pixels)
        # Tap by tap: all four at once would be the largest tensor in memory.
        positions = visual.pos_embed(taps[:, 0]) * weights[:, :1]
        for tap in range(1, taps.shape[1]):
            positions += visual.pos_embed(taps[:, tap]) * weights[:, tap, None]
        hidden = hidden + positions.to(hidden.dtype)
        cos, sin = self._rotation(places)
        deepstack: list[torch.Tensor] = []
        mergers = dict(zip(visual.config.deepstack_visual_indexes, visual.deepstack_merger_list, strict=True))
        for index, block in enumerate(self._blocks):
            q, k, v = self.steps.project(hidden, cos, sin, block, self._heads)
            hidden = self.steps.finish(hidden, attend(q, k, v, q.shape[-1] ** -0.5), block)
            if index in mergers:
                deepstack.append(mergers[index](hidden))
        return visual.merger(hidden), deepstack

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 (patches, channels * patch_size ** 2) as (patches, width)."""
        # A convolution whose stride is its kernel is a matrix product.
        proj = self._visual.patch_embed.proj
        return F.linear(self._normalize(pixels).to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)

    def _rotation(self, places: torch.Tensor) -> Rotation:
        """Returns cosine and sine of every patch's angles, each float32 (patches, 1, head_dim): one half of the angles grows with
        the row, the other with the column."""
        angles = (places.unsqueeze(-1) * self._visual.rotary_pos_emb.inv_freq.float()).flatten(1)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos(), angles.sin()


def make_table(grid: tuple[int, int], merge_size: int, side: int) -> GridTable:
    """Makes the table of a grid of (rows, columns) patches; the position embeddings are learned on a square of `side` by `side`.

    The interpolation is bilinear, with aligned corners: get_vision_interpolation_indices_and_weights in transformers.
    """
    rows, columns = (
        np.broadcast_to(axis, grid)
        .reshape(grid[0] // merge_size, merge_size, grid[1] // merge_size, merge_size)
        .transpose(0, 2, 1, 3)
        .reshape(-1)
        for axis in np.ogrid[: grid[0], : grid[1]]
    )
    row_taps, row_weights = _taps(rows, grid[0], side)
    column_taps, column_weights = _taps(columns, grid[1], side)
    return GridTable(
        places=np.stack([rows, columns], axis=1).astype(np.float32),
        taps=(row_taps[:, :, None] * side + column_taps[:, None, :]).reshape(-1, 4),
        weights=(row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4),
    )


def _taps(index: npt.NDArray[np.int64], size: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Returns the two learned positions next to each index on an axis of `size` patches, and their weights: each (n, 2)."""
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(source)
    high_weight = source - low
    taps = np.stack([low, np.minimum(low + 1, side - 1)], axis=1).astype(np.int64)
    return taps, np.stack([1 - high_weight, high_weight], axis=1).astype(np.float32)


def _weights(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight and bias of a module."""
    return module.weight.data, module.bias.data
