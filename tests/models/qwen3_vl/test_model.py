"""The EmbeddingModel of Qwen3-VL: dtype, order of rows, errors of the device, the warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import rates
from models.base import DeviceLost, EmbeddingInput, OutOfDeviceMemory, PreparedInput
from tests.support.oracle import Oracle, cosines
from tests.support.paths import CHECKPOINT
from tests.support.vl_inputs import mixed, noise
from tests.support.whole_model import WholeModel, load_model


def test_dtype_is_that_of_the_weights_and_rows_are_float32() -> None:
    half = load_model(CHECKPOINT, dtype="bfloat16")
    assert half.info.dtype == "bfloat16"
    row = half.embed([half.prepare(EmbeddingInput(("a",)))])
    assert row.dtype == np.float32
    assert abs(np.linalg.norm(row) - 1) < 1e-5, "normalised after it is float32"


def test_dtype_auto_keeps_a_float32_checkpoint() -> None:
    assert load_model(CHECKPOINT, dtype="auto").info.dtype == "float32"


def test_warm_up_measures_a_rate(mini: WholeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MIN_SECONDS", 0.01)
    assert 1 < mini.warm_up() < math.inf


def test_embed_keeps_the_order_of_the_batch(model: WholeModel) -> None:
    prepared = [model.prepare(item) for item in mixed()]
    assert len(prepared) > 32, "more than one group"
    solo = np.concatenate([model.embed([item]) for item in prepared])
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(prepared))
        rows = model.embed([prepared[index] for index in order])
        assert rows.shape == (len(prepared), model.info.width)
        assert cosines(rows, solo[order]).min() > 0.99999
        # Each is nearest to itself among all.
        assert np.array_equal((rows @ solo.T).argmax(axis=1), order)


def test_embed_gives_equal_inputs_equal_rows(model: WholeModel) -> None:
    item = model.prepare(mixed()[-1])
    rows = model.embed([item] * 5)
    assert rows.shape == (5, model.info.width)
    assert cosines(rows, np.repeat(model.embed([item]), 5, axis=0)).min() > 0.999999


def test_embed_returns_rows_of_the_callers_own(model: WholeModel) -> None:
    """A vector that a caller keeps must not change under a later batch."""
    first, second = (model.prepare(EmbeddingInput((text,))) for text in ("first", "second"))
    rows = model.embed([first])
    kept = rows.copy()
    model.embed([second])
    assert np.array_equal(rows, kept)
    rows[:] = 0
    assert np.array_equal(model.embed([first]), kept)


def test_image_limits_embed_the_image_at_its_grid(other_path: Path) -> None:
    small = load_model(other_path, max_image_width=96, max_image_height=0)
    image = noise(300, 200)
    item = small.prepare(EmbeddingInput((image,)))
    assert item.images[0].grid.size == (96, 64)
    expected = Oracle(other_path).vector([image.resize((96, 64), Image.Resampling.BICUBIC)])
    assert cosines(small.embed([item]), expected[None])[0] > 0.99999


def test_device_errors_carry_no_tensors(monkeypatch: pytest.MonkeyPatch, other_path: Path) -> None:
    model = load_model(other_path)
    item = model.prepare(EmbeddingInput(("a",)))
    for raised, meant in ((torch.OutOfMemoryError("full"), OutOfDeviceMemory), (torch.AcceleratorError("lost"), DeviceLost)):

        def fail(batch: Sequence[PreparedInput], raised: Exception = raised) -> torch.Tensor:
            raise raised

        monkeypatch.setattr(model.model, "forward", fail)
        with pytest.raises(meant) as caught:
            model.embed([item])
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None
