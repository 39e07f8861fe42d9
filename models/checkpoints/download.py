"""Find a checkpoint, or download it: whole or not at all.

A folder that exists is looked at and never written to. A download grows in a hidden folder beside its place, is checked by size
and hash against one commit of the repository, and takes its name by one rename. Nothing here reads the environment:
huggingface_hub does (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE), when it is first imported.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from models.base import ModelLoadError
from models.checkpoints.complete import check_complete, faults, reason

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger(__name__)

# What a model reads, and never code. A layer of a sentence-transformers model lies in a folder such as 1_Pooling.
_LAYER = r"\d+_\w+/"
_NEEDED = re.compile(rf"({_LAYER})?[^/]+\.(json|jinja|txt|model|safetensors)")
_PICKLED_LAYERS = " It has pickled ones (pytorch_model.bin), which run code: ALLOW_PICKLE=true allows them."
_HUB_TIMEOUT_S = 30.0
_KEPT = "what has come is kept, and the next start goes on"


def find_or_download(
    path: Path,
    model_id: str,
    *,
    may_download: bool,
    allow_pickle: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """Return `path`, a folder with a whole checkpoint; `model_id` is downloaded to it where it is missing or empty.

    `endpoint` and `token` None leave the choice to huggingface_hub. Raises ModelLoadError, whose message is one line.
    """
    ways_out = _ways_out(path, model_id)
    try:
        if _is_there(path):
            _check_found(path, allow_pickle, ways_out)
        elif not may_download:
            raise ModelLoadError(f"There is no model in {path}, and none is downloaded unless MODEL_ID is set. {ways_out}")
        else:
            _check_place(path.resolve())
            with _lock(path.resolve()):
                if _is_there(path):
                    _check_found(path, allow_pickle, ways_out)
                else:
                    _download(path.resolve(), model_id, allow_pickle, endpoint, token)
    except (OSError, _HubError) as error:
        what = str(error) if isinstance(error, _HubError) else f"{path} cannot hold a model: {reason(error)}."
        raise ModelLoadError(f"{what} {ways_out}") from error
    return path


def _is_there(path: Path) -> bool:
    """Whether there is something at `path`. An empty folder is nothing; a link that leads nowhere is something."""
    return path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))


def _check_found(path: Path, allow_pickle: bool, ways_out: str) -> None:
    try:
        check_complete(path, allow_pickle)
    except ModelLoadError as error:
        raise ModelLoadError(f"{error} What exists is never downloaded over. {ways_out}") from None


def _ways_out(path: Path, model_id: str) -> str:
    identifier, folder = shlex.quote(model_id), shlex.quote(str(path))
    return (
        f"Ways out: download it by hand, with `hf download {identifier} --local-dir {folder}` (Hugging Face) or "
        f"`modelscope download --model {identifier} --local_dir {folder}` (ModelScope); point MODEL_PATH to another folder that "
        "holds a model; or try the service with random weights: `make demo`."
    )


# The download


class _HubError(Exception):
    """The hub could not be had, or has not what is needed. The message is one line."""


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A file of one commit. `sha256` is known for files in LFS, `blob_id` (git's own hash) for all; a mirror may omit any."""

    name: str
    size: int | None
    sha256: str | None
    blob_id: str | None


