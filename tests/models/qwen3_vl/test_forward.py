"""The packed forward of Qwen3-VL as CUDA runs it, on a CPU: see tests/support/as_on_cuda.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.base import EmbeddingInput, PreparedInput
from models.checkpoints.demo import OTHER, write_demo_checkpoint
from models.qwen3_vl.forward import PackedForward
from tests.conformance.report import BARS, CASES, CHECKPOINT, case_input, golden
from tests.support.as_on_cuda import Replayer, few_graphs, load_as_on_cuda, samples  # noqa: F401 - a fixture
from tests.support.oracle import cosines
from tests.support.whole_model import WholeModel, load_model

pytestmark = pytest.mark.usefixtures("few_graphs")


def forward_of(model: WholeModel) -> PackedForward:
    assert isinstance(model.model.forward, PackedForward)
    return model.model.forward


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.bfloat16)])
def test_conformance_as_on_cuda(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, in graphs, with prefixes in a cascade: alone, all together, and in random company."""
    model = load_as_on_cuda(CHECKPOINT, dtype, monkeypatch)
    recorder = Replayer()
    forward_of(model).optimize(samples(model), compiler="eager", recorder=recorder)
    # On a CPU a replay saves nothing: whatever fits is taken.
    monkeypatch.setattr(forward_of(model)._graphs, "_eager_seconds", float("inf"))
    recorder.replays = 0
    items = [model.prepare(case_input(case)) for case in CASES]
    expected = golden()
    alone = np.concatenate([model.embed([item]) for item in items])
    replays_alone = recorder.replays
    rng = np.random.default_rng(0)
    rows = {"alone": alone, "together": model.embed(items)}
    for size in (3, 32):
        order = rng.permutation(len(items))
        rows[f"by {size}"] = np.empty_like(expected)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows[f"by {size}"][chosen] = model.embed([items[index] for index in chosen])
    for company, found in rows.items():
        near = cosines(found, expected)
        assert near.min() >= BARS[dtype], (company, CASES[int(near.argmin())]["id"], near.min())
    assert replays_alone == sum(not item.images and 16 <= item.num_tokens <= 512 for item in items) > 20
    assert recorder.replays > replays_alone
    assert len(forward_of(model).prefixes) > 0


def test_cascade_of_several_instructions_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo_checkpoint(tmp_path, seed=3, shape=OTHER)
    plain = load_model(tmp_path)
    model = load_as_on_cuda(tmp_path, "float32", monkeypatch)
    instructions = ["Find the passage.", "Represent the product with all of its properties.", None]
    batch = [model.prepare(EmbeddingInput((f"text {n} " * n,), instructions[n % 3])) for n in range(1, 13)]
    batch.append(model.prepare(EmbeddingInput((Image.new("RGB", (70, 50), "blue"), "seen"), instructions[0])))
    batch.append(model.prepare(EmbeddingInput(("once",), "An instruction that comes once.")))
    solo = np.concatenate([plain.embed([replace_prefix(item)]) for item in batch])
    found = model.embed(batch)
    assert len(forward_of(model).prefixes) == 3
    assert cosines(found, solo).min() > 0.99999


def replace_prefix(item: PreparedInput) -> PreparedInput:
    """An input that stands on nothing."""
    return PreparedInput(item.token_ids, item.images, item.positions)


def test_warm_up_optimizes_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []
    for device in ("cpu", "cuda"):
        for compile in ("auto", "layers", "off"):
            model = load_model(CHECKPOINT, compile=compile)
            note = lambda _, *, graphs, at=(device, compile): asked.append((*at, graphs))  # noqa: E731
            monkeypatch.setattr(model.model.forward, "optimize", note)
            monkeypatch.setattr(model.model, "_device", torch.device(device))
            model.warm_up()
    assert asked == [("cuda", "auto", True), ("cuda", "layers", False)]
