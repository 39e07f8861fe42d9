"""Row: sequences one after the other in one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from models.packed.attention import Send


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
