"""PackedRow: a batch as one row of tokens, laid out in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.base import PreparedImage, PreparedInput
from models.qwen3_vl.attention import Span
from models.qwen3_vl.prefix_cache import Prefix


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A batch in one row of T tokens, less what prefixes stand for: `token_ids` int64 (T,), `positions` int64 (3, T).

    `order` has the batch's index of each span.
    """

    order: list[int]
    spans: list[Span]
    prefixes: list[Prefix]
    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    images: list[PreparedImage]

    @classmethod
    def lay_out(cls, batch: Sequence[PreparedInput], prefixes: Sequence[Prefix | None]) -> PackedRow:
        """`prefixes[i]` is what batch[i] begins with, None where it is computed with the rest.

        As attention wants it: those on no prefix first, those on one side by side, by length.
        """
        used = list({prefix.key: prefix for prefix in prefixes if prefix}.values())
        places = {prefix.key: place for place, prefix in enumerate(used)}
        place_of = [places[prefix.key] if prefix else -1 for prefix in prefixes]
        skips = [prefix.length if prefix else 0 for prefix in prefixes]
        order = sorted(range(len(batch)), key=lambda i: (place_of[i], batch[i].num_tokens))
        return cls(
            order=order,
            spans=[Span(batch[i].num_tokens - skips[i], place_of[i], skips[i]) for i in order],
            prefixes=used,
            token_ids=np.concatenate([batch[i].token_ids[skips[i] :] for i in order]),
            positions=np.concatenate([_positions(batch[i])[:, skips[i] :] for i in order], axis=1),
            images=[image for i in order for image in batch[i].images],
        )

    @property
    def last_rows(self) -> npt.NDArray[np.int64]:
        """Where each span ends: int64 (sequences,)."""
        return np.cumsum([span.length for span in self.spans], dtype=np.int64) - 1


def _positions(item: PreparedInput) -> npt.NDArray[np.int64]:
    """(3, num_tokens)."""
    if item.positions is not None:
        return item.positions
    return np.broadcast_to(np.arange(item.num_tokens), (3, item.num_tokens))
