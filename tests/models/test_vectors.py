"""Vectors after the model: cut or filled to a dimension, and normalised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.vectors import normalize, to_dimension

UNIT = np.array([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [2 / 3, -1 / 3, 2 / 3]], dtype=np.float32)


@pytest.mark.parametrize(
    ("rows", "dimension", "expected"),
    [
        (UNIT, 3, UNIT),
        (UNIT[[0, 2]], 1, [[1.0], [1.0]]),
        (UNIT, 2, [[1, 0], [0, 1], [2 / 5**0.5, -1 / 5**0.5]]),
        (UNIT, 5, np.pad(UNIT, ((0, 0), (0, 2)))),
        (UNIT[:0], 2, np.zeros((0, 2))),
    ],
)
def test_to_dimension(rows: Any, dimension: int, expected: Any) -> None:
    found = to_dimension(rows, dimension)
    assert found.dtype == np.float32
    assert found.shape == (len(rows), dimension)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_to_dimension_refuses_to_make_up_a_direction() -> None:
    with pytest.raises(ValueError, match="all zero"):
        to_dimension(UNIT, 1)


def test_to_dimension_fills_up_and_leaves_every_cosine() -> None:
    filled = to_dimension(UNIT, 2560)
    np.testing.assert_allclose(filled @ filled.T, UNIT @ UNIT.T, rtol=1e-6)


def test_normalize() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1e-20, 0.0]])
    torch.testing.assert_close(normalize(rows), torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]]))
