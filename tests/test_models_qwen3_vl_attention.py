"""Attention over a packed row, against the textbook's: softmax of every query with the keys up to its own, one sequence alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.qwen3_vl.attention import GroupedAttention, PrefixKeys, Span

HEADS, KV_HEADS, SIZE = 4, 2, 8
SCALE = SIZE**-0.5

ROWS = {
    "one token": [Span(1)],
    "one sequence": [Span(9)],
    "equal lengths": [Span(5), Span(5), Span(5)],
    "padded within a group": [Span(3), Span(4), Span(11)],
    "several groups": [Span(2), Span(3), Span(40), Span(41), Span(90)],
    "on a prefix": [Span(1, 0, 6), Span(7, 0, 6), Span(8, 0, 6)],
    "part of a prefix": [Span(4, 1, 3)],
    "prefixes and none": [Span(4), Span(60), Span(3, 0, 6), Span(5, 0, 6), Span(4, 1, 3), Span(4, 1, 5)],
    "not sorted": [Span(30), Span(2), Span(29), Span(1, 1, 5)],
}


def textbook(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: PrefixKeys) -> torch.Tensor:
    """Attention of one sequence, (length, heads, size) each, on its prefix: (length, heads * size), in float64."""
    keys, values = (torch.cat(pair).double().repeat_interleave(HEADS // KV_HEADS, 1) for pair in zip(prefix, (k, v), strict=True))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * SCALE
    before = len(prefix[0])
    visible = torch.ones(len(q), before + len(q), dtype=torch.bool).tril(before)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).reshape(len(q), -1)


@pytest.mark.parametrize("spans", ROWS.values(), ids=ROWS)
def test_every_and_last_token(spans: list[Span]) -> None:
    torch.manual_seed(0)
    total = sum(span.length for span in spans)
    q, k, v = torch.randn(total, HEADS, SIZE), torch.randn(total, KV_HEADS, SIZE), torch.randn(total, KV_HEADS, SIZE)
    prefixes = [(torch.randn(n, KV_HEADS, SIZE), torch.randn(n, KV_HEADS, SIZE)) for n in (6, 5)]
    ends = np.cumsum([span.length for span in spans])
    expected = []
    for span, end in zip(spans, ends, strict=True):
        own = slice(end - span.length, end)
        prefix = tuple(part[: span.prefix_length] for part in prefixes[span.prefix])
        expected.append(textbook(q[own], k[own], v[own], prefix))

    attention = GroupedAttention(spans, torch.device("cpu"))
    every = attention.every(q, k, v, prefixes, SCALE)
    torch.testing.assert_close(every, torch.cat(expected).float(), rtol=1e-5, atol=1e-5)
    last = attention.last(q[torch.from_numpy(ends - 1)], k, v, prefixes, SCALE)
    torch.testing.assert_close(last, torch.stack([rows[-1] for rows in expected]).float(), rtol=1e-5, atol=1e-5)
