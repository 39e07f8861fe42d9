"""Attention by torch's varlen kernel: all sequences of a packed row in one call, of any lengths. CUDA, half precision.

Sequences that stand on a prefix take a cascade: the attention of their tokens to the prefix, of all sequences on one prefix in
one call, and their causal attention to each other. The two are merged by the logarithms of the sums that their softmaxes divide
by (as Flash Attention merges the parts of long sequences). The kernel's conventions differ between versions of torch: it is used
only if it agrees with SDPA.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch

from models.packed.attention import AttentionKernel, CausalAttention, Heads, PrefixKeys, SdpaKernel, Send, Span
from models.packed.masks import BidirectionalAttention, Window

log = logging.getLogger(__name__)

# Keys that a query sees before its own place and after it, as the kernel counts them; -1 is no limit.
CAUSAL = (-1, 0)
UNLIMITED = (-1, -1)
# The largest difference from SDPA. Half precision rounds to 2 ** -8; a mistaken mask or merge is off by the order of 1.
AGREEMENT = 0.05


@dataclass(frozen=True, slots=True)
class Bounds:
    """The places where the sequences of a packed row begin, and the last one ends: int32 (sequences + 1,). No sequence is longer
    than `longest`."""

    starts: torch.Tensor
    longest: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], send: Send) -> Bounds:
        return cls(send(np.cumsum([0, *lengths], dtype=np.int32)), max(lengths))


class VarlenKernel:
    """Attention by torch.nn.attention.varlen."""

    def __init__(self) -> None:
        """Raises ImportError if torch has no such kernel."""
        _varlen()

    def causal(self, spans: Sequence[Span], send: Send) -> CausalAttention:
        first = next((i for i, span in enumerate(spans) if span.prefix_length), len(spans))
        own = Bounds.from_lengths([span.length for span in spans], send)
        return VarlenAttention(own, send(np.arange(len(spans) + 1, dtype=np.int32)), Cascade.from_spans(spans[first:], send))

    def bidirectional(self, lengths: Sequence[int], send: Send) -> BidirectionalAttention:
        return self._within(lengths, send, UNLIMITED)

    def local(self, lengths: Sequence[int], window: Window, send: Send) -> BidirectionalAttention:
        return self._within(lengths, send, (window.reach, window.reach))

    def _within(self, lengths: Sequence[int], send: Send, window: tuple[int, int]) -> BidirectionalAttention:
        bounds = Bounds.from_lengths(lengths, send)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
            out: torch.Tensor = _attend(q, k, v, bounds, bounds, scale, window)
            return out.flatten(1)

        return attend


@dataclass(frozen=True, slots=True)
class Cascade:
    """The attention to prefixes of the last `tokens` tokens of a row, which are those of its last `sequences` sequences.

    Sequences on one prefix form a run. `chosen` has each run's prefix and the length of it that counts; `rows`, `sequences_each`
    and `keys` have the bounds of the runs in tokens, in sequences and in tokens of their prefixes.
    """

    tokens: int
    sequences: int
    chosen: list[tuple[int, int]]
    rows: Bounds
    sequences_each: Bounds
    keys: Bounds

    @classmethod
    def from_spans(cls, spans: Sequence[Span], send: Send) -> Cascade | None:
        """Plans the cascade of spans on prefixes; None for no spans. Raises ValueError if one is on no prefix."""
        if not spans:
            return None
        if not all(span.prefix_length for span in spans):
            raise ValueError("sequences on no prefix come first")
        runs = [(key, list(run)) for key, run in groupby(spans, key=lambda span: (span.prefix, span.prefix_length))]
        tokens = [sum(span.length for span in run) for _, run in runs]
        return cls(
            tokens=sum(tokens),
            sequences=len(spans),
            chosen=[key for key, _ in runs],
            rows=Bounds.from_lengths(tokens, send),
            sequences_each=Bounds.from_lengths([len(run) for _, run in runs], send),
            keys=Bounds.from_lengths([length for (_, length), _ in runs], send),
        )

    def add(
        self, out: torch.Tensor, sums: torch.Tensor, q: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float, last: bool
    ) -> None:
        """Merges the prefixes' share into `out` (rows, heads, head_dim), whose log-sum-exp is `sums` (heads, rows), in place.
        `last` tells that rows are the sequences' last tokens alone."""
        rows, count = (self.sequences_each, self.sequences) if last else (self.rows, self.tokens)
        k, v = (_joined([prefixes[index][part][:length] for index, length in self.chosen]) for part in (0, 1))
        start = len(q) - count
        share, share_sums = _attend_with_sums(q[start:], k, v, rows, self.keys, scale, UNLIMITED)
        out[start:] = merge(out[start:], sums[:, start:], share, share_sums)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class VarlenAttention:
    """CausalAttention of sequences within the bounds `own`. `single` is int32 0, 1, 2 .. (sequences + 1,): the bounds of their
    last tokens."""

    def __init__(self, own: Bounds, single: torch.Tensor, cascade: Cascade | None = None) -> None:
        self._own = own
        self._single = Bounds(single, 1)
        self._cascade = cascade

    def all_tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        return self._run(q, k, v, prefixes, scale, self._own, CAUSAL)

    def last_tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: Sequence[PrefixKeys], scale: float
    ) -> torch.Tensor:
        return self._run(q, k, v, prefixes, scale, self._single, UNLIMITED)

    def _run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prefixes: Sequence[PrefixKeys],
        scale: float,
        queries: Bounds,
        window: tuple[int, int],
    ) -> torch.Tensor:
        if self._cascade is None:
            plain: torch.Tensor = _attend(q, k, v, queries, self._own, scale, window)
            return plain.flatten(1)
        out, sums = _attend_with_sums(q, k, v, queries, self._own, scale, window)
        self._cascade.add(out, sums, q, prefixes, scale, last=queries is self._single)
        return out.flatten(1)


