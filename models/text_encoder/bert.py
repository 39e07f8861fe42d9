"""BERT, RoBERTa, XLM-R, DistilBERT and MPNet over a packed row.

transformers' modules are the reference: embeddings of words, positions and (the first) type are summed and normed; each layer has
attention, then two matrices around an activation, each added to its input and normed after that. The types differ in names and in
where positions are counted from, and MPNet adds a bias to the scores of attention, by the distance of two tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from models.packed.attention import AttentionKernel, Send
from models.packed.masks import masked
from models.packed.token_row import TokenRow
from models.text_encoder.positions import after_padding, padding_id


@dataclass(frozen=True, slots=True)
class LayerNames:
    """The paths of the layers in transformers' module, and of a layer's parts within it."""

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


_BERT = LayerNames(
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
_MPNET = LayerNames(
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
_DISTILBERT = LayerNames(
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
_NAMES = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "mpnet": _MPNET, "distilbert": _DISTILBERT}

# Rows or columns, whichever are fewer, from which on a matrix stays as it lies. Measured with MKL on a CPU with AVX-512: in
# models of 384 and 768 components products with the 62 rows of one text took 23 and 16 % less time; in wider ones sometimes less
# and sometimes more.
WIDE = 1024


def by_input(weight: torch.Tensor) -> torch.Tensor:
    """Returns the same matrix, (out, in). In a narrow one on a CPU the weights of one input component lie side by side in
    memory."""
    narrow = weight.device.type == "cpu" and weight.dtype is torch.float32 and min(weight.shape) < WIDE
    return weight.t().contiguous().t() if narrow else weight


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix, (out, in), and its bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def from_modules(cls, *modules: Any) -> Linear:
        """Joins the weights of torch's Linears that read the same input."""
        biases = [module.bias for module in modules]
        joined = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        return cls(by_input(torch.cat([module.weight.data for module in modules])), joined)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """The weights of a layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float

    @classmethod
    def from_module(cls, module: Any) -> Norm:
        """Takes the weights of torch's LayerNorm."""
        return cls(module.weight.data, None if module.bias is None else module.bias.data, module.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)


@dataclass(frozen=True, slots=True)
class BertLayer:
    """The weights of one layer, queries, keys and values joined."""

    qkv: Linear
    out: Linear
    attention_norm: Norm
    up: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Linear
    norm: Norm

    @classmethod
    def from_module(cls, module: Any, names: LayerNames) -> BertLayer:
        """Takes the weights of transformers' layer."""
        part = module.get_submodule
        return cls(
            qkv=Linear.from_modules(part(names.query), part(names.key), part(names.value)),
            out=Linear.from_modules(part(names.out)),
            attention_norm=Norm.from_module(part(names.attention_norm)),
            up=Linear.from_modules(part(names.up)),
            # Some activations have weights, which are each layer's own.
            activation=part(names.activation),
            down=Linear.from_modules(part(names.down)),
            norm=Norm.from_module(part(names.norm)),
        )


class BertEncoder:
    """The weights of a model, as transformers loads it, and its forward over a packed row."""

    def __init__(self, model: Any, kernel: AttentionKernel) -> None:
        config, embeddings = model.config, model.embeddings
        names = _NAMES[config.model_type]
        self._kernel = kernel
        self._words = embeddings.word_embeddings.weight.data
        self._padding = padding_id(config)
        places = embeddings.position_embeddings.weight.data
        types = getattr(embeddings, "token_type_embeddings", None)
        # All tokens of a text are of the first type.
        self._places = places if types is None else places + types.weight.data[0]
        self._norm = Norm.from_module(embeddings.LayerNorm)
        self._layers = [BertLayer.from_module(layer, names) for layer in model.get_submodule(names.layers)]
        self._heads: int = config.num_attention_heads
        self._bias = DistanceBias(model.encoder) if config.model_type == "mpnet" else None

    def __call__(self, row: TokenRow, send: Send) -> torch.Tensor:
        """Returns the last hidden state of every token: (T, width)."""
        lengths, positions = row.lengths, row.positions[0]
        attend = masked(lengths.tolist(), self._bias) if self._bias else self._kernel.bidirectional(lengths.tolist(), send)
        if self._padding is not None:
            positions = after_padding(row.token_ids, positions, lengths, self._padding)
        hidden = self._norm(F.embedding(send(row.token_ids), self._words) + F.embedding(send(positions), self._places))
        for layer in self._layers:
            q, k, v = layer.qkv(hidden).view(len(hidden), 3, self._heads, -1).unbind(1)
            attended = attend(q, k, v, q.shape[-1] ** -0.5)
            hidden = layer.attention_norm(layer.out(attended).add_(hidden))
            hidden = layer.norm(layer.down(layer.activation(layer.up(hidden))).add_(hidden))
        return hidden


class DistanceBias:
    """MPNet's bias on the scores of attention. It is the same in every layer, and that of a short sequence is a corner of that of
    a longer one."""

    def __init__(self, encoder: Any) -> None:
        self._compute = encoder.compute_position_bias
        self._table = encoder.relative_attention_bias.weight.data
        self._bias = self._table.new_empty(0, 0, 0)

    def __call__(self, length: int) -> torch.Tensor:
        """Returns the bias of a sequence: (heads, length, length)."""
        if self._bias.shape[-1] < length:
            self._bias = self._compute(self._table.new_empty(1, length, 0))[0]
        bias: torch.Tensor = self._bias[:, :length, :length]
        return bias
