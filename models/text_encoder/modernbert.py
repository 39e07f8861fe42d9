"""ModernBERT over a packed row: places by rotation, normed before each part, and in most layers a token sees its surroundings
alone. transformers' ModernBertModel is the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from models.packed.attention import AttentionKernel, Send
from models.packed.masks import Window
from models.text_encoder.bert import Linear, Norm
from models.text_encoder.row import Row

LOCAL = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Layer:
    """`attention_norm` None: the first layer's input is normed already."""

    kind: str
    attention_norm: Norm | None
    qkv: Linear
    out: Linear
    norm: Norm
    up: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Linear

    @classmethod
    def take(cls, module: Any) -> Layer:
        return cls(
            kind=module.attention_type,
            attention_norm=Norm.take(module.attn_norm) if isinstance(module.attn_norm, torch.nn.LayerNorm) else None,
            qkv=Linear.take(module.attn.Wqkv),
            out=Linear.take(module.attn.Wo),
            norm=Norm.take(module.mlp_norm),
            up=Linear.take(module.mlp.Wi),
            activation=module.mlp.act,
            down=Linear.take(module.mlp.Wo),
        )


class ModernBertEncoder:
    """The weights of a ModernBertModel as transformers loads it, and its forward over a packed row."""

    def __init__(self, model: Any, kernel: AttentionKernel) -> None:
        config = model.config
        self._kernel = kernel
        self._words = model.embeddings.tok_embeddings.weight.data
        self._first_norm = Norm.take(model.embeddings.norm)
        self._layers = [Layer.take(layer) for layer in model.layers]
        self._last_norm = Norm.take(model.final_norm)
        self._rotary = model.rotary_emb
        self._heads: int = config.num_attention_heads
        self._window = Window(config.sliding_window, self._words.device)

    def __call__(self, row: Row, send: Send) -> torch.Tensor:
        """The last hidden states of every token: (T, width)."""
        lengths = row.lengths.tolist()
        whole = self._kernel.whole(lengths, send)
        # What is no longer than the window sees all of itself.
        local = self._kernel.local(lengths, self._window, send) if max(lengths) > self._window.reach + 1 else whole
        hidden = self._first_norm(F.embedding(row.token_ids, self._words))
        kinds = {layer.kind for layer in self._layers}
        turns = {kind: self._rotary(hidden, row.positions.unsqueeze(0), kind) for kind in kinds}
        for layer in self._layers:
            normed = hidden if layer.attention_norm is None else layer.attention_norm(hidden)
            q, k, v = layer.qkv(normed).view(len(hidden), 3, self._heads, -1).unbind(1)
            cos, sin = (part[0].unsqueeze(1) for part in turns[layer.kind])
            attend = local if layer.kind == LOCAL else whole
            hidden = hidden + layer.out(attend(_turn(q, cos, sin), _turn(k, cos, sin), v, q.shape[-1] ** -0.5))
            up, gate = layer.up(layer.norm(hidden)).chunk(2, dim=-1)
            hidden = hidden + layer.down(layer.activation(up) * gate)
        return self._last_norm(hidden)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (T, heads, head_dim), in float32 as transformers does it."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