def merge(one: torch.Tensor, one_sums: torch.Tensor, other: torch.Tensor, other_sums: torch.Tensor) -> torch.Tensor:
    """Merges the attention to two sets of keys into the attention to both, (T, heads, head_dim), by their log-sum-exps,
    (heads, T)."""
    # The softmax over both, written as that of two: exact, and nothing can overflow.
    weight = torch.sigmoid(one_sums - other_sums).t().unsqueeze(-1)
    return torch.lerp(other.float(), one.float(), weight).to(one.dtype)


def choose_kernel(device: torch.device, dtype: torch.dtype, heads: Heads, reach: int | None = None) -> AttentionKernel:
    """Chooses a model's kernel: varlen if the device is CUDA in half precision and `trusted_kernel` takes it, else SDPA.
    `reach` is that of the model's windows, None if it has none."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return SdpaKernel()
    return trusted_kernel(device, dtype, heads, reach)


@torch.inference_mode()
def trusted_kernel(device: torch.device, dtype: torch.dtype, heads: Heads, reach: int | None = None) -> AttentionKernel:
    """Returns the VarlenKernel if it runs and agrees with SDPA on random sequences of every kind, else SdpaKernel, with a
    warning."""
    sdpa = SdpaKernel()
    try:
        off = disagreement(VarlenKernel(), sdpa, device, dtype, heads, reach)
    except Exception as error:
        log.warning("torch's varlen attention does not run here (%s: %s); SDPA is used, slower", type(error).__name__, error)
        return sdpa
    if not off < AGREEMENT:
        log.warning("torch's varlen attention is off by %.3g from SDPA here; SDPA is used, slower", off)
        return sdpa
    return VarlenKernel()


def disagreement(
    one: AttentionKernel,
    other: AttentionKernel,
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads,
    reach: int | None = None,
) -> float:
    """Returns the largest difference of two kernels' outputs, which are of the order of 1, on random sequences with prefixes and
    without."""
    generator = torch.Generator().manual_seed(0)
    send: Send = lambda array: torch.from_numpy(array).to(device)  # noqa: E731

    def draw(tokens: int, count: int) -> torch.Tensor:
        # A slice of a wider tensor, since a layer's values are a slice of its projection.
        return torch.randn(tokens, count + 1, heads.size, generator=generator).to(device, dtype)[:, 1:]

    spans = [Span(n) for n in (1, 7, 200)] + [Span(5, 0, 14), Span(300, 0, 14), Span(1, 1, 9), Span(40, 1, 30)]
    lengths = [span.length for span in spans]
    q, k, v = (draw(sum(lengths), count) for count in (heads.queries, heads.keys, heads.keys))
    prefixes = [(draw(n, heads.keys), draw(n, heads.keys)) for n in (14, 30)]
    ends, scale = send(np.cumsum(lengths) - 1), 2 * heads.size**-0.5

    def outputs(kernel: AttentionKernel) -> list[torch.Tensor]:
        on_prefixes, plain = kernel.causal(spans, send), kernel.causal([Span(length) for length in lengths], send)
        found = [
            on_prefixes.all_tokens(q, k, v, prefixes, scale),
            on_prefixes.last_tokens(q[ends], k, v, prefixes, scale),
            plain.all_tokens(q, k, v, (), scale),
            plain.last_tokens(q[ends], k, v, (), scale),
            # As many heads of keys as of queries, as of the patches of images.
            kernel.bidirectional(lengths, send)(k, v, k, scale),
        ]
        if reach is not None:
            found.append(kernel.local(lengths, Window(reach, device), send)(k, v, k, scale))
        return found

    # A difference that is not a number counts as infinite.
    offs = [(mine.float() - theirs.float()).abs().max() for mine, theirs in zip(outputs(one), outputs(other), strict=True)]
    return float(torch.stack(offs).nan_to_num(nan=torch.inf).max())


@dataclass(frozen=True, slots=True)
class _Varlen:
    """torch's function, and its options. `grouped` are those for keys of fewer heads than queries: from torch 2.14 on that needs
    a flag. `equal` are those for as many heads: from 2.14 on they keep torch from cuDNN, which plans anew for every shape of a
    batch.
    """

    attend: Any
    with_sums: Any
    grouped: dict[str, Any]
    equal: dict[str, Any]


@cache
def _varlen() -> _Varlen:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return _Varlen(
        attend=varlen_attn,
        with_sums=AuxRequest(lse=True),
        grouped={"enable_gqa": True} if "enable_gqa" in known else {},
        equal={"num_splits": 1} if "num_splits" in known else {},
    )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: Bounds,
    keys: Bounds,
    scale: float,
    window: tuple[int, int],
    **more: Any,
) -> Any:
    varlen = _varlen()
    flags = varlen.equal if q.shape[1] == k.shape[1] else varlen.grouped
    bounds = (queries.starts, keys.starts, queries.longest, keys.longest)
    return varlen.attend(q, k, v, *bounds, scale=scale, window_size=window, **flags, **more)


def _attend_with_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Bounds, keys: Bounds, scale: float, window: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention and its log-sum-exp, (heads, T). Raises ValueError if torch gives that another shape."""
    out, sums = _attend(q, k, v, queries, keys, scale, window, return_aux=_varlen().with_sums)
    if sums.shape != (q.shape[1], q.shape[0]):
        raise ValueError(f"its log-sum-exp is of shape {tuple(sums.shape)}, not (heads, T)")
    return out, sums
