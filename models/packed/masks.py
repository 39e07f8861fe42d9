"""Attention within sequences under a mask: which tokens see which, or what is added to their scores, by a sequence's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

# What is added to the scores of a sequence of so many tokens, or which of them count: broadcast to (heads, length, length).
Mask = Callable[[int], torch.Tensor | None]


def masked(lengths: Sequence[int], mask: Mask) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """Attention within each sequence under the mask of its length, by torch's scaled product: one call for those of one length
    that lie side by side. On any device, in any dtype."""
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


def everything(length: int) -> None:
    """No mask: all tokens see all."""


class Window:
    """Which tokens see which: those at most `reach` apart."""

    def __init__(self, reach: int, device: torch.device) -> None:
        self.reach = reach
        self._seen = torch.ones(1, 1, dtype=torch.bool, device=device)

    def __call__(self, length: int) -> torch.Tensor | None:
        """bool (length, length), None where all see all."""
        if length <= self.reach + 1:
            return None
        if len(self._seen) < length:
            places = torch.arange(length, device=self._seen.device)
            self._seen = (places[:, None] - places).abs() <= self.reach
        return self._seen[:length, :length]
