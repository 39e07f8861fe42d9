"""Vectors after the model: cut to a dimension, fill up, normalise. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Rows of shape (n, width) scaled to length 1, on their device."""
    lengths: torch.Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths


def nearness(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """The least cosine of unit rows of shape (n, width) with the same rows of `other`."""
    return float((one * other).sum(axis=1).min())


def to_dimension(rows: npt.NDArray[np.float32], dimension: int) -> npt.NDArray[np.float32]:
    """Unit rows of shape (n, width) -> unit rows of shape (n, dimension), float32.

    A smaller dimension keeps the first components and normalises again (Matryoshka); a larger one is filled with zeros, which
    leaves every cosine, dot product and distance as it was. Raises ValueError where all that is kept is zero.
    """
    width = rows.shape[1]
    if dimension >= width:
        return rows if dimension == width else np.pad(rows, ((0, 0), (0, dimension - width)))
    kept = rows[:, :dimension]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    if not np.all(lengths > 0):
        raise ValueError("the components that are kept are all zero")
    scaled: npt.NDArray[np.float32] = kept / lengths
    return scaled
