"""`python -m app` on a device that fails as torch says it: the errors that the model has to tell apart.

FAULT_FROM is the batch from which on every one ends in a CUDA error; FAULT_ABOVE the inputs above which a batch is out of memory.
Counted are the batches of callers: the warm-up goes well. Only tests.tools.hardening starts it.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.base import PreparedInput


def spoil(fault_from: int, most_inputs: int) -> None:
    """Give the packed forward pass its faults."""
    import torch

    from models.qwen3_vl.forward import PackedForward
    from models.qwen3_vl.model import Qwen3VLEmbedding

    forward, warm_up = PackedForward.__call__, Qwen3VLEmbedding.warm_up
    batches: list[int] = []
    is_warm = False

    def faulty(self: PackedForward, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        if is_warm:
            batches.append(len(batch))
            if fault_from and len(batches) >= fault_from:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            if most_inputs and len(batch) > most_inputs:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, batch)

    def warmed_up(self: Qwen3VLEmbedding) -> float:
        nonlocal is_warm
        rate = warm_up(self)
        is_warm = True
        return rate

    PackedForward.__call__ = faulty
    Qwen3VLEmbedding.warm_up = warmed_up


if __name__ == "__main__":
    spoil(int(os.environ.pop("FAULT_FROM", "0")), int(os.environ.pop("FAULT_ABOVE", "0")))
    runpy.run_module("app", run_name="__main__", alter_sys=True)
