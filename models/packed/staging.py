"""Staging: the way of a batch's arrays to the device, and of its rows back.

On CUDA arrays are written into page-locked memory that is kept from batch to batch, and copied in the order of the device's work;
nothing waits on the host but for the rows. One batch runs at a time, so that there is nothing for a copy to overlap with, and no
second stream to keep in step. On a CPU an array is where it should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# What most batches take, in bytes; it grows to what the largest has needed.
FIRST_BYTES = 1 << 20
# Every array begins at a multiple of this, the widest load of a device.
ALIGNMENT = 16


class Staging:
    """For the device's thread alone, and one batch at a time: `begin` gives the last one's memory to the next."""

    def __init__(self, device: torch.device, pinned: bool | None = None) -> None:
        """`pinned` tells whether there is a device to copy to, by default a CUDA device; with it set, a CPU plays one."""
        self.device = device
        self._pinned = device.type == "cuda" if pinned is None else pinned
        self._host = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._under_way = False

    def begin(self) -> None:
        """The arrays sent so far are done with."""
        if self._under_way and self.device.type == "cuda":
            # A batch whose rows were not fetched has failed, and may have left copies behind, of a prefix that is kept.
            torch.cuda.synchronize(self.device)
        self._used = 0
        self._under_way = True

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """An array on the device, in its shape and dtype."""
        return self.send_joined([array])

    def send_joined(self, arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
        """Arrays of one dtype, joined along their first axis, on the device."""
        if not self._pinned:
            (array, *more) = arrays
            return torch.from_numpy(np.concatenate(arrays) if more else np.ascontiguousarray(array))
        shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
        host = self._reserve(shape, arrays[0].dtype)
        np.concatenate(arrays, out=host.numpy())
        return host.to(self.device, non_blocking=True, copy=True)

    def keep(self, size: int) -> torch.Tensor:
        """Page-locked memory of so many bytes for good, all zero: uint8 (size,)."""
        return torch.zeros(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def fetch(self, rows: torch.Tensor) -> npt.NDArray[Any]:
        """Rows from the device, once all that leads to them has been computed; the caller's own."""
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
        """A part of the page-locked memory that nothing else of this batch uses."""
        size = int(np.prod(shape)) * dtype.itemsize
        start = -self._used % ALIGNMENT + self._used
        if start + size > len(self._host):
            # What was reserved before lives on in its tensors until the device has read it.
            grown = max(FIRST_BYTES, 2 * (start + size))
            self._host = self.keep(grown)
            start = 0
        self._used = start + size
        return self._host[start : start + size].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(*shape)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
