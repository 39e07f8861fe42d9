"""A digest of all that decides a vector. Equal fingerprints mean comparable vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import torch

# Files besides the weights that decide what the model reads and how.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_INDEX = "model.safetensors.index.json"
SAMPLES = 4096
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(path: Path, state: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> str:
    """16 hex digits of SHA-256 over the checkpoint's files, samples and a sum of every tensor, and `settings`.

    Samples, since hashing gigabytes would hold up the start; the sum sees a change between them. It is of the bits
    read as integers, and so exact: one of floats would differ in its last place with the number of threads.
    """
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in path.glob(pattern)}):
        if file.name != _INDEX:
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        samples = flat[::step].to("cpu", torch.float32).numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + samples.tobytes())
        digest.update(b"%d" % flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64).item())
    digest.update(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS))
    return digest.hexdigest()[:16]
