"""The forward of an encoder of texts: a batch, sorted by length, becomes rows of tokens; a transformer computes their hidden
states, and pooling and the modules after it make a vector of each input's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedInput
from models.grouping import group_by_tokens
from models.packed.attention import Send
from models.packed.staging import Staging
from models.packed.token_row import TokenRow
from models.text_encoder.modules import PostPooling
from models.text_encoder.pooling import Pooling

# Tokens of a row on a CPU: more do not fit into its caches, which made 4096 a few percent slower where it was measured.
ROW_TOKENS = 1024


class TokenStates(Protocol):
    """A transformer: returns the last hidden state of every token of a row, (T, width)."""

    def __call__(self, row: TokenRow, send: Send) -> torch.Tensor: ...


class EncoderForward:
    """Computes vectors by a transformer, a pooling and the modules after it. A row has at most `row_sequences` sequences; 0 is no
    limit."""

    def __init__(
        self, states: TokenStates, pooling: Pooling, post_pooling: PostPooling, staging: Staging, row_sequences: int = 0
    ) -> None:
        self._states = states
        self._pooling = pooling
        self._post_pooling = post_pooling
        self._staging = staging
        self._row_sequences = row_sequences

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Returns unit vectors, float32 (len(batch), width): row i is of batch[i]."""
        self._staging.begin()
        send = self._staging.send
        lengths = [item.num_tokens for item in batch]
        by_length = sorted(range(len(batch)), key=lengths.__getitem__)
        max_tokens = ROW_TOKENS if self._staging.device.type == "cpu" else 0
        vectors: list[torch.Tensor] = []
        order: list[int] = []
        for group in group_by_tokens(by_length, lengths, max_size=self._row_sequences, max_tokens=max_tokens):
            row = TokenRow.lay_out([batch[index] for index in group])
            indices = [group[place] for place in row.order]
            unpooled = np.array([batch[index].unpooled_tokens for index in indices])
            vectors.append(self._post_pooling(self._pooling(self._states(row, send), row.lengths, unpooled, send)))
            order += indices
        found = self._staging.fetch(torch.cat(vectors))
        rows = np.empty_like(found)
        rows[order] = found
        return rows
