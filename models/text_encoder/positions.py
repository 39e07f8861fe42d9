"""Where a text's positions are counted from, by its transformer's config.

RoBERTa, XLM-R and MPNet keep the positions up to the padding token's id free: a text's begin after it, and a padding token that
is read has that position, and counts as none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def padding_id(config: Any) -> int | None:
    """Returns the id of the padding token, None for a type that counts positions from 0."""
    if config.model_type == "mpnet":
        # MPNetEmbeddings in transformers has it so, whatever the config says.
        return 1
    found: int | None = config.pad_token_id if config.model_type in ("roberta", "xlm-roberta") else None
    return found


def max_length(config: Any) -> int | None:
    """Returns how many tokens a text may have, None if the config sets no limit."""
    places: int | None = getattr(config, "max_position_embeddings", None)
    padding = padding_id(config)
    return places if places is None or padding is None else places - padding - 1


def after_padding(
    token_ids: npt.NDArray[np.int64], counted: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], padding: int
) -> npt.NDArray[np.int64]:
    """Returns the positions of the tokens of a row, int64 (T,), for a type with a padding token; `counted` are those counted from
    0 in each sequence.

    The rule of create_position_ids_from_input_ids in transformers.
    """
    is_padding = token_ids == padding
    if not is_padding.any():
        return counted + padding + 1
    before = np.cumsum(is_padding)
    ends = np.cumsum(lengths)
    # Padding tokens in earlier sequences are none of this one's.
    earlier = np.repeat(np.concatenate([[0], before[ends[:-1] - 1]]), lengths)
    return np.where(is_padding, padding, counted + padding + 1 - (before - earlier))
