"""Graphs of a decoder: each gives its row's vectors, and is taken only for a batch that it serves sooner."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.base import PreparedInput
from models.packed import graphs
from models.packed.forward import DecoderForward
from models.packed.graphs import TokenGraph, TokenGraphs
from models.packed.token_row import TokenRow
from tests.conformance.report import CHECKPOINT
from tests.support.as_on_cuda import Replayer, few_graphs, forward_of, load_as_on_cuda  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("few_graphs")


class Stale:
    """A graph that does not read its memory again."""

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        return lambda: None, run()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_as_on_cuda(CHECKPOINT, "float32", monkeypatch)


def capture(forward: DecoderForward, recorder: graphs.Recorder) -> TokenGraphs:
    with torch.inference_mode():
        return TokenGraphs(forward._decoder, forward._to_vectors, forward._staging, recorder, forward._run, 0.995)


def row_of(*lengths: int) -> TokenRow:
    rng = np.random.default_rng(len(lengths))
    batch = [PreparedInput(rng.integers(0, 400, length)) for length in lengths]
    return TokenRow.lay_out(batch)


@pytest.mark.parametrize(
    "lengths", [[64], [1], [16, 16, 16, 16], [20, 44], [30, 20], [17]], ids=lambda lengths: "+".join(map(str, lengths))
)
def test_graph_gives_the_vectors_of_its_row_alone(model: Any, lengths: list[int]) -> None:
    """Full and nearly empty, after a batch that has left its own numbers in the memory."""
    forward = forward_of(model)
    with torch.inference_mode():
        graph = TokenGraph(64, forward._decoder, forward._to_vectors, forward._staging, Replayer())
        graph(row_of(30, 34))
        row = row_of(*lengths)
        torch.testing.assert_close(graph(row).clone(), forward._run(row))


def test_graph_that_gives_other_vectors_is_not_used(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = capture(forward_of(model), Stale())
    assert len(found) == 0
    assert found.choose(30, 1, 0) is None
    assert caplog.text.count("it is not used") == 5


class Addresses:
    """As CUDA keeps it: where things were, and not the things."""

    def __init__(self) -> None:
        self.reads: list[weakref.ref[torch.Tensor]] = []

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        closed_over = inspect.getclosurevars(run).nonlocals
        attention = closed_over["attention"]
        tensors = [value for value in closed_over.values() if isinstance(value, torch.Tensor)]
        tensors += [attention._own.starts, attention._single.starts]
        self.reads = [weakref.ref(tensor) for tensor in tensors]
        return lambda: None, run()


def test_graph_keeps_alive_what_it_reads(model: Any) -> None:
    forward, recorder = forward_of(model), Addresses()
    with torch.inference_mode():
        graph = TokenGraph(64, forward._decoder, forward._to_vectors, forward._staging, recorder)
    gc.collect()
    assert len(recorder.reads) == 5
    assert all(read() is not None for read in recorder.reads)
    del graph
    gc.collect()
    assert not any(read() is not None for read in recorder.reads)


def test_graph_is_chosen_if_it_is_done_sooner(model: Any) -> None:
    found = capture(forward_of(model), Replayer())
    assert len(found) == 5
    found._seconds = {32: 0.001, 64: 0.002, 128: 0.003, 256: 0.005, 512: 0.010}
    found._eager_seconds = 0.004

    def tokens(count: int, sequences: int = 1, saved: int = 0) -> int | None:
        graph = found.choose(count, sequences, saved)
        return graph.tokens if graph else None

    assert [tokens(n) for n in (16, 32, 33, 64, 65, 128)] == [32, 32, 64, 64, 128, 128]
    assert tokens(15) is None, "the bucket would be over twice the tokens"
    assert tokens(200) == 256
    assert tokens(257) == 512
    assert tokens(513) is None, "larger than the largest"
    assert tokens(60, sequences=4) == 64
    assert tokens(60, sequences=5) is None, "more sequences than the graph has"
    assert tokens(128, saved=100) == 128, "without a graph nothing is done before 4 ms"
    assert tokens(400, saved=280) is None, "without prefixes it is sooner done in 4 ms than in 10"
    assert tokens(400, saved=100) == 512
