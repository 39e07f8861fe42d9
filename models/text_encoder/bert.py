"""BERT and its kin over a packed row: RoBERTa, XLM-R, DistilBERT, MPNet.

transformers' modules are the reference: embeddings of words, places and (the first) type, summed and normed; in each layer
attention, then two matrices around an activation, each added to what came in and normed after that. They differ in names, in
where places are counted from, and MPNet adds a bias to the scores by how far apart two tokens are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from models.packed.attention import AttentionKernel, Send
from models.packed.masks import masked
from models.text_encoder.row import Row


@dataclass(frozen=True, slots=True)
class Names:
    """Where the parts of a layer are, in transformers' modules."""

    layers: str
    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    up: str
    activation: str
    down: str
    norm: str


_BERT = Names(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    norm="output.LayerNorm",
)
_MPNET = Names(
    layers="encoder.layer",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    norm="output.LayerNorm",
)
_DISTILBERT = Names(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    norm="output_layer_norm",
)
NAMES = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "mpnet": _MPNET, "distilbert": _DISTILBERT}

# Of a matrix's narrower side. Measured with MKL on a CPU with AVX-512: in models of 384 and 768 components products with the 62
# rows of one text took 23 and 16 % less time; in wider ones sometimes less and sometimes more.
NARROW = 1024


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """The same matrix; a narrow one on a CPU so that in memory what one input is multiplied with lies side by side."""
    narrow = weight.device.type == "cpu" and weight.dtype is torch.float32 and min(weight.shape) < NARROW
    return weight.t().contiguous().t() if narrow else weight


@dataclass(frozen=True, slots=True)
class Linear:
    """`weight` as (out, in)."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def take(cls, *modules: Any) -> Linear:
        """From modules that read the same input, as one."""
        biases = [module.bias for module in modules]
        joined = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        return cls(laid_out(torch.cat([module.weight.data for module in modules])), joined)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float

    @classmethod
    def take(cls, module: Any) -> Norm:
        return cls(module.weight.data, None if module.bias is None else module.bias.data, module.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear
    out: Linear
    attention_norm: Norm
    up: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Linear
    norm: Norm

    @classmethod
    def take(cls, module: Any, names: Names) -> Layer:
        part = module.get_submodule
        return cls(
            qkv=Linear.take(part(names.query), part(names.key), part(names.value)),
            out=Linear.take(part(names.out)),
            attention_norm=Norm.take(part(names.attention_norm)),
            up=Linear.take(part(names.up)),
            # Some have weights of their own in every layer.
            activation=part(names.activation),
            down=Linear.take(part(names.down)),
            norm=Norm.take(part(names.norm)),
        )


class PostNormEncoder:
    """The weights of a model as transformers loads it, and its forward over a packed row."""

    def __init__(self, model: Any, kernel: AttentionKernel) -> None:
        config, embeddings = model.config, model.embeddings
        names = NAMES[config.model_type]
        self._kernel = kernel
        self._words = embeddings.word_embeddings.weight.data
        self._offset = position_offset(model)
        places = embeddings.position_embeddings.weight.data[self._offset :]
        types = getattr(embeddings, "token_type_embeddings", None)
        # A text is all of the first type.
        self._places = places if types is None else places + types.weight.data[0]
        self._norm = Norm.take(embeddings.LayerNorm)
        self._layers = [Layer.take(layer, names) for layer in model.get_submodule(names.layers)]
        self._heads: int = config.num_attention_heads
        self._distances = _Distances(model.encoder) if config.model_type == "mpnet" else None

    def __call__(self, row: Row, send: Send) -> torch.Tensor:
        """The last hidden states of every token: (T, width)."""
        if self._distances is None:
            attend = self._kernel.whole(row.lengths.tolist(), send)
        else:
            attend = masked(row.lengths.tolist(), self._distances)
        hidden = self._norm(F.embedding(row.token_ids, self._words) + F.embedding(row.positions, self._places))
        for layer in self._layers:
            q, k, v = layer.qkv(hidden).view(len(hidden), 3, self._heads, -1).unbind(1)
            attended = attend(q, k, v, q.shape[-1] ** -0.5)
            hidden = layer.attention_norm(layer.out(attended).add_(hidden))
            hidden = layer.norm(layer.down(layer.activation(layer.up(hidden))).add_(hidden))
        return hidden


class _Distances:
    """MPNet's bias: the same in every layer, and that of a short sequence is a corner of a longer one's."""

    def __init__(self, encoder: Any) -> None:
        self._compute = encoder.compute_position_bias
        self._table = encoder.relative_attention_bias.weight.data
        self._bias = self._table.new_empty(0, 0, 0)

    def __call__(self, length: int) -> torch.Tensor:
        """(heads, length, length)."""
        if self._bias.shape[-1] < length:
            self._bias = self._compute(self._table.new_empty(1, length, 0))[0]
        bias: torch.Tensor = self._bias[:, :length, :length]
        return bias


def position_offset(model: Any) -> int:
    """Where places are counted from: RoBERTa and MPNet begin after the padding token's."""
    padding = getattr(model.embeddings, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1