def _check_place(path: Path) -> None:
    """Find what would stop the rename before gigabytes have come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(path):
        raise ModelLoadError(
            f"{path} is itself a mount point, and a download is put in its place by a rename: mount its parent folder instead, "
            "or put a model into it by hand."
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the right to download to `path`. A second process waits, and finds the model there."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Another process downloads a model to %s: waiting for it.", path)
        lock.acquire()
    except NotImplementedError as error:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from error
    try:
        yield
    finally:
        lock.release()


def _download(path: Path, model_id: str, allow_pickle: bool, endpoint: str | None, token: str | None) -> None:
    from huggingface_hub import HfApi

    folder = path.with_name(f".{path.name}.downloading")
    folder.mkdir(exist_ok=True)
    api = HfApi(endpoint=endpoint, token=token)
    with _hub_errors(model_id, api.endpoint):
        info = api.model_info(model_id, files_metadata=True, timeout=_HUB_TIMEOUT_S)
    revision, files = _needed_files(info, allow_pickle)
    size = sum(file.size or 0 for file in files)
    _clean(folder, {file.name for file in files}, size)
    log.info("Downloading %s at %s to %s: %d files, %.2f GB.", model_id, revision, path, len(files), size / 1e9)
    with _hub_errors(model_id, api.endpoint):
        patterns = [glob.escape(file.name) for file in files]
        api.snapshot_download(model_id, revision=revision, local_dir=folder, allow_patterns=patterns)
    _verify(folder, files)
    if found := list(faults(folder, allow_pickle)):
        way = _PICKLED_LAYERS if not allow_pickle and _has_pickled_layers(info) else ""
        raise _HubError(f"The repository {model_id} holds no whole model: {'; '.join(found[:5])}.{way}")
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    folder.rename(path)
    log.info("%s is whole, in %s.", model_id, path)


@contextmanager
def _hub_errors(model_id: str, endpoint: str) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError

    host = urlsplit(endpoint).netloc.rpartition("@")[2]
    try:
        yield
    except HFValidationError as error:
        raise _HubError(f"MODEL_ID {model_id!r} is not the name of a repository (owner/name).") from error
    # All that its HTTP client raises, too; which client that is depends on huggingface_hub's version.
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise
        status = _status(error)
        if status in (401, 403):
            what = f"refuses it ({status}): it does not exist, or needs an HF_TOKEN that may read it"
        elif status == 404:
            what = "does not know it (404)"
        elif status is not None:
            what = f"answered {status}; {_KEPT}"
        else:
            what = f"cannot be reached, or broke off ({type(error).__name__}); {_KEPT}"
        raise _HubError(f"{model_id} could not be downloaded: {host} {what}.") from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, which huggingface_hub may have wrapped."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _needed_files(info: ModelInfo, allow_pickle: bool) -> tuple[str, list[_RemoteFile]]:
    """The commit that the repository stands at, and the files of it that a model needs."""
    siblings = info.siblings or []
    if any("/" not in sibling.rfilename and sibling.rfilename.endswith(".safetensors") for sibling in siblings):
        # A layer's own weights may be pickled still.
        needed = re.compile(rf"{_NEEDED.pattern}|{_LAYER}pytorch_model\.bin") if allow_pickle else _NEEDED
    elif allow_pickle:
        needed = re.compile(rf"{_NEEDED.pattern}|({_LAYER})?pytorch_model[^/]*\.bin")
    else:
        raise _HubError(f"The repository {info.id} has no weights in safetensors; ALLOW_PICKLE=true allows others.")
    if info.sha is None:
        raise _HubError(f"The hub does not say at which commit {info.id} stands.")
    return info.sha, [_remote_file(sibling) for sibling in siblings if needed.fullmatch(sibling.rfilename)]


def _has_pickled_layers(info: ModelInfo) -> bool:
    """Whether a layer's weights are there in pickle format alone: they were not fetched."""
    names = {sibling.rfilename for sibling in info.siblings or []}
    pickled = {name.rpartition("/")[0] for name in names if re.fullmatch(rf"{_LAYER}pytorch_model\.bin", name)}
    return any(f"{folder}/model.safetensors" not in names for folder in pickled)


def _remote_file(sibling: RepoSibling) -> _RemoteFile:
    if sibling.lfs:
        return _RemoteFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256, None)
    return _RemoteFile(sibling.rfilename, sibling.size, None, sibling.blob_id)


def _clean(folder: Path, names: set[str], size: int) -> None:
    """Keep of an earlier, unfinished download only whole files with a name that this commit has, and see that the rest fits.

    huggingface_hub fetches the ones of an older commit again; `_verify` has the last word.
    """
    present = 0
    for file in [entry for entry in folder.rglob("*") if entry.is_file()]:
        inside = file.relative_to(folder)
        if file.suffix == ".incomplete" or (inside.parts[0] != ".cache" and inside.as_posix() not in names):
            file.unlink()
        else:
            present += file.stat().st_size
    if shutil.disk_usage(folder).free < size - present:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _verify(folder: Path, files: list[_RemoteFile]) -> None:
    """Compare every file with the size and hash of its commit. A wrong one is removed, so that the next start fetches it anew."""
    wrong = {file.name: fault for file in files if (fault := _mismatch(folder / file.name, file))}
    for name in wrong:
        (folder / name).unlink(missing_ok=True)
    if wrong:
        listed = "; ".join(f"{name} {fault}" for name, fault in list(wrong.items())[:5])
        raise _HubError(f"What came is not what the repository holds: {listed}. The rest is kept; the next start goes on.")


def _mismatch(path: Path, file: _RemoteFile) -> str | None:
    if not path.is_file():
        return "did not come"
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"is {size} bytes long instead of {file.size}"
    if file.sha256:
        with path.open("rb") as stream:
            return None if hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256 else "has another sha256"
    if file.blob_id:
        digest = hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()
        return None if digest == file.blob_id else "has another git hash"
    log.warning("The hub gives no hash for %s: only its size is checked.", file.name)
    return None
