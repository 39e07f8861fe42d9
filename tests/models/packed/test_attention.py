"""Attention over a packed row, against the textbook's: softmax of every query with the keys up to its own, one sequence alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.packed import varlen
from models.packed.attention import AttentionKernel, Heads, PrefixKeys, SdpaKernel, Span
from models.packed.masks import Window
from models.packed.varlen import Bounds, VarlenAttention, VarlenKernel, choose_kernel, merge, trusted_kernel
from tests.support import varlen_cpu  # noqa: F401 - the kernel for this test's device

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


@pytest.mark.parametrize("kernel", [SdpaKernel(), VarlenKernel()], ids=["sdpa", "varlen"])
@pytest.mark.parametrize("spans", ROWS.values(), ids=ROWS)
def test_attention_of_all_tokens_and_of_last_tokens(spans: list[Span], kernel: AttentionKernel) -> None:
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

    attention = kernel.causal(spans, torch.from_numpy)
    every = attention.all_tokens(q, k, v, prefixes, SCALE)
    torch.testing.assert_close(every, torch.cat(expected).float(), rtol=1e-5, atol=1e-5)
    last = attention.last_tokens(q[torch.from_numpy(ends - 1)], k, v, prefixes, SCALE)
    torch.testing.assert_close(last, torch.stack([rows[-1] for rows in expected]).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [SdpaKernel(), VarlenKernel()], ids=["sdpa", "varlen"])
@pytest.mark.parametrize("lengths", [[6], [4, 4, 4], [3, 9, 9, 2]])
def test_attention_is_bidirectional(kernel: AttentionKernel, lengths: list[int]) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(sum(lengths), HEADS, SIZE) for _ in range(3))
    expected = []
    for one_q, one_k, one_v in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        weights = (torch.einsum("qhd,khd->hqk", one_q, one_k) * SCALE).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, one_v).flatten(1))
    torch.testing.assert_close(kernel.bidirectional(lengths, torch.from_numpy)(q, k, v, SCALE), torch.cat(expected))


@pytest.mark.parametrize("kernel", [SdpaKernel(), VarlenKernel()], ids=["sdpa", "varlen"])
@pytest.mark.parametrize("lengths", [[6], [4, 4, 4], [3, 9, 9, 2, 20]])
def test_attention_within_a_window(kernel: AttentionKernel, lengths: list[int]) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(sum(lengths), HEADS, SIZE) for _ in range(3))
    expected = []
    for one_q, one_k, one_v in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        rows = []
        for place, query in enumerate(one_q):
            near = slice(max(place - 3, 0), place + 4)
            weights = (torch.einsum("hd,khd->hk", query, one_k[near]) * SCALE).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", weights, one_v[near]).flatten())
        expected.append(torch.stack(rows))
    window = Window(3, torch.device("cpu"))
    for _ in range(2):
        torch.testing.assert_close(kernel.local(lengths, window, torch.from_numpy)(q, k, v, SCALE), torch.cat(expected))
        # The mask of a longer sequence is kept.
        kernel.local([50], window, torch.from_numpy)(*(torch.randn(3, 50, HEADS, SIZE).unbind(0)), SCALE)


def test_attention_wants_sequences_on_no_prefix_first() -> None:
    with pytest.raises(ValueError, match="come first"):
        VarlenKernel().causal([Span(3, 0, 6), Span(4)], torch.from_numpy)


def test_merge_of_far_apart_sums_is_the_greater_one() -> None:
    one, other = torch.ones(1, 2, 3), torch.full((1, 2, 3), 5.0)
    merged = merge(one, torch.tensor([[500.0], [-500.0]]), other, torch.tensor([[-500.0], [500.0]]))
    torch.testing.assert_close(merged, torch.tensor([1.0, 5.0]).view(1, 2, 1).expand(1, 2, 3))


# --- Whether torch's kernel is to be trusted --------------------------------------------------------------------------------

HALF_ON_CPU = (torch.device("cpu"), torch.bfloat16, Heads(HEADS, KV_HEADS, SIZE))


def test_varlen_kernel_that_agrees_is_used() -> None:
    assert isinstance(trusted_kernel(*HALF_ON_CPU), VarlenKernel)


class Blind(VarlenAttention):
    """As a kernel that aligns causality to the first key would do it, where a sequence stands on a prefix."""

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
        return v.repeat_interleave(HEADS // KV_HEADS, 1).flatten(1)[: len(q)]


def too_wide(*_: object, **__: object) -> None:
    raise RuntimeError("head dimension not supported")


def transposed(*arguments: Any, **options: Any) -> Any:
    found = ATTEND(*arguments, **options)
    return (found[0], found[1].t()) if "return_aux" in options else found


ATTEND = varlen._attend
FAULTS = {
    "wrong": ("VarlenAttention", Blind, "is off by"),
    "not a number": ("merge", lambda one, *_: torch.full_like(one, torch.nan), "is off by inf"),
    "raises": ("_attend", too_wide, "RuntimeError: head dimension"),
    "sums of another shape": ("_attend", transposed, "log-sum-exp is of shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_varlen_kernel_that_disagrees_is_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, replacement, words = FAULTS[fault]
    monkeypatch.setattr(varlen, name, replacement)
    assert isinstance(trusted_kernel(*HALF_ON_CPU), SdpaKernel)
    assert words in caplog.text
    assert "SDPA is used" in caplog.text


def test_varlen_kernel_is_judged_by_windows_if_the_model_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(trusted_kernel(*HALF_ON_CPU, 20), VarlenKernel)
    within = VarlenKernel._within
    # Half of the window that is asked for; what sees all is as it was.
    half = lambda kernel, lengths, send, window: within(kernel, lengths, send, tuple(n // 2 for n in window))  # noqa: E731
    monkeypatch.setattr(VarlenKernel, "_within", half)
    assert isinstance(trusted_kernel(*HALF_ON_CPU, 20), SdpaKernel)
    assert isinstance(trusted_kernel(*HALF_ON_CPU), VarlenKernel)


def test_varlen_kernel_is_not_for_float32_or_a_cpu() -> None:
    heads = Heads(HEADS, KV_HEADS, SIZE)
    assert isinstance(choose_kernel(torch.device("cuda"), torch.float32, heads), SdpaKernel)
    assert isinstance(choose_kernel(torch.device("cpu"), torch.bfloat16, heads), SdpaKernel)


def test_varlen_kernel_before_torch_2_14_is_called_without_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen as torch_varlen

    asked: list[dict[str, object]] = []

    def older(q: torch.Tensor, k: object, v: object, *bounds: object, scale: float, window_size: object) -> torch.Tensor:
        asked.append({"scale": scale, "window_size": window_size})
        return torch.zeros_like(q)

    monkeypatch.setattr(torch_varlen, "varlen_attn", older)
    varlen._varlen.cache_clear()
    try:
        bounds = Bounds.from_lengths([2], torch.from_numpy)
        attention = VarlenAttention(bounds, torch.arange(2, dtype=torch.int32))
        attention.all_tokens(torch.zeros(2, 4, 8), torch.zeros(2, 2, 8), torch.zeros(2, 2, 8), (), 1.0)
    finally:
        varlen._varlen.cache_clear()
    assert asked == [{"scale": 1.0, "window_size": (-1, 0)}]


def test_varlen_kernel_of_equal_heads_avoids_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2.14 on torch takes cuDNN for the patches of an image unless splits are asked for."""
    from torch.nn.attention import varlen as torch_varlen

    asked: list[set[str]] = []

    def newer(
        q: torch.Tensor, k: object, v: object, *bounds: object, scale: float, window_size: object,
        enable_gqa: bool = False, num_splits: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        asked.append({f"gqa {enable_gqa}", f"splits {num_splits}"})
        return torch.zeros_like(q)

    monkeypatch.setattr(torch_varlen, "varlen_attn", newer)
    varlen._varlen.cache_clear()
    try:
        q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
        VarlenKernel().bidirectional([2], torch.from_numpy)(q, q, q, 1.0)
        VarlenKernel().causal([Span(2)], torch.from_numpy).all_tokens(q, k, k, (), 1.0)
    finally:
        varlen._varlen.cache_clear()
    assert asked == [{"gqa False", "splits 1"}, {"gqa True", "splits None"}]
