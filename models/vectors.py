"""Pure functions of vectors: normalise, compare, cut or fill up to a dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Scales rows, (n, width), to length 1, on their device."""
    lengths: torch.Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths


def nearness(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Returns the least cosine of a unit row of `one`, (n, width), with the same row of `other`."""
    return float((one * other).sum(axis=1).min())


def to_dimension(rows: npt.NDArray[np.float32], dimension: int) -> npt.NDArray[np.float32]:
    """Returns unit rows, float32 (n, width), as unit rows, (n, dimension).

    A smaller dimension keeps the first components and normalises again (Matryoshka); a larger one is filled with zeros, which
    leaves every cosine, dot product and distance as it was. Raises ValueError if all components that are kept are zero.
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
