"""Row: sequences one after the other in one row of tokens, and attention that keeps them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from models.packed.attention import Send, WholeAttention

# What is added to the scores of a sequence of so many tokens, or which of them count: broadcast to (heads, length, length).
Mask = Callable[[int], torch.Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """`token_ids` and `positions`, each counted from 0 in its sequence: int64 (T,). Shorter sequences come first."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    lengths: npt.NDArray[np.int64]

    @classmethod
    def lay_out(cls, sequences: Sequence[npt.NDArray[np.int64]], send: Send) -> Row:
        lengths = np.array([len(ids) for ids in sequences])
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        return cls(send(np.concatenate(sequences)), send(positions), lengths)


def masked(lengths: npt.NDArray[np.int64], mask: Mask) -> WholeAttention:
    """Attention within each sequence under the mask of its length, by torch's scaled product: one call for those of one length
    that lie side by side. On any device, in any dtype."""
    runs = [(length, len(list(run)), mask(length)) for length, run in groupby(lengths.tolist())]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        parts, start = [], 0
        for length, count, added in runs:
            rows, start = slice(start, start + length * count), start + length * count
            folded = [x[rows].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
            out = F.scaled_dot_product_attention(folded[0], folded[1], folded[2], attn_mask=added, scale=scale)
            parts.append(out.transpose(1, 2).reshape(count * length, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return attend
