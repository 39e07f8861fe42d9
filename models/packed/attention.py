"""Attention over sequences packed into one row, none of which sees another.

Queries, keys and values come as (T, heads, head_dim), sequences one after the other. Each may stand on a prefix: keys and values
computed before, of tokens that come before its own. A kernel plans a batch once for all layers. SdpaKernel runs on any device:
sequences of like length are padded into groups, for the attention alone, and each group is one call of torch's scaled product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from models.packed.masks import Window, everything, masked

# Sequences share a group up to this ratio of lengths, or a difference of so many tokens: the cost of attention is small beside
# that of a call.
GROUP_RATIO = 1.25
GROUP_SLACK = 8


class Span(NamedTuple):
    """One sequence of a packed row: its own tokens, and how many of which prefix it stands on (index -1: none)."""

    length: int
    prefix: int = -1
    prefix_length: int = 0


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of queries, those of keys and values, which each serve several of queries, and their dimension."""

    queries: int
    keys: int
    size: int


# Keys and values of a prefix in one layer: each (tokens, key-value heads, head_dim).
PrefixKeys = tuple[torch.Tensor, torch.Tensor]
# Puts an array on the device.
Send = Callable[[npt.NDArray[Any]], torch.Tensor]
# Queries, keys, values and the scale, of sequences that see all of themselves: (T, heads * head_dim).
WholeAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class CausalAttention(Protocol):
    """A batch, planned. `prefixes` are the layer's, by the spans' index; `scale` is what queries times keys is multiplied by."""

    def every(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        """Attention of every token: (T, query heads * head_dim)."""

    def last(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        """Attention of each sequence's last token alone, `q` (sequences, heads, head_dim): (sequences, heads * head_dim)."""


class AttentionKernel(Protocol):
    """A way to compute attention on a device."""

    def causal(self, spans: Sequence[Span], send: Send) -> CausalAttention:
        """Tokens see themselves and what is before them. Spans on no prefix come first, those on one prefix side by side."""

    def whole(self, lengths: Sequence[int], send: Send) -> WholeAttention:
        """Tokens see their whole sequence, as the patches of an image do."""

    def local(self, lengths: Sequence[int], window: Window, send: Send) -> WholeAttention:
        """Tokens see what of their sequence is near."""


class SdpaKernel:
    """torch's scaled dot product, on any device and in any dtype."""

    def causal(self, spans: Sequence[Span], send: Send) -> CausalAttention:
        return GroupedAttention(spans, send)

    def whole(self, lengths: Sequence[int], send: Send) -> WholeAttention:
        return masked(lengths, everything)

    def local(self, lengths: Sequence[int], window: Window, send: Send) -> WholeAttention:
        return masked(lengths, window)


class GroupedAttention:
    """CausalAttention by scaled dot product. Spans that may share a group should lie side by side."""

    def __init__(self, spans: Sequence[Span], send: Send) -> None:
        self._groups: list[_Group] = []
        start = 0
        row = 0
        while start < len(spans):
            end = start + 1
            while end < len(spans) and _alike(spans[start], spans[end]):
                end += 1
            self._groups.append(_Group(spans[start:end], row, send))
            row += sum(span.length for span in spans[start:end])
            start = end

    def every(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        parts = [group.every(q, k, v, prefixes, scale) for group in self._groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def last(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        parts, start = [], 0
        for group in self._groups:
            parts.append(group.last(q[start : start + group.count], k, v, prefixes, scale))
            start += group.count
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Group:
    """Sequences of like length on one prefix, from `row` of the packed row on."""

    def __init__(self, spans: Sequence[Span], row: int, send: Send) -> None:
        lengths = np.array([span.length for span in spans])
        self.count = len(spans)
        self._longest = int(lengths.max())
        self._rows = slice(row, row + int(lengths.sum()))
        self._prefix = spans[0].prefix
        self._prefix_length = spans[0].prefix_length
        self._gather: torch.Tensor | None = None
        self._scatter: torch.Tensor | None = None
        self._last_mask: torch.Tensor | None = None
        if lengths.min() < self._longest:
            # A padded place reads its sequence's last token again: causality hides it from every real one.
            starts = row + np.cumsum(lengths) - lengths
            places = np.arange(self._longest)
            self._gather = send((starts[:, None] + np.minimum(places, lengths[:, None] - 1)).reshape(-1))
            real = places < lengths[:, None]
            self._scatter = send(np.flatnonzero(real))
            seen = np.concatenate([np.ones((self.count, self._prefix_length), dtype=bool), real], axis=1)
            self._last_mask = send(seen[:, None, None, :])
        self._mask: torch.Tensor | None = None
        if self._prefix_length:
            self._mask = send(np.tri(self._longest, self._prefix_length + self._longest, self._prefix_length, dtype=bool))

    def every(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            self._padded(q),
            self._with_prefix(self._padded(k), prefixes, 0),
            self._with_prefix(self._padded(v), prefixes, 1),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            scale=scale,
            enable_gqa=True,
        )
        flat = out.transpose(1, 2).reshape(self.count * self._longest, -1)
        return flat if self._scatter is None else flat.index_select(0, self._scatter)

    def last(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2),
            self._with_prefix(self._padded(k), prefixes, 0),
            self._with_prefix(self._padded(v), prefixes, 1),
            attn_mask=self._last_mask,
            scale=scale,
            enable_gqa=True,
        )
        return out.reshape(self.count, -1)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """(T, heads, head_dim) -> (sequences, heads, longest, head_dim)."""
        rows = x[self._rows] if self._gather is None else x.index_select(0, self._gather)
        return rows.view(self.count, self._longest, *x.shape[1:]).transpose(1, 2)

    def _with_prefix(self, x: torch.Tensor, prefixes: Sequence[PrefixKeys], part: int) -> torch.Tensor:
        if not self._prefix_length:
            return x
        prefix = prefixes[self._prefix][part][: self._prefix_length].transpose(0, 1)
        return torch.cat([prefix.unsqueeze(0).expand(self.count, -1, -1, -1), x], dim=2)


def _alike(first: Span, other: Span) -> bool:
    same_prefix = (first.prefix, first.prefix_length) == (other.prefix, other.prefix_length)
    shorter, longer = sorted((first.length, other.length))
    return same_prefix and (longer <= shorter * GROUP_RATIO or longer - shorter <= GROUP_SLACK)
