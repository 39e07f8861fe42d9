"""Cuts a batch into groups that are computed together: greedily, in the order that is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def group_by_tokens(
    order: Sequence[int], num_tokens: Sequence[int], *, max_size: int = 0, max_tokens: int = 0, padded: bool = False
) -> Iterator[list[int]]:
    """Yields the indices of `order`, sorted by length, in groups of at most `max_size` inputs and `max_tokens` tokens; 0 is no
    limit. Input i has `num_tokens[i]` tokens; `padded` counts each as many as the longest of its group has. An input that alone
    is over the limit makes a group of its own."""
    group: list[int] = []
    total = 0
    for index in order:
        tokens = num_tokens[index]
        after = (len(group) + 1) * tokens if padded else total + tokens
        if group and (len(group) == max_size or (max_tokens and after > max_tokens)):
            yield group
            group, total = [], 0
        group.append(index)
        total += tokens
    if group:
        yield group
