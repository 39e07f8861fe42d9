"""A model as CUDA runs it, on a CPU: a stand-in for the varlen kernel's operator, ordinary memory for page-locked memory, and a
recorder of graphs that calls the function that it recorded. Everything above those three is the code that a GPU runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models.base import EmbeddingInput, PreparedInput
from models.packed import graphs, staging
from models.packed.forward import DecoderForward
from models.packed.varlen import VarlenKernel
from models.qwen3_vl import forward as qwen3_vl
from models.text_encoder import model as text_encoder
from tests.support import varlen_cpu  # noqa: F401 - the kernel for this test's device
from tests.support.whole_model import WholeModel, load_model


class Replayer:
    """A recorder whose replay runs the function again: from the same memory, into the same memory."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        output = run()

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return replay, output


@pytest.fixture
def few_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Captures graphs of few sizes, and undoes afterwards what a compilation sets for the whole process."""
    monkeypatch.setattr(graphs, "BUCKETS", (32, 64, 128, 256, 512))
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def load_as_on_cuda(path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> WholeModel:
    """Loads a checkpoint on the CPU, with the kernel and the staging of CUDA."""
    for family in (qwen3_vl, text_encoder):
        monkeypatch.setattr(family, "choose_kernel", lambda *_: VarlenKernel())
        monkeypatch.setattr(family, "Staging", lambda device: staging.Staging(device, pinned=True))
    return load_model(path, dtype=dtype)


def forward_of(model: WholeModel) -> DecoderForward:
    """Returns the forward of a decoder."""
    assert isinstance(model.model.forward, DecoderForward)
    return model.model.forward


def prepare(model: WholeModel, *items: tuple[Any, ...]) -> list[PreparedInput]:
    """Prepares inputs, each given by its parts."""
    return [model.prepare(EmbeddingInput(parts)) for parts in items]


def samples(model: WholeModel) -> list[list[PreparedInput]]:
    """Prepares batches of one input, of several and, if the model reads them, with images."""
    one, two = prepare(model, ("one",), ("two " * 30,))
    if not model.info.supports_images:
        return [[one], [two, one]]
    (image,) = prepare(model, (Image.new("RGB", (64, 96), "red"), "and a word"))
    return [[one], [two, one], [image], [one, image, image, two]]
