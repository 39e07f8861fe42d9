"""Attention over sequences packed into one row, none of which sees another.

Queries, keys and values come as (T, heads, head_dim), sequences one after the other. A sequence may stand on a prefix: keys and
values computed before, of tokens that come before its own. A kernel plans a batch once for all layers. SdpaKernel runs on any
device: sequences of similar length are padded into groups, for the attention alone, and each group is one call of torch's scaled
product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from models.packed.masks import BidirectionalAttention, Window, masked, no_mask

# Sequences share a group up to this ratio of lengths, or this difference in tokens: a call costs more than the attention to some
# padding.
GROUP_RATIO = 1.25
GROUP_SLACK = 8


class Span(NamedTuple):
    """One sequence of a packed row: the number of its own tokens, the index of the prefix that it stands on (-1: none), and the
    number of that prefix's tokens that it stands on."""

    length: int
    prefix: int = -1
    prefix_length: int = 0


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads: how many of queries, how many of keys and values (each serves several of queries), and their dimension."""

    queries: int
    keys: int
    size: int


# Keys and values of a prefix in one layer: each (tokens, key-value heads, head_dim).
PrefixKeys = tuple[torch.Tensor, torch.Tensor]
# Puts an array on the device.
Send = Callable[[npt.NDArray[Any]], torch.Tensor]


class CausalAttention(Protocol):
    """Attention of a planned batch, whose tokens see themselves and what is before them. `prefixes[i]` is the layer's share of
    prefix i, as spans count them; the product of queries and keys is multiplied by `scale`."""

    def all_tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        """Returns the attention of every token: (T, query heads * head_dim)."""

    def last_tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        """Returns the attention of each sequence's last token, whose queries are `q`, (sequences, heads, head_dim): (sequences,
        heads * head_dim)."""


class AttentionKernel(Protocol):
    """A way to compute attention on a device. Each method plans a batch."""

    def causal(self, spans: Sequence[Span], send: Send) -> CausalAttention:
        """Tokens see themselves and what is before them. Spans on no prefix come first, those on one prefix side by side."""

    def bidirectional(self, lengths: Sequence[int], send: Send) -> BidirectionalAttention:
        """Tokens see all of their sequence, as the patches of an image do."""

    def local(self, lengths: Sequence[int], window: Window, send: Send) -> BidirectionalAttention:
        """Tokens see those of their sequence that are within the window."""


class SdpaKernel:
    """Attention by torch's scaled dot product, on any device and in any dtype."""

    def causal(self, spans: Sequence[Span], send: Send) -> CausalAttention:
        return GroupedAttention(spans, send)

    def bidirectional(self, lengths: Sequence[int], send: Send) -> BidirectionalAttention:
        return masked(lengths, no_mask)

    def local(self, lengths: Sequence[int], window: Window, send: Send) -> BidirectionalAttention:
        return masked(lengths, window)


class GroupedAttention:
    """CausalAttention by scaled dot product: one call for each run of neighbouring spans of one prefix and similar length."""

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

    def all_tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        parts = [group.all_tokens(q, k, v, prefixes, scale) for group in self._groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def last_tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        parts, start = [], 0
        for group in self._groups:
            parts.append(group.last_tokens(q[start : start + group.count], k, v, prefixes, scale))
            start += group.count
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Group:
    """Sequences of similar length on one prefix, which begin at place `row` of the packed row."""

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

    def all_tokens(
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

    def last_tokens(
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
        """Pads (T, heads, head_dim) to (sequences, heads, longest, head_dim)."""
        rows = x[self._rows] if self._gather is None else x.index_select(0, self._gather)
        return rows.view(self.count, self._longest, *x.shape[1:]).transpose(1, 2)

    def _with_prefix(self, x: torch.Tensor, prefixes: Sequence[PrefixKeys], part: int) -> torch.Tensor:
        """Puts the prefix's keys (`part` 0) or values (1) before those of every sequence."""
        if not self._prefix_length:
            return x
        prefix = prefixes[self._prefix][part][: self._prefix_length].transpose(0, 1)
        return torch.cat([prefix.unsqueeze(0).expand(self.count, -1, -1, -1), x], dim=2)


def _alike(first: Span, other: Span) -> bool:
    """Tells whether two sequences may share a group."""
    same_prefix = (first.prefix, first.prefix_length) == (other.prefix, other.prefix_length)
    shorter, longer = sorted((first.length, other.length))
    return same_prefix and (longer <= shorter * GROUP_RATIO or longer - shorter <= GROUP_SLACK)
