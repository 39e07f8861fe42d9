"""TokenRow: a batch as one row of tokens, its sequences one after the other, laid out in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.base import PreparedImage, PreparedInput
from models.packed.attention import Span
from models.packed.prefix_cache import Prefix


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A batch in one row of T tokens, without those that prefixes stand for: `token_ids` int64 (T,), `positions` int64 (3, T).

    `order[i]` is the index in the batch of the input whose tokens `spans[i]` covers.
    """

    order: list[int]
    spans: list[Span]
    prefixes: list[Prefix]
    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    images: list[PreparedImage]

    @classmethod
    def lay_out(cls, batch: Sequence[PreparedInput], prefixes: Sequence[Prefix | None] = ()) -> TokenRow:
        """Lays out a batch in the order that attention wants: inputs on no prefix first, then those on one prefix side by side,
        each time the shorter before the longer.

        `prefixes[i]` is the prefix that batch[i] stands on, None if its first tokens are computed with the rest; no `prefixes`
        at all means None for every input.
        """
        prefixes = prefixes or [None] * len(batch)
        used = list({prefix.key: prefix for prefix in prefixes if prefix}.values())
        places = {prefix.key: place for place, prefix in enumerate(used)}
        place_of = [places[prefix.key] if prefix else -1 for prefix in prefixes]
        skip_of = [prefix.length if prefix else 0 for prefix in prefixes]
        order: list[int] = np.lexsort(([item.num_tokens for item in batch], place_of)).tolist()
        skips = [skip_of[i] for i in order]
        lengths = [batch[i].num_tokens - skip for i, skip in zip(order, skips, strict=True)]
        return cls(
            order=order,
            spans=[Span(length, place_of[i], skip) for i, length, skip in zip(order, lengths, skips, strict=True)],
            prefixes=used,
            token_ids=np.concatenate([batch[i].token_ids[skip:] for i, skip in zip(order, skips, strict=True)]),
            positions=_positions([batch[i] for i in order], np.array(lengths), np.array(skips)),
            images=[image for i in order for image in batch[i].images],
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each span: int64 (sequences,)."""
        return np.array([span.length for span in self.spans])

    @property
    def last_rows(self) -> npt.NDArray[np.int64]:
        """The place in the row of each span's last token: int64 (sequences,)."""
        return np.cumsum(self.lengths) - 1


def _positions(
    batch: Sequence[PreparedInput], lengths: npt.NDArray[np.int64], skips: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Returns the positions of all tokens but the first `skips` of each input: (3, T)."""
    # Counted for the whole row at once, since most inputs are text.
    ends = np.cumsum(lengths)
    counted = np.arange(ends[-1]) - np.repeat(ends - lengths - skips, lengths)
    positions = np.repeat(counted[None], 3, axis=0)
    for item, end, length, skip in zip(batch, ends, lengths, skips, strict=True):
        if item.positions is not None:
            positions[:, end - length : end] = item.positions[:, skip:]
    return positions
