"""The forward pass: a batch, sorted by length, as rows of tokens; their hidden states, pooled; a vector for each input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedInput
from models.packed.attention import Send
from models.packed.staging import Staging
from models.text_encoder.modules import Heads
from models.text_encoder.pooling import Pooling
from models.text_encoder.row import Row

# On a CPU a row of more tokens leaves its caches: a few percent slower at 4096 on the machine where it was measured.
ROW_TOKENS = 1024


class TokenStates(Protocol):
    """A transformer: the last hidden states of every token of a row, (T, width)."""

    def __call__(self, row: Row, send: Send) -> torch.Tensor: ...


class EncoderForward:
    """Vectors by a transformer, a pooling and what comes after it. A row has at most `row_sequences` sequences, 0 for any."""

    def __init__(self, states: TokenStates, pooling: Pooling, heads: Heads, staging: Staging, row_sequences: int = 0) -> None:
        self._states = states
        self._pooling = pooling
        self._heads = heads
        self._staging = staging
        self._row_sequences = row_sequences

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Unit vectors, float32 of shape (len(batch), width): row i is of batch[i]."""
        self._staging.begin()
        send = self._staging.send
        order = sorted(range(len(batch)), key=lambda index: batch[index].num_tokens)
        vectors: list[torch.Tensor] = []
        for indices in self._slices(order, batch):
            row = Row.lay_out([batch[index].token_ids for index in indices], send)
            unpooled = np.array([batch[index].unpooled_tokens for index in indices])
            vectors.append(self._heads(self._pooling(self._states(row, send), row.lengths, unpooled, send)))
        found = self._staging.fetch(torch.cat(vectors))
        rows = np.empty_like(found)
        rows[order] = found
        return rows

    def _slices(self, order: Sequence[int], batch: Sequence[PreparedInput]) -> Iterator[list[int]]:
        """Indices, sorted by length, cut into those of one row."""
        most_tokens = ROW_TOKENS if self._staging.device.type == "cpu" else None
        taken: list[int] = []
        tokens = 0
        for index in order:
            count = batch[index].num_tokens
            full = len(taken) == self._row_sequences or (most_tokens is not None and tokens + count > most_tokens)
            if taken and full:
                yield taken
                taken, tokens = [], 0
            taken.append(index)
            tokens += count
        yield taken
