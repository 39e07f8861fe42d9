"""Staging: copies a batch's arrays to the device, and its rows back.

On CUDA arrays are written into page-locked memory that is kept from batch to batch, and copied in the order of the device's work;
the host waits for the rows alone. One batch runs at a time: no copy can overlap with another batch, so there is no second stream
to synchronise. On a CPU arrays stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Page-locked memory at first, in bytes: enough for most batches. It grows to what the largest has needed.
FIRST_BYTES = 1 << 20
# Every array begins at a multiple of so many bytes, the widest load of a device.
ALIGNMENT = 16


class Staging:
    """Page-locked memory for one batch at a time: `begin` gives the last batch's to the next. Only the device's thread may use
    it."""

    def __init__(self, device: torch.device, pinned: bool | None = None) -> None:
        """`pinned` tells whether arrays are copied through page-locked memory, by default if the device is CUDA; set, it has a
        CPU play such a device."""
        self.device = device
        self._pinned = device.type == "cuda" if pinned is None else pinned
        self._host = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._under_way = False

    def begin(self) -> None:
        """Starts a batch: the memory of all arrays that were sent before is used again."""
        if self._under_way and self.device.type == "cuda":
            # A batch whose rows were not fetched has failed, and may have left copies behind, of a prefix that is kept.
            torch.cuda.synchronize(self.device)
        self._used = 0
        self._under_way = True

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Returns an array on the device, in its shape and dtype."""
        return self.send_joined([array])

    def send_joined(self, arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
        """Returns arrays of one dtype on the device, joined along their first axis."""
        if not self._pinned:
            (array, *more) = arrays
            return torch.from_numpy(np.concatenate(arrays) if more else np.ascontiguousarray(array))
        shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
        host = self._reserve(shape, arrays[0].dtype)
        np.concatenate(arrays, out=host.numpy())
        return host.to(self.device, non_blocking=True, copy=True)

    def keep(self, size: int) -> torch.Tensor:
        """Returns page-locked memory that no batch uses again, all zero: uint8 (size,)."""
        return torch.zeros(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def fetch(self, rows: torch.Tensor) -> npt.NDArray[Any]:
        """Waits for rows to be computed on the device, and returns a copy of them, which is the caller's own."""
        if not self._pinned:
            return rows.numpy()
        host = self._reserve(tuple(rows.shape), _numpy_dtype(rows.dtype))
        host.copy_(rows, non_blocking=True)
        if self.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.device))
            # Waiting releases the interpreter's lock.
            done.synchronize()
        self._under_way = False
        return host.numpy().copy()

    def _reserve(self, shape: Sequence[int], dtype: np.dtype[Any]) -> torch.Tensor:
        """Returns a part of the page-locked memory that no other array of this batch uses."""
        size = int(np.prod(shape)) * dtype.itemsize
        start = -self._used % ALIGNMENT + self._used
        if start + size > len(self._host):
            # The old memory lives on in its tensors until the device has read them.
            grown = max(FIRST_BYTES, 2 * (start + size))
            self._host = self.keep(grown)
            start = 0
        self._used = start + size
        return self._host[start : start + size].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(*shape)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
