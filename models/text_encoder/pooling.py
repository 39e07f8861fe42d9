"""Pooling: makes one row for each sequence of the hidden states of its tokens, as the module of that name in
sentence-transformers does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from models.packed.attention import Send


class Pooling:
    """A pooling by one or more of the library's `modes`, whose rows are joined in their order."""

    def __init__(self, modes: Sequence[str]) -> None:
        self.modes = tuple(modes)

    def __call__(
        self, hidden: torch.Tensor, lengths: npt.NDArray[np.int64], unpooled: npt.NDArray[np.int64], send: Send
    ) -> torch.Tensor:
        """Pools (T, width), sequences one after the other, to float32 (sequences, modes * width). The first `unpooled[i]` tokens
        of sequence i, fewer than it has, do not count."""
        ends = np.cumsum(lengths)
        firsts = ends - lengths + unpooled
        counts = send(lengths - unpooled)
        if {"cls", "lasttoken"}.issuperset(self.modes):
            tokens = hidden
        elif unpooled.any():
            tokens = hidden[
                send(np.concatenate([np.arange(first, end) for first, end in zip(firsts, ends, strict=True)]))
            ].float()
        else:
            tokens = hidden.float()
        rows: list[torch.Tensor] = []
        for mode in self.modes:
            if mode == "cls":
                rows.append(hidden[send(firsts)].float())
            elif mode == "lasttoken":
                rows.append(hidden[send(ends - 1)].float())
            elif mode == "max":
                rows.append(torch.segment_reduce(tokens, "max", lengths=counts))
            elif mode == "weightedmean":
                # A token's weight is its place in the sequence, counted from 1.
                places = np.concatenate([np.arange(a, b) for a, b in zip(unpooled, lengths, strict=True)])
                weights = send((places + 1).astype(np.float32)).unsqueeze(1)
                rows.append(_sum(tokens * weights, counts) / _sum(weights, counts))
            else:
                divisor = counts.float() if mode == "mean" else counts.float().sqrt()
                rows.append(_sum(tokens, counts) / divisor.unsqueeze(1))
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _sum(tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Adds up runs of `counts` rows."""
    return torch.segment_reduce(tokens, "sum", lengths=counts)
