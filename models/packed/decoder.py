"""Qwen3's decoder over a checkpoint's own weights, for tokens packed into one row: the text model of Qwen3-VL too.

transformers' Qwen3Model is the reference: RMSNorm before attention and MLP, normed queries and keys under RoPE, grouped causal
attention, SwiGLU; and Qwen3VLTextModel, which adds deepstack features to the image rows after the first layers. The last layer
computes queries, output and MLP for the pooled rows alone. A layer's work before attention and its work after are functions of
tensors alone, so that each is compiled once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from models.base import ModelLoadError
from models.packed.attention import CausalAttention, Heads, PrefixKeys
from models.packed.rotary import Rotation, per_token, rotate


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of a decoder layer, matrices as (out, in): queries, keys and values are joined, and so are gate and up."""

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
    def from_module(cls, module: Any) -> DecoderLayer:
        """Takes the weights of a Qwen3DecoderLayer, which loses the matrices that are joined."""
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
class Sizes:
    """Sizes that a layer's weights do not tell. `heads` counts the heads of queries, of keys and of values."""

    heads: tuple[int, int, int]
    head_dim: int
    epsilon: float

    @property
    def attention_heads(self) -> Heads:
        queries, keys, _ = self.heads
        return Heads(queries, keys, self.head_dim)


@dataclass(frozen=True, slots=True)
class ImageRows:
    """The places of image tokens in a row, int64 (image tokens,), and the deepstack features that each of the first layers adds
    there, (image tokens, width)."""

    rows: torch.Tensor
    deepstack: Sequence[torch.Tensor]


def project(
    hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: DecoderLayer, sizes: Sizes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Does a layer's work before attention: returns queries and keys, both normed and rotated, and values, each
    (T, heads, head_dim)."""
    normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, sizes.epsilon)
    qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(hidden.shape[0], -1, sizes.head_dim)
    q, k, v = torch.split(qkv, list(sizes.heads), dim=1)
    q = F.rms_norm(q, q.shape[-1:], layer.q_norm, sizes.epsilon)
    k = F.rms_norm(k, k.shape[-1:], layer.k_norm, sizes.epsilon)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def finish(hidden: torch.Tensor, attended: torch.Tensor, layer: DecoderLayer, sizes: Sizes) -> torch.Tensor:
    """Does a layer's work after attention: output projection and MLP, each added to its input."""
    hidden = hidden + F.linear(attended, layer.out, layer.out_bias)
    normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, sizes.epsilon)
    gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
    return hidden + F.linear(F.silu(gate) * up, layer.down)


@dataclass(frozen=True, slots=True)
class DecoderSteps:
    """The functions that run a layer: as they are written, or compiled."""

    project: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = project
    finish: Callable[..., torch.Tensor] = finish


def is_causal(config: Any) -> bool:
    """Tells whether, by a model's config, every layer attends to all tokens before and to none after: what a Decoder computes."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    causal = getattr(config, "is_causal", True) is not False and not getattr(config, "use_bidirectional_attention", False)
    return causal and layers == {"full_attention"}


class Decoder:
    """Embedding, layers and final norm of a Qwen3Model, as transformers loads it. The module's weights are taken over: it cannot
    be run by itself any more."""

    def __init__(self, model: Any) -> None:
        """Raises ModelLoadError for another activation than silu."""
        config = model.config
        if config.hidden_act != "silu":
            raise ModelLoadError(
                f"the packed forward knows the activation silu, not {config.hidden_act!r}; set BACKEND=reference"
            )
        self._embed = model.embed_tokens.weight.data
        self._rotary = model.rotary_emb
        self._norm = model.norm.weight.data
        self.layers = [DecoderLayer.from_module(layer) for layer in model.layers]
        self.sizes = Sizes(
            heads=(config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            epsilon=config.rms_norm_eps,
        )
        self.vocabulary = len(self._embed)
        self.scale = self.sizes.head_dim**-0.5
        self.steps = DecoderSteps()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeds token ids, int64 (T,), as (T, width)."""
        return F.embedding(token_ids, self._embed)

    def rotation(self, hidden: torch.Tensor, positions: torch.Tensor) -> Rotation:
        """Returns cosine and sine by the checkpoint's own rotary module, in the dtype of `hidden`. Of positions int64 (3, T) the
        first row counts: a text's rows are equal."""
        return per_token(*self._rotary(hidden, positions[:1]))

    def run(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        attention: CausalAttention,
        last_rows: torch.Tensor,
        prefixes: Sequence[Sequence[PrefixKeys]] = (),
        images: ImageRows | None = None,
    ) -> torch.Tensor:
        """Runs all layers over embedded tokens, (T, width), and returns the normed hidden states of the tokens at `last_rows`,
        int64 (sequences,): (sequences, width).

        `prefixes[i]` has the keys and values of prefix i in every layer.
        """
        cos, sin = self.rotation(hidden, positions)
        final = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            keys = [prefix[index] for prefix in prefixes]
            q, k, v = self.steps.project(hidden, cos, sin, layer, self.sizes)
            if index == final:
                attended = attention.last_tokens(q[last_rows], k, v, keys, self.scale)
                hidden = self.steps.finish(hidden[last_rows], attended, layer, self.sizes)
            else:
                attended = attention.all_tokens(q, k, v, keys, self.scale)
                hidden = self.steps.finish(hidden, attended, layer, self.sizes)
                if images is not None and index < len(images.deepstack):
                    hidden.index_add_(0, images.rows, images.deepstack[index].to(hidden.dtype))
        # No deepstack after the final layer: the last token is the template's, never an image's.
        return F.rms_norm(hidden, hidden.shape[-1:], self._norm, self.sizes.epsilon)

    def keys(self, hidden: torch.Tensor, positions: torch.Tensor, attention: CausalAttention) -> list[PrefixKeys]:
        """Returns every layer's keys and values of a prefix, embedded as (T, width): causality makes them the same in every input
        that begins with it."""
        cos, sin = self.rotation(hidden, positions)
        found: list[PrefixKeys] = []
        for layer in self.layers:
            q, k, v = self.steps.project(hidden, cos, sin, layer, self.sizes)
            found.append((k.clone(), v.clone()))
            hidden = self.steps.finish(hidden, attention.all_tokens(q, k, v, (), self.scale), layer, self.sizes)
        return found


def _join(module: Any, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Joins matrices, and biases, that read the same input. The module loses its own at once, so that no layer is in memory
    twice."""
    linears = [getattr(module, name) for name in names]
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.data for linear in linears])
    for name in names:
        setattr(module, name, None)
    return weight, bias
