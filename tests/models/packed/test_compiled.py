"""Compiled layers: for all layers and lengths at once, and only where they give the same vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from models.packed import compiled, decoder
from tests.conformance.report import CHECKPOINT
from tests.support.as_on_cuda import few_graphs, forward_of, load_as_on_cuda, prepare, samples  # noqa: F401 - a fixture
from tests.support.oracle import Rows

pytestmark = pytest.mark.usefixtures("few_graphs")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_as_on_cuda(CHECKPOINT, "float32", monkeypatch)


def embed_all(model: Any) -> list[Rows]:
    return [model.embed(sample) for sample in samples(model)]


def test_compile_once_for_all_layers_and_lengths(model: Any) -> None:
    forward, counter = forward_of(model), CompileCounterWithBackend("eager")
    before = forward._decoder.steps
    assert compiled.compile_steps(forward.stepped(), lambda: embed_all(model), 0.995, counter)
    assert forward._decoder.steps is not before
    # Of each of the four functions one for a single row, and one for the first number of rows that turned out to vary.
    assert 4 <= counter.frame_count <= 12
    frames = counter.frame_count
    torch.compiler.set_stance("fail_on_recompile")
    for count in (1, 2, 5, 17):
        model.embed(prepare(model, *[("word " * (7 * n + 1),) for n in range(count)]))
    model.embed(prepare(model, (Image.new("RGB", (300, 200)), "x"), (Image.new("RGB", (64, 64)),)))
    assert counter.frame_count == frames


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no C compiler\nwas found")


def doubled(graph: Any, _: Any) -> Any:
    """A compiler that gets it wrong."""
    return lambda *arguments: [out * torch.linspace(1, 3, out.shape[-1], dtype=out.dtype) for out in graph.forward(*arguments)]


@pytest.mark.parametrize(("compiler", "words"), [(broken, "no C compiler was found"), (doubled, "they give other vectors")])
def test_compile_that_cannot_be_trusted_is_undone(
    model: Any, compiler: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward = forward_of(model)
    before, expected = (forward._decoder.steps, forward._tower.steps), embed_all(model)
    assert not compiled.compile_steps(forward.stepped(), lambda: embed_all(model), 0.995, compiler)
    assert (forward._decoder.steps, forward._tower.steps) == before
    assert "the layers are not compiled" in caplog.text
    assert words in caplog.text
    for one, other in zip(embed_all(model), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_compile_is_off_by_default(model: Any) -> None:
    assert forward_of(model)._decoder.steps == decoder.DecoderSteps()
