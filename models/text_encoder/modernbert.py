"""ModernBERT over a packed row: rotary positions, norms before each part of a layer, and in most layers attention within a
window. transformers' ModernBertModel is the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from models.packed.attention import AttentionKernel, Send
from models.packed.masks import Window
from models.packed.rotary import per_token, rotate
from models.packed.token_row import TokenRow
from models.text_encoder.bert import Linear, Norm

# transformers' name for layers whose attention is within a window.
LOCAL = "sliding_attention"


@dataclass(frozen=True, slots=True)
class ModernBertLayer:
    """The weights of one layer. `kind` is its attention's, as transformers names it; the first layer has no `attention_norm`,
    since its input is normed already."""

    kind: str
    attention_norm: Norm | None
    qkv: Linear
    out: Linear
    norm: Norm
    up: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Linear

    @classmethod
    def from_module(cls, module: Any) -> ModernBertLayer:
        """Takes the weights of a ModernBertEncoderLayer."""
        return cls(
            kind=module.attention_type,
            attention_norm=Norm.from_module(module.attn_norm) if isinstance(module.attn_norm, torch.nn.LayerNorm) else None,
            qkv=Linear.from_modules(module.attn.Wqkv),
            out=Linear.from_modules(module.attn.Wo),
            norm=Norm.from_module(module.mlp_norm),
            up=Linear.from_modules(module.mlp.Wi),
            activation=module.mlp.act,
            down=Linear.from_modules(module.mlp.Wo),
        )


class ModernBertEncoder:
    """The weights of a ModernBertModel, as transformers loads it, and its forward over a packed row."""

    def __init__(self, model: Any, kernel: AttentionKernel) -> None:
        config = model.config
        self._kernel = kernel
        self._words = model.embeddings.tok_embeddings.weight.data
        self._first_norm = Norm.from_module(model.embeddings.norm)
        self._layers = [ModernBertLayer.from_module(layer) for layer in model.layers]
        self._last_norm = Norm.from_module(model.final_norm)
        self._rotary = model.rotary_emb
        self._heads: int = config.num_attention_heads
        self._window = Window(config.sliding_window, self._words.device)

    def __call__(self, row: TokenRow, send: Send) -> torch.Tensor:
        """Returns the last hidden state of every token: (T, width)."""
        lengths = row.lengths.tolist()
        attend_all = self._kernel.bidirectional(lengths, send)
        # Within a window that is longer than every sequence all tokens see all.
        attend_near = self._kernel.local(lengths, self._window, send) if max(lengths) > self._window.reach + 1 else attend_all
        hidden = self._first_norm(F.embedding(send(row.token_ids), self._words))
        positions = send(row.positions[0]).unsqueeze(0)
        kinds = {layer.kind for layer in self._layers}
        # transformers rotates in float32 by angles of the model's dtype.
        rotations = {kind: [part.float() for part in per_token(*self._rotary(hidden, positions, kind))] for kind in kinds}
        for layer in self._layers:
            normed = hidden if layer.attention_norm is None else layer.attention_norm(hidden)
            q, k, v = layer.qkv(normed).view(len(hidden), 3, self._heads, -1).unbind(1)
            cos, sin = rotations[layer.kind]
            attend = attend_near if layer.kind == LOCAL else attend_all
            hidden = hidden + layer.out(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, q.shape[-1] ** -0.5))
            up, gate = layer.up(layer.norm(hidden)).chunk(2, dim=-1)
            hidden = hidden + layer.down(layer.activation(up) * gate)
        return self._last_norm(hidden)
