"""The device and the dtype of a model by their settings, and the meaning of the device's errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.base import DeviceLost, DeviceUnavailable, OutOfDeviceMemory, PreparedInput

# Parts of the messages of a CPU's allocator, and of CUDA's libraries that allocate past torch's own.
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")

HALF = (torch.bfloat16, torch.float16)

Forward = Callable[[Sequence[PreparedInput]], npt.NDArray[np.float32]]


def resolve_device(setting: str) -> str:
    """Returns DEVICE as a torch device: `auto` is CUDA if there is one. Raises DeviceUnavailable if CUDA is asked for and
    absent."""
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if setting.startswith("cuda"):
        index = torch.device(setting).index or 0
        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                f"DEVICE={setting}, but torch finds no CUDA device; set DEVICE=cpu, or DEVICE=auto to take what is there"
            )
        if index >= torch.cuda.device_count():
            raise DeviceUnavailable(
                f"DEVICE={setting}, but only {torch.cuda.device_count()} CUDA devices are visible, counted from 0"
            )
    return setting


def checkpoint_dtype(config: Any) -> torch.dtype:
    """Returns the dtype that a checkpoint's config.json names; if it names none, that of its text part, or float32."""
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def choose_dtype(setting: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns DTYPE as a torch dtype: `auto` is the checkpoint's own, or float32 on a CPU that has no instructions for it.

    The choice follows from checkpoint and machine, never from a timing: the same deployment always gives the same vectors.
    """
    if setting != "auto":
        chosen: torch.dtype = getattr(torch, setting)
        return chosen
    if device.type == "cpu" and checkpoint in HALF and not (checkpoint is torch.bfloat16 and _cpu_has_bfloat16()):
        return torch.float32
    return checkpoint


def _cpu_has_bfloat16() -> bool:
    """Tells whether the CPU multiplies bfloat16 by instructions of its own."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def run(forward: Forward, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
    """Runs a batch. Raises OutOfDeviceMemory or DeviceLost for torch's errors, as `translate` has them."""
    try:
        return forward(batch)
    except Exception as error:
        failure = translate(error)
    raise failure


def translate(error: Exception) -> Exception:
    """Returns torch's error as OutOfDeviceMemory or DeviceLost, and any other error as it is.

    Raise the answer outside the `except` block: a chained traceback would keep the batch's tensors alive.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return OutOfDeviceMemory(text)
    # After any other CUDA error the context is unusable.
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "Triton Error [CUDA]" in text:
        return DeviceLost(text)
    return error
