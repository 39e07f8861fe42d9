"""The packed forward: all sequences of a batch in one row of T tokens, nothing padded but inside attention.

The text model of Qwen3-VL over the checkpoint's own weights (transformers' Qwen3VLTextModel is the reference): RMSNorm before
attention and MLP, normed queries and keys under interleaved M-RoPE, grouped causal attention, SwiGLU, deepstack features added
to the image rows after the first layers. Three savings, all exact: the keys and values of an instruction's prefix are computed
once; in the last layer queries, output and MLP are computed for the pooled rows alone; and a row is never a place of padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from models.base import ModelLoadError, PreparedImage, PreparedInput
from models.qwen3_vl.attention import GroupedAttention, PrefixKeys, Span
from models.qwen3_vl.prefix_cache import Prefix, PrefixCache
from models.qwen3_vl.tower import VisionTower
from models.qwen3_vl.vision import VisionSpec


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of a decoder layer, matrices as (out, in): queries, keys and values in one, gate and up in one."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def take(cls, module: Any) -> Layer:
        """From a Qwen3VLTextDecoderLayer, whose own matrices are given up as they are joined."""
        attention, mlp = module.self_attn, module.mlp
        qkv, qkv_bias = _join(attention, "q_proj", "k_proj", "v_proj")
        gate_up, _ = _join(mlp, "gate_proj", "up_proj")
        return cls(
            input_norm=module.input_layernorm.weight.data,
            qkv=qkv,
            qkv_bias=qkv_bias,
            q_norm=attention.q_norm.weight.data,
            k_norm=attention.k_norm.weight.data,
            out=attention.o_proj.weight.data,
            out_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.data,
            mlp_norm=module.post_attention_layernorm.weight.data,
            gate_up=gate_up,
            down=mlp.down_proj.weight.data,
        )


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A batch in one row of T tokens, less what prefixes stand for: `token_ids` int64 (T,), `positions` int64 (3, T).

    `order` has the batch's index of each span: side by side is what attention groups, sequences of one prefix by length.
    """

    order: list[int]
    spans: list[Span]
    prefixes: list[Prefix]
    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    images: list[PreparedImage]

    @classmethod
    def lay_out(cls, batch: Sequence[PreparedInput], prefixes: Sequence[Prefix | None]) -> PackedRow:
        """`prefixes[i]` is what batch[i] begins with, None where it is computed with the rest."""
        used = list({prefix.key: prefix for prefix in prefixes if prefix}.values())
        places = {prefix.key: place for place, prefix in enumerate(used)}
        place_of = [places[prefix.key] if prefix else -1 for prefix in prefixes]
        skips = [prefix.length if prefix else 0 for prefix in prefixes]
        order = sorted(range(len(batch)), key=lambda i: (place_of[i], batch[i].num_tokens))
        return cls(
            order=order,
            spans=[Span(batch[i].num_tokens - skips[i], place_of[i], skips[i]) for i in order],
            prefixes=used,
            token_ids=np.concatenate([batch[i].token_ids[skips[i] :] for i in order]),
            positions=np.concatenate([_positions(batch[i])[:, skips[i] :] for i in order], axis=1),
            images=[image for i in order for image in batch[i].images],
        )


