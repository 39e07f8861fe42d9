"""Hidden states by transformers' own modules, sequences padded on the right.

Slower than a forward of ours and simpler: the oracle of the others, and the way for what they do not know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.packed.attention import Send
from models.text_encoder.row import Row

# As sentence-transformers batches.
ROW_SEQUENCES = 32


class PaddedStates:
    """A model as transformers loads it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._padding: int = model.config.pad_token_id or 0

    def __call__(self, row: Row, send: Send) -> torch.Tensor:
        """The last hidden states of every token: (T, width)."""
        real = send(np.arange(row.lengths.max()) < row.lengths[:, None])
        ids = torch.full(real.shape, self._padding, dtype=torch.int64, device=real.device)
        ids[real] = row.token_ids
        hidden: torch.Tensor = self._model(input_ids=ids, attention_mask=real.long()).last_hidden_state
        return hidden[real]
