"""The check that a checkpoint is whole: every file that it needs is there, and has the form and the length that it must have."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from models.base import ModelLoadError
from models.checkpoints.modules_json import read_modules

# Files whose content is checked: the weights, and what is read with them.
_CHECKED = (".safetensors", ".json", ".jinja", ".model", "merges.txt", "vocab.txt")
# What a module of sentence-transformers needs in its own folder, by its type.
_MODULES_NEED = {"Pooling": ("config",), "Dense": ("config", "weights"), "LayerNorm": ("config", "weights")}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# safetensors itself refuses a header over 100 MB.
_MAX_HEADER_BYTES = 100_000_000
# Errors that may be raised while JSON of an unexpected form is read.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


def check_complete(path: Path, allow_pickle: bool) -> None:
    """Raise ModelLoadError, naming what is wrong, unless the folder `path` holds a whole checkpoint.

    It reads names, lengths, JSON and the headers of weights, but not every byte: many gigabytes take milliseconds.
    """
    try:
        found = list(faults(path, allow_pickle))
    except OSError as error:
        found = [f"it cannot be read ({reason(error)})"]
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ModelLoadError(f"The model in {path} is incomplete or broken: {'; '.join(found[:5])}{more}.")


def reason(error: OSError) -> str:
    """Return the system's word for an error, without a path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return os.strerror(error.errno) if error.errno else type(error).__name__


def faults(path: Path, allow_pickle: bool) -> Iterator[str]:
    """Yield what is wrong with the checkpoint in `path`, each fault as the end of a sentence. Raises OSError."""
    if not path.is_dir():
        yield "it is not a folder" if path.exists() else "it does not exist"
        return
    for folder, pattern in ((".", "*.incomplete"), (".cache/huggingface", "**/*.incomplete"), ("._____temp", "**/*.*")):
        for partial in sorted((path / folder).glob(pattern)):
            yield f"{partial.relative_to(path)} is left of a download that was cut off or still runs"
    names = {entry.name for entry in path.iterdir() if not entry.is_dir()}
    if "config.json" not in names:
        yield "config.json is missing"
    if not names & {"tokenizer.json", "vocab.json", "vocab.txt"} and not any(name.endswith(".model") for name in names):
        yield "the tokenizer (tokenizer.json) is missing"
    weights = weight_names(names, allow_pickle)
    if not weights:
        yield why_no_weights(names)
    shards = {shard: name for name in weights if name.endswith(".index.json") for shard in shard_names(path / name)}
    for name in sorted(shards.keys() | set(weights) | {name for name in names if name.endswith(_CHECKED)}):
        if fault := _file_fault(path / name):
            yield f"{name} {fault}" + (f" ({shards[name]} names it)" if name in shards else "")
    for folder, needed in _modules(path):
        yield from _module_faults(path / folder, folder, needed, allow_pickle)


def _modules(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The folders of modules.json, as sentence-transformers writes it, and what each needs: "config", "weights" or nothing.

    A modules.json of another form is left to the family, which says more of it.
    """
    try:
        rows = read_modules(path) or []
    except ModelLoadError:
        return
    for row in rows:
        if row.folder not in ("", "."):
            yield row.folder, _MODULES_NEED.get(row.kind, ())


def _module_faults(path: Path, name: str, needed: tuple[str, ...], allow_pickle: bool) -> Iterator[str]:
    names = {entry.name for entry in path.iterdir() if not entry.is_dir()} if path.is_dir() else set()
    if "config" in needed and "config.json" not in names:
        yield f"{name}/config.json is missing (modules.json names it)"
    weights = weight_names(names, allow_pickle)
    if "weights" in needed and not weights:
        yield f"{name}: {why_no_weights(names)}"
    for file in sorted({*weights, *(file for file in names if file.endswith(_CHECKED))}):
        if fault := _file_fault(path / file):
            yield f"{name}/{file} {fault}"


def weight_names(names: set[str], allow_pickle: bool) -> list[str]:
    """Returns those of a folder's `names` that its weights are read from: a file, an index of several, or both; none if it has no
    weights. The file goes before the index, and safetensors before what is pickled."""
    for kind in ("model.safetensors", "pytorch_model.bin") if allow_pickle else ("model.safetensors",):
        if found := names & {kind, f"{kind}.index.json"}:
            return sorted(found)
    return []


def why_no_weights(names: set[str]) -> str:
    if any(name.endswith(".safetensors") for name in names):
        return "model.safetensors.index.json is missing, which says what lies in which file of weights"
    if any(name.startswith("pytorch_model") for name in names):
        return "the weights are pickled (pytorch_model.bin), which runs code: ALLOW_PICKLE=true allows it"
    return "the weights (model.safetensors) are missing"


def shard_names(index: Path) -> set[str]:
    """The files that an index names. An index that names none cannot be read: it is a fault of its own."""
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except _MALFORMED:
        return set()


def _file_fault(file: Path) -> str | None:
    """Return what is wrong with a file of a checkpoint, or None."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(len(_LFS_POINTER))
        if size == 0:
            return "is empty"
        if head == _LFS_POINTER:
            return "is a git-LFS pointer and not the file itself (`git lfs pull` fetches it)"
        if file.suffix == ".safetensors":
            return _safetensors_fault(file, size)
        if file.suffix == ".json":
            return _json_fault(file)
        if file.suffix == ".bin" and head.startswith(b"PK") and not zipfile.is_zipfile(file):
            return "is cut off"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({reason(error)})"
    return None


def _json_fault(file: Path) -> str | None:
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return "is not JSON: cut off, or another file"
    return "names no weights" if file.name.endswith(".index.json") and not shard_names(file) else None


def _safetensors_fault(file: Path, size: int) -> str | None:
    """Return what is wrong with a file of `size` bytes, or None. The format: the header's length as 8 bytes, little-endian; the
    header, JSON; and the data."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            return "is cut off, or not safetensors"
        header = stream.read(length)
    try:
        tensors = [value for key, value in json.loads(header).items() if key != "__metadata__"]
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except _MALFORMED:
        return "has no readable header"
    return None if size == expected else f"is {size} bytes long, and its header says {expected}"
