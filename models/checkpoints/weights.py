"""A checkpoint's weights as they lie in its files: names, dtypes, shapes and raw bytes.

safetensors are mapped into memory and looked at through numpy: nothing is copied, and torch is not needed. The format is 8 bytes
of little-endian length, a JSON header of that length, and the tensors' data, at the offsets that the header has.
"""

from __future__ import annotations

import json
import mmap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.base import ModelLoadError
from models.checkpoints.complete import shard_names, weight_names, why_no_weights

# torch's dtypes under the names that safetensors gives them, so that a pickled tensor is described as a stored one is.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """One tensor of a file. `dtype` is as safetensors names it, such as "BF16"; `data` are its bytes, uint8 (size,),
    read-only."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


def stored_tensors(folder: Path, allow_pickle: bool) -> Iterator[StoredTensor]:
    """Yields every tensor of a folder's weights, of all shards and in no order that means anything.

    Raises ModelLoadError if there are none, ValueError if a file is no safetensors or is cut off.
    """
    for file in weight_files(folder, allow_pickle):
        yield from _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """Returns the file of the weights, or those that their index names. Raises ModelLoadError."""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    found = weight_names(names, allow_pickle)
    if not found:
        raise ModelLoadError(f"{folder}: {why_no_weights(names)}")
    first = folder / found[0]
    return [first] if first.suffix != ".json" else [folder / name for name in sorted(shard_names(first))]


def _read_safetensors(file: Path) -> Iterator[StoredTensor]:
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        start = 8 + int.from_bytes(stream.read(8), "little")
        if size < start:
            raise ValueError(f"{file.name} is cut off, or not safetensors")
        header = json.loads(stream.read(start - 8))
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_SEQUENTIAL"):
        mapped.madvise(mmap.MADV_SEQUENTIAL)
    data = np.frombuffer(mapped, dtype=np.uint8)[start:]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if end > len(data):
            raise ValueError(f"{file.name} is cut off")
        yield StoredTensor(name, entry["dtype"], tuple(entry["shape"]), data[begin:end])


def _read_pickle(file: Path) -> Iterator[StoredTensor]:
    import torch

    # Only files of torch's newer format, which are archives, can be mapped into memory.
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield StoredTensor(name, _DTYPES.get(dtype, dtype), tuple(tensor.shape), data)
