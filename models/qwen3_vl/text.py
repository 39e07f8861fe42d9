"""The text model of Qwen3-VL: Qwen3's decoder, but for where a token stands. transformers' Qwen3VLTextModel is the reference."""

from __future__ import annotations

import torch

from models.packed.decoder import Decoder, Rotation


class TextModel(Decoder):
    """A Qwen3VLTextModel as transformers loads it: taken over, and of no other use."""

    def rotation(self, hidden: torch.Tensor, positions: torch.Tensor) -> Rotation:
        """Interleaved M-RoPE of positions int64 (3, T): time, height and width."""
        cos, sin = self._rotary(hidden, positions.unsqueeze(1))
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)