class PackedForward:
    """Hidden states of the last tokens, by a Qwen3VLModel as transformers loads it: taken over, and of no other use."""

    def __init__(self, model: Any, spec: VisionSpec) -> None:
        config, text = model.config.text_config, model.language_model
        if config.hidden_act != "silu":
            raise ModelLoadError(
                f"the packed forward knows the activation silu, not {config.hidden_act!r}; set BACKEND=reference"
            )
        self._see = VisionTower(model.visual, spec)
        self._device = model.device
        self._image_token_id: int = model.config.image_token_id
        self._embed = text.embed_tokens.weight.data
        self._rotary = text.rotary_emb
        self._layers = [Layer.take(layer) for layer in text.layers]
        self._norm = text.norm.weight.data
        self._epsilon: float = config.rms_norm_eps
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self._scale = self._head_dim**-0.5
        self.prefixes = PrefixCache(self._compute_prefix)

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedInput]) -> torch.Tensor:
        """Final hidden states, normed, of shape (len(batch), width) in the model's dtype: row i is of batch[i]'s last token."""
        row = PackedRow.lay_out(batch, self.prefixes.for_batch(batch))
        hidden = F.embedding(torch.from_numpy(row.token_ids).to(self._device), self._embed)
        deepstack: list[torch.Tensor] = []
        image_rows: torch.Tensor | None = None
        if row.images:
            image_rows = torch.from_numpy(np.flatnonzero(row.token_ids == self._image_token_id)).to(self._device)
            features, deepstack = self._see(row.images)
            hidden[image_rows] = features.to(hidden.dtype)
        last = self._run(hidden, row, image_rows, deepstack)
        rows = torch.empty_like(last)
        rows[torch.tensor(row.order, device=last.device)] = last
        return rows

    def _run(
        self, hidden: torch.Tensor, row: PackedRow, image_rows: torch.Tensor | None, deepstack: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """All layers; the normed hidden states of the last tokens, in the order of the row's spans."""
        rotation = self._rotation(hidden, row.positions)
        attention = GroupedAttention(row.spans, hidden.device)
        last_rows = torch.from_numpy(np.cumsum([span.length for span in row.spans]) - 1).to(hidden.device)
        final = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            keys = [prefix.layers[index] for prefix in row.prefixes]
            q, k, v = self._project(layer, hidden, rotation)
            if index == final:
                attended = attention.last(q[last_rows], k, v, keys, self._scale)
                hidden = self._finish_layer(layer, hidden[last_rows], attended)
            else:
                hidden = self._finish_layer(layer, hidden, attention.every(q, k, v, keys, self._scale))
                if image_rows is not None and index < len(deepstack):
                    hidden.index_add_(0, image_rows, deepstack[index].to(hidden.dtype))
        # No deepstack after the final layer: the last token is the template's, never an image's.
        return F.rms_norm(hidden, hidden.shape[-1:], self._norm, self._epsilon)

    def _compute_prefix(self, token_ids: npt.NDArray[np.int64]) -> list[PrefixKeys]:
        """Every layer's keys and values of a text that stands at the beginning: causality makes them the same in every input."""
        positions = np.broadcast_to(np.arange(len(token_ids)), (3, len(token_ids)))
        hidden = F.embedding(torch.from_numpy(token_ids).to(self._device), self._embed)
        rotation = self._rotation(hidden, positions)
        attention = GroupedAttention([Span(len(token_ids))], hidden.device)
        found: list[PrefixKeys] = []
        for layer in self._layers:
            q, k, v = self._project(layer, hidden, rotation)
            found.append((k.clone(), v.clone()))
            hidden = self._finish_layer(layer, hidden, attention.every(q, k, v, (), self._scale))
        return found

    def _rotation(self, hidden: torch.Tensor, positions: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every token's angles, (T, 1, head_dim), by the checkpoint's own rotary module."""
        cos, sin = self._rotary(hidden, torch.from_numpy(np.ascontiguousarray(positions)).to(self._device).unsqueeze(1))
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)

    def _project(
        self, layer: Layer, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys (both normed and rotated) and values, each (T, heads, head_dim)."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, self._epsilon)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(hidden), -1, self._head_dim)
        q, k, v = torch.split(qkv, self._heads, dim=1)
        q = F.rms_norm(q, q.shape[-1:], layer.q_norm, self._epsilon)
        k = F.rms_norm(k, k.shape[-1:], layer.k_norm, self._epsilon)
        return _rotate(q, rotation), _rotate(k, rotation), v

    def _finish_layer(self, layer: Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows attention: output projection and MLP, each added to what came in."""
        hidden = hidden + F.linear(attended, layer.out, layer.out_bias)
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self._epsilon)
        gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, layer.down)


def _positions(item: PreparedInput) -> npt.NDArray[np.int64]:
    """(3, num_tokens)."""
    if item.positions is not None:
        return item.positions
    return np.broadcast_to(np.arange(item.num_tokens), (3, item.num_tokens))


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of (T, heads, head_dim), halves paired as transformers pairs them."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _join(module: Any, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Matrices that read the same input, as one; each is given up at once, so that no layer is in memory twice."""
    linears = [getattr(module, name) for name in names]
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.data for linear in linears])
    for name in names:
        setattr(module, name, None)
    return weight, bias
