"""Devices and dtypes by setting, and torch's errors in the seam's words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import devices
from models.base import DeviceLost, DeviceUnavailable, OutOfDeviceMemory


@pytest.mark.parametrize(
    ("setting", "checkpoint", "device", "cpu_has_bfloat16", "chosen"),
    [
        ("auto", torch.float32, "cpu", False, torch.float32),
        ("auto", torch.float32, "cpu", True, torch.float32),
        ("auto", torch.bfloat16, "cpu", False, torch.float32),
        ("auto", torch.bfloat16, "cpu", True, torch.bfloat16),
        ("auto", torch.float16, "cpu", False, torch.float32),
        ("auto", torch.float16, "cpu", True, torch.float32),
        ("auto", torch.float32, "cuda", False, torch.float32),
        ("auto", torch.bfloat16, "cuda", False, torch.bfloat16),
        ("auto", torch.float16, "cuda:1", False, torch.float16),
        ("float32", torch.bfloat16, "cuda", True, torch.float32),
        ("bfloat16", torch.float32, "cpu", False, torch.bfloat16),
        ("float16", torch.bfloat16, "cpu", True, torch.float16),
    ],
)
def test_choose_dtype(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    checkpoint: torch.dtype,
    device: str,
    cpu_has_bfloat16: bool,
    chosen: torch.dtype,
) -> None:
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: cpu_has_bfloat16)
    assert devices.choose_dtype(setting, checkpoint, torch.device(device)) is chosen


def test_choose_dtype_asks_the_cpu_for_bfloat16() -> None:
    assert isinstance(devices._cpu_has_bfloat16(), bool)


@pytest.mark.parametrize(
    ("own", "of_text", "expected"),
    [
        ("bfloat16", "float32", torch.bfloat16),
        (torch.float16, None, torch.float16),
        (None, "bfloat16", torch.bfloat16),
        (None, None, torch.float32),
    ],
)
def test_checkpoint_dtype(own: Any, of_text: Any, expected: torch.dtype) -> None:
    class Config:
        def __init__(self, dtype: Any) -> None:
            self.dtype = dtype

        def get_text_config(self) -> Config:
            return Config(of_text)

    assert devices.checkpoint_dtype(Config(own)) is expected


@pytest.mark.parametrize(
    ("setting", "cuda_devices", "expected"),
    [
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda"),
        ("cuda", 1, "cuda"),
        ("cuda:0", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_resolve_device(monkeypatch: pytest.MonkeyPatch, setting: str, cuda_devices: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
    assert devices.resolve_device(setting) == expected


@pytest.mark.parametrize(
    ("setting", "cuda_devices", "message"),
    [
        ("cuda", 0, "DEVICE=cuda, .*set DEVICE=cpu, or DEVICE=auto"),
        ("cuda:1", 0, "DEVICE=cuda:1, .*set DEVICE=cpu, or DEVICE=auto"),
        ("cuda:1", 1, "DEVICE=cuda:1, but only 1 CUDA"),
        ("cuda:7", 2, "DEVICE=cuda:7, but only 2 CUDA"),
    ],
)
def test_resolve_device_refuses_one_that_is_absent(
    monkeypatch: pytest.MonkeyPatch, setting: str, cuda_devices: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
    with pytest.raises(DeviceUnavailable, match=message):
        devices.resolve_device(setting)


@pytest.mark.parametrize(
    ("error", "meant"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfDeviceMemory),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), OutOfDeviceMemory),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), OutOfDeviceMemory),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceLost),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceLost),
    ],
)
def test_translate(error: Exception, meant: type[Exception]) -> None:
    found = devices.translate(error)
    assert type(found) is meant
    assert str(found) == str(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("a"), StopIteration()])
def test_translate_leaves_other_errors_as_they_are(error: Exception) -> None:
    assert devices.translate(error) is error
