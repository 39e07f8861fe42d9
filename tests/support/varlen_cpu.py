"""torch's varlen kernel on a CPU, where torch has none: the operator below `varlen_attn`, so that what is tested is everything
above it. The conventions are Flash Attention's, by its documentation: a causal mask is aligned to the last key, a window counts
the keys seen on either side besides a query's own, and a query without keys gets zeros and a log-sum-exp of plus infinity.

Imported, it is registered for the rest of the process.
"""

from __future__ import annotations

import torch
from torch.nn.attention import varlen


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *_: object,
    **__: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sequence after the other, in float32: output (T, heads, head_dim), log-sum-exp (heads, T), and a state of no use."""
    if cu_seq_q.dtype != torch.int32 or cu_seq_k.dtype != torch.int32:
        raise TypeError("cumulative lengths must be int32")
    left, right = window_size or (-1, -1)
    if ((left, right) not in ((-1, -1), (-1, 0)) and not (left == right > 0)) or scale is None:
        raise ValueError("a window or scale that is not asked for here")
    out = torch.zeros_like(query)
    sums = torch.full((query.shape[1], query.shape[0]), torch.inf)
    ends_q, ends_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        if q1 - q0 > max_q or k1 - k0 > max_k:
            raise ValueError("a sequence is longer than the longest")
        if q0 == q1 or k0 == k1:
            continue
        keys, values = (x[k0:k1].float().repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1].float(), keys) * scale
        if left > 0:
            if q1 - q0 != k1 - k0:
                raise ValueError("a window over other tokens than a sequence's own")
            places = torch.arange(q1 - q0)
            scores.masked_fill_((places[:, None] - places).abs() > left, -torch.inf)
        elif right == 0:
            hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu(k1 - k0 - (q1 - q0) + 1)
            scores.masked_fill_(hidden, -torch.inf)
        sums[:, q0:q1] = scores.logsumexp(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(query.dtype)
    return out, sums, torch.zeros(2, dtype=torch.uint64)


varlen._varlen_attn.register_kernel("cpu")(attend)
