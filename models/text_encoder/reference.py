"""The reference of text models: transformers' own modules, over sequences padded on the right.

Slower than a packed forward and simpler: tests hold the packed ones to it, and checkpoints that those do not know are run by it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.packed.attention import Send
from models.packed.token_row import TokenRow

# Sequences of a row, as sentence-transformers batches them.
ROW_SEQUENCES = 32


class PaddedStates:
    """The hidden states of a model, as transformers loads it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._padding: int = model.config.pad_token_id or 0

    def __call__(self, row: TokenRow, send: Send) -> torch.Tensor:
        """Returns the last hidden state of every token: (T, width)."""
        real = send(np.arange(row.lengths.max()) < row.lengths[:, None])
        ids = torch.full(real.shape, self._padding, dtype=torch.int64, device=real.device)
        ids[real] = send(row.token_ids)
        hidden: torch.Tensor = self._model(input_ids=ids, attention_mask=real.long()).last_hidden_state
        return hidden[real]
