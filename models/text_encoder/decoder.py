"""Qwen3 over a packed row, the last token of each sequence pooled: the layers are those of Qwen3-VL's text model.

transformers' Qwen3Model is the reference. It differs in one thing: a token has one position, not three. An instruction stands at
the beginning, so that its keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedInput
from models.qwen3_vl.attention import AttentionKernel, PrefixKeys, Span
from models.qwen3_vl.layout import PackedRow
from models.qwen3_vl.prefix_cache import PrefixCache
from models.qwen3_vl.staging import Staging
from models.qwen3_vl.text import Rotation, TextModel
from models.text_encoder.heads import Heads


def is_plain(config: Any) -> bool:
    """Whether attention is causal in every layer, over all that comes before."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    causal = getattr(config, "is_causal", True) is not False and not getattr(config, "use_bidirectional_attention", False)
    return causal and layers == {"full_attention"}


class DecoderForward:
    """Vectors by a Qwen3Model as transformers loads it: taken over, and of no other use."""

    def __init__(self, model: Any, kernel: AttentionKernel, heads: Heads, staging: Staging) -> None:
        """Raises ModelLoadError for an activation that is not known."""
        self._text = _Text(model)
        self._kernel = kernel
        self._heads = heads
        self._staging = staging
        self.prefixes = PrefixCache(self._compute_prefix)

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Unit vectors, float32 of shape (len(batch), width): row i is of batch[i]'s last token."""
        self._staging.begin()
        send = self._staging.send
        row = PackedRow.lay_out(batch, self.prefixes.for_batch(batch))
        positions, last_rows = send(row.positions), send(row.last_rows)
        attention = self._kernel.causal(row.spans, send)
        hidden = self._text.embed(send(row.token_ids))
        pooled = self._text.run(hidden, positions, attention, last_rows, [prefix.layers for prefix in row.prefixes])
        found = self._staging.fetch(self._heads(pooled.float()))
        rows = np.empty_like(found)
        rows[row.order] = found
        return rows

    def _compute_prefix(self, token_ids: npt.NDArray[np.int64]) -> list[PrefixKeys]:
        send = self._staging.send
        positions = np.arange(len(token_ids))[None]
        attention = self._kernel.causal([Span(len(token_ids))], send)
        return self._text.keys(self._text.embed(send(token_ids)), send(positions), attention)


class _Text(TextModel):
    def rotation(self, hidden: torch.Tensor, positions: torch.Tensor) -> Rotation:
        """Of positions int64 (1 or 3, T), the first of which counts."""
        cos, sin = self._rotary(hidden, positions[:1])
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)
