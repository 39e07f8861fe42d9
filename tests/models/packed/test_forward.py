"""The forward of a decoder: what it does of its own accord before it trusts compiled layers and graphs, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.packed.forward import DecoderForward
from tests.conformance.report import CHECKPOINT
from tests.support.as_on_cuda import Replayer, few_graphs, forward_of, load_as_on_cuda, prepare, samples  # noqa: F401 - a fixture
from tests.support.oracle import cosines

pytestmark = pytest.mark.usefixtures("few_graphs")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_as_on_cuda(CHECKPOINT, "float32", monkeypatch)


class NoMemory:
    """Fails after some graphs."""

    def __init__(self, after: int) -> None:
        self.left = after

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Replayer().record(run)


@pytest.mark.parametrize("after", [0, 2])
def test_graphs_captured_before_a_failure_stay(model: Any, after: int, caplog: pytest.LogCaptureFixture) -> None:
    forward = forward_of(model)
    forward.optimize(samples(model), compiler="eager", recorder=NoMemory(after))
    assert forward._graphs is not None and len(forward._graphs) == after
    assert "no graph can be captured here: OutOfMemoryError: CUDA out of memory" in caplog.text
    near = cosines(model.embed(samples(model)[3]), np.concatenate([model.embed([item]) for item in samples(model)[3]]))
    assert near.min() > 0.99999


@pytest.mark.parametrize(("noise", "same"), [(1e-6, 0.995), (1e-3, 0.995), (0.01, 0.96), (0.2, 0.9)])
def test_optimize_sets_its_bar_by_rounding(model: Any, noise: float, same: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep model rounds worse: measured by what company does to its vectors, and never so far that a mistake would pass."""
    forward = forward_of(model)
    turned = np.array([[1 - noise, np.sqrt(1 - (1 - noise) ** 2)]], dtype=np.float32)
    straight = np.array([[1.0, 0.0]], dtype=np.float32)
    monkeypatch.setattr(
        DecoderForward, "__call__", lambda _, batch: np.repeat(turned if len(batch) > 1 else straight, len(batch), 0)
    )
    assert forward._same(samples(model)) == pytest.approx(same, abs=1e-5)


def test_prefix_that_saves_much_goes_before_a_graph(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, recorder = forward_of(model), Replayer()
    forward.optimize(samples(model), compiler="eager", recorder=recorder)
    assert forward._graphs is not None
    monkeypatch.setattr(forward._graphs, "_seconds", {32: 0.001, 64: 0.002, 128: 0.003, 256: 0.005, 512: 0.010})
    batch = prepare(model, *[(f"text {n}",) for n in range(12)])
    for floor, replays in ((0.004, 0), (0.011, 1)):
        monkeypatch.setattr(forward._graphs, "_eager_seconds", floor)
        recorder.replays = 0
        near = cosines(model.embed(batch), np.concatenate([model.embed([item]) for item in batch]))
        assert near.min() > 0.99999
        assert recorder.replays == replays + len(batch)
