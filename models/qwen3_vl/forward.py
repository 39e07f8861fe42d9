"""The packed forward of Qwen3-VL: that of its text model, with the features of all images of a batch put where they stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.packed.attention import Heads
from models.packed.compiled import Stepped
from models.packed.decoder import ImageRows
from models.packed.forward import DecoderForward
from models.packed.layout import PackedRow
from models.packed.staging import Staging
from models.packed.varlen import choose_kernel
from models.qwen3_vl.patches import VisionSpec
from models.qwen3_vl.text import TextModel
from models.qwen3_vl.vision_tower import VisionTower
from models.vectors import normalize


class PackedForward(DecoderForward):
    """Vectors by a Qwen3VLModel as transformers loads it: taken over, and of no other use."""

    def __init__(self, model: Any, spec: VisionSpec) -> None:
        """Raises ModelLoadError."""
        staging = Staging(model.device)
        text = TextModel(model.language_model)
        super().__init__(text, normalize, choose_kernel(model.device, model.dtype, text.sizes.attention_heads), staging)
        self._image_token_id: int = model.config.image_token_id
        vision = model.config.vision_config
        seeing = Heads(vision.num_heads, vision.num_heads, vision.hidden_size // vision.num_heads)
        self._tower = VisionTower(model.visual, spec, choose_kernel(model.device, model.dtype, seeing), staging)

    def stepped(self) -> list[Stepped]:
        return [self._decoder, self._tower]

    def see(self, row: PackedRow, hidden: torch.Tensor) -> ImageRows | None:
        if not row.images:
            return None
        features, deepstack = self._tower(row.images)
        images = ImageRows(self._staging.send(np.flatnonzero(row.token_ids == self._image_token_id)), deepstack)
        hidden[images.rows] = features.to(hidden.dtype)
        return images
