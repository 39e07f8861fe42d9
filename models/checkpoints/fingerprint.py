"""A digest of all that decides a vector, read from a checkpoint's files. Equal fingerprints mean comparable vectors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from models.checkpoints.weights import StoredTensor

# Files besides the weights that decide what the model reads and how; and which of these say only where the weights lie.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Weights that no vector depends on, by name: of heads, of a pooler, which no pooling here reads, and what is computed anyway.
_UNREAD = re.compile(
    r"(lm_head|cls|classifier|pre_classifier|score|qa_outputs|vocab_transform|vocab_layer_norm|vocab_projector|head|decoder)\."
    r"|(\w+\.)?pooler\."
    r"|.*\b(position_ids|token_type_ids|inv_freq)$"
)
# Elements of a tensor that are hashed, about.
SAMPLES = 4096


def fingerprint(path: Path, weights: Iterable[StoredTensor], settings: Mapping[str, Any]) -> str:
    """Returns 16 hex digits of SHA-256 over the checkpoint's files, all of its `weights` that are read, and `settings`.

    How weights are spread over files, and in which order they come, changes nothing.
    """
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in path.glob(pattern)}):
        if file.name not in _INDEXES:
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    for one in sorted(_digest(tensor) for tensor in weights if not _UNREAD.match(tensor.name)):
        digest.update(one)
    digest.update(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS))
    return digest.hexdigest()[:16]


def _digest(tensor: StoredTensor) -> bytes:
    """Returns the SHA-256 of a tensor's name, dtype and shape, of samples of its elements, and of a sum of all its bits.

    Samples, since to hash gigabytes would hold up the start; the sum sees a change between them. It adds the bytes up as integers
    of 64 bits, modulo 2 ** 64: exact, and so the same in whatever order it is added up, as a sum of floats would not be.
    """
    size, data = len(tensor.data), tensor.data
    digest = hashlib.sha256(f"{tensor.name}\0{tensor.dtype}{tensor.shape}\0".encode())
    element = max(1, size // max(1, prod(tensor.shape)))
    count = size // element
    digest.update(data[: count * element].reshape(count, element)[:: max(1, count // SAMPLES)].tobytes())
    words = data[: size - size % 8].view("<u8")
    total = int(words.sum(dtype=np.uint64)) + int.from_bytes(data[len(words) * 8 :].tobytes(), "little")
    digest.update(b"%d" % (total % 2**64))
    return digest.digest()
