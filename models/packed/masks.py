"""Attention within sequences under a mask, which says by a sequence's length which tokens see which, or what is added to the
scores of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

# Makes the mask of a sequence of so many tokens, that of torch's scaled product: bool for what counts, or a bias on the scores;
# broadcast to (heads, length, length).
Mask = Callable[[int], torch.Tensor | None]
# Attention of a planned batch, whose tokens may see those after them: takes queries, keys, values and the scale, each
# (T, heads, head_dim), and returns (T, heads * head_dim).
BidirectionalAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def masked(lengths: Sequence[int], mask: Mask) -> BidirectionalAttention:
    """Plans attention within each sequence under the mask of its length, by torch's scaled product on any device and in any
    dtype: one call for those of one length that lie side by side."""
    runs = [(length, len(list(run)), mask(length)) for length, run in groupby(lengths)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        parts, start = [], 0
        for length, count, added in runs:
            rows, start = slice(start, start + length * count), start + length * count
            folded = [x[rows].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
            out = F.scaled_dot_product_attention(folded[0], folded[1], folded[2], attn_mask=added, scale=scale)
            parts.append(out.transpose(1, 2).reshape(count * length, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return attend


def no_mask(length: int) -> None:
    """Returns the mask under which all tokens see all."""


class Window:
    """The mask under which tokens see each other that are at most `reach` apart."""

    def __init__(self, reach: int, device: torch.device) -> None:
        self.reach = reach
        self._seen = torch.ones(1, 1, dtype=torch.bool, device=device)

    def __call__(self, length: int) -> torch.Tensor | None:
        """Returns bool (length, length), None if the sequence is so short that all tokens see all."""
        if length <= self.reach + 1:
            return None
        if len(self._seen) < length:
            places = torch.arange(length, device=self._seen.device)
            self._seen = (places[:, None] - places).abs() <= self.reach
        return self._seen[:length, :length]
