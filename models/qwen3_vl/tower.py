"""The vision tower: patches of all images of a batch, in one call, to features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from models.base import PreparedImage
from models.qwen3_vl.vision import VisionSpec


class VisionTower:
    """A checkpoint's vision model, as transformers loads it. Pixels come as uint8 and are normalised on the device."""

    def __init__(self, visual: Any, spec: VisionSpec) -> None:
        self._visual = visual
        self._spec = spec
        # The stock processor's arithmetic: the rescaling is folded into mean and deviation.
        self._mean = torch.tensor(spec.mean, device=visual.device).view(-1, 1, 1) / spec.rescale_factor
        self._std = torch.tensor(spec.std, device=visual.device).view(-1, 1, 1) / spec.rescale_factor

    def __call__(self, images: Sequence[PreparedImage]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features for the text model's input, and deepstack features for its first layers: each (image tokens, width), in the
        order of the images."""
        channels = len(self._spec.mean)
        pixels = torch.from_numpy(np.concatenate([image.patches for image in images])).to(self._visual.device)
        pixels = (pixels.view(len(pixels), channels, 1, -1).float() - self._mean) / self._std
        # A still image is shown in every frame of a temporal patch.
        pixels = pixels.expand(-1, -1, self._spec.temporal_patch_size, -1).reshape(len(pixels), -1)
        grids = torch.tensor([(1, *image.grid.grid) for image in images], device=pixels.device)
        output = self._visual(pixels, grid_thw=grids, return_dict=True)
        return output.pooler_output, output.deepstack_features
