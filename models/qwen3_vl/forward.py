"""The packed forward of Qwen3-VL: its text model's, with the features of a batch's images in the places of their tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.packed.attention import Heads
from models.packed.compiled import Stepped
from models.packed.decoder import Decoder, ImageRows
from models.packed.forward import DecoderForward
from models.packed.rotary import Rotation, per_token
from models.packed.staging import Staging
from models.packed.token_row import TokenRow
from models.packed.varlen import choose_kernel
from models.qwen3_vl.patches import VisionSpec
from models.qwen3_vl.vision_tower import VisionTower
from models.vectors import normalize


class TextDecoder(Decoder):
    """A Qwen3VLTextModel, as transformers loads it: Qwen3's decoder, but for the rotation, which takes all three positions of a
    token."""

    def rotation(self, hidden: torch.Tensor, positions: torch.Tensor) -> Rotation:
        """Returns cosine and sine by interleaved M-RoPE of positions int64 (3, T): time, height and width."""
        return per_token(*self._rotary(hidden, positions.unsqueeze(1)))


class PackedForward(DecoderForward):
    """Computes vectors by a Qwen3VLModel, as transformers loads it. The module's weights are taken over: it cannot be run by
    itself any more."""

    def __init__(self, model: Any, spec: VisionSpec) -> None:
        """Raises ModelLoadError for an activation that the decoder does not know."""
        staging = Staging(model.device)
        text = TextDecoder(model.language_model)
        super().__init__(text, normalize, choose_kernel(model.device, model.dtype, text.sizes.attention_heads), staging)
        self._image_token_id: int = model.config.image_token_id
        vision = model.config.vision_config
        heads = Heads(vision.num_heads, vision.num_heads, vision.hidden_size // vision.num_heads)
        self._tower = VisionTower(model.visual, spec, choose_kernel(model.device, model.dtype, heads), staging)

    def stepped(self) -> list[Stepped]:
        return [self._decoder, self._tower]

    def embed_images(self, row: TokenRow, hidden: torch.Tensor) -> ImageRows | None:
        if not row.images:
            return None
        features, deepstack = self._tower(row.images)
        images = ImageRows(self._staging.send(np.flatnonzero(row.token_ids == self._image_token_id)), deepstack)
        hidden[images.rows] = features.to(hidden.dtype)
        return images
