"""Arrays on their way to a device that a CPU plays, and rows back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.packed import staging


@pytest.mark.parametrize("pinned", [False, True])
def test_staging_sends_arrays_as_they_are(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any shape and dtype, and also where the memory had to grow in between."""
    monkeypatch.setattr(staging, "FIRST_BYTES", 64)
    stage = staging.Staging(torch.device("cpu"), pinned=pinned)
    rng = np.random.default_rng(0)
    for _ in range(3):
        stage.begin()
        arrays = [
            rng.integers(0, 9, (3, 5)),
            np.array([1, 2, 3], dtype=np.int32),
            rng.integers(0, 255, (7, 11), dtype=np.uint8),
            np.array([[True, False], [False, True]]),
            np.broadcast_to(np.arange(4), (3, 4)),
            rng.random((100, 3)).astype(np.float32),
            np.empty((0, 4), dtype=np.float32),
        ]
        sent = [stage.send(array) for array in arrays]
        joined = stage.send_joined([arrays[2], arrays[2][:2]])
        for array, tensor in zip(arrays, sent, strict=True):
            assert tensor.shape == array.shape
            np.testing.assert_array_equal(tensor.numpy(), array)
        np.testing.assert_array_equal(joined.numpy(), np.concatenate([arrays[2], arrays[2][:2]]))


@pytest.mark.parametrize("pinned", [False, True])
def test_staging_fetches_rows_of_the_callers_own(pinned: bool) -> None:
    stage = staging.Staging(torch.device("cpu"), pinned=pinned)
    first = stage.fetch(torch.ones(2, 3))
    stage.begin()
    stage.fetch(torch.zeros(2, 3))
    assert first.tolist() == [[1.0] * 3] * 2
