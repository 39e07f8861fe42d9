"""A model as CUDA runs it, on a CPU: the varlen kernel by a stand-in for its operator, page-locked memory by ordinary memory,
graphs by a recorder that calls what it recorded. Everything above those three is the code that a GPU runs.
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
from models.qwen3_vl import forward as packed
from models.text_encoder import adapter
from tests.support import varlen_cpu  # noqa: F401 - the kernel for this test's device
from tests.support.whole_model import load_model


class Replayer:
    """A graph that is run anew: from the same memory, into the same memory."""

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
    """Few sizes of graphs; and what a compilation sets for the whole process is set back."""
    monkeypatch.setattr(graphs, "BUCKETS", (32, 64, 128, 256, 512))
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def load_as_on_cuda(path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for family in (packed, adapter):
        monkeypatch.setattr(family, "choose_kernel", lambda *_: VarlenKernel())
        monkeypatch.setattr(family, "Staging", lambda device: staging.Staging(device, pinned=True))
    return load_model(path, device="cpu", dtype=dtype, max_image_width=512, max_image_height=512, allow_pickle=False)


def forward_of(model: Any) -> DecoderForward:
    assert isinstance(model.model._forward, DecoderForward)
    return model.model._forward


def prepare(model: Any, *items: tuple[Any, ...]) -> list[PreparedInput]:
    return [model.prepare(EmbeddingInput(parts)) for parts in items]


def samples(model: Any) -> list[list[PreparedInput]]:
    """Batches of one input, of several and, where the model reads them, with images."""
    one, two = prepare(model, ("one",), ("two " * 30,))
    if not model.info.supports_images:
        return [[one], [two, one]]
    (seen,) = prepare(model, (Image.new("RGB", (64, 96), "red"), "and a word"))
    return [[one], [two, one], [seen], [one, seen, seen, two]]
