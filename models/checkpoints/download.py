"""Find a checkpoint, or download it: whole or not at all.

A folder that exists is checked and never written to. A download goes into a hidden sibling folder, is compared with one commit of
the repository by size and hash, and is then renamed to its place. This module does not read the environment; huggingface_hub
does, when it is first imported (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from models.base import ModelLoadError
from models.checkpoints.complete import check_complete, faults, reason

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger(__name__)

# The folder of a layer of a sentence-transformers model, such as 1_Pooling.
_LAYER_FOLDER = r"\d+_\w+/"
# The files that a model reads. No code is among them.
_NEEDED_FILE = re.compile(rf"({_LAYER_FOLDER})?[^/]+\.(json|jinja|txt|model|safetensors)")
_PICKLE_HINT = " It has pickled ones (pytorch_model.bin), which run code: ALLOW_PICKLE=true allows them."
_HUB_TIMEOUT_S = 30.0
_RESUME_HINT = "what has come is kept, and the next start goes on"


def find_or_download(
    path: Path,
    model_id: str,
    *,
    may_download: bool,
    allow_pickle: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """Return `path`, a folder with a whole checkpoint. If it is missing or empty, `model_id` is downloaded to it.

    If `endpoint` or `token` is None, huggingface_hub chooses it. Raises ModelLoadError, whose message is one line.
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
    """Return whether anything is at `path`. An empty folder does not count; a dangling link does."""
    return path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))


def _check_found(path: Path, allow_pickle: bool, ways_out: str) -> None:
    """Raise ModelLoadError, with the ways out, unless the folder at `path` is a whole checkpoint."""
    try:
        check_complete(path, allow_pickle)
    except ModelLoadError as error:
        raise ModelLoadError(f"{error} What exists is never downloaded over. {ways_out}") from None


def _ways_out(path: Path, model_id: str) -> str:
    """Return the sentence of an error that says what the user can do."""
    identifier, folder = shlex.quote(model_id), shlex.quote(str(path))
    return (
        f"Ways out: download it by hand, with `hf download {identifier} --local-dir {folder}` (Hugging Face) or "
        f"`modelscope download --model {identifier} --local_dir {folder}` (ModelScope); point MODEL_PATH to another folder that "
        "holds a model; or try the service with random weights: `make demo`."
    )


# The download


class _HubError(Exception):
    """Raised if the hub fails, or lacks what is needed. The message is one line."""


def _check_place(path: Path) -> None:
    """Raise ModelLoadError or OSError if the final rename could not work, before gigabytes are downloaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(path):
        raise ModelLoadError(
            f"{path} is itself a mount point, and a download is put in its place by a rename: mount its parent folder instead, "
            "or put a model into it by hand."
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock on downloads to `path`. A second process waits for it, and then finds the model there."""
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
    """Download `model_id` to `path`, which is absolute, missing or empty, and locked. Raises OSError and _HubError."""
    from huggingface_hub import HfApi

    folder = path.with_name(f".{path.name}.downloading")
    folder.mkdir(exist_ok=True)
    api = HfApi(endpoint=endpoint, token=token)
    with _hub_errors(model_id, api.endpoint):
        info = api.model_info(model_id, files_metadata=True, timeout=_HUB_TIMEOUT_S)
    revision, files = _needed_files(info, allow_pickle)
    size = sum(_size(file) or 0 for file in files)
    _clean(folder, {file.rfilename for file in files}, size)
    log.info("Downloading %s at %s to %s: %d files, %.2f GB.", model_id, revision, path, len(files), size / 1e9)
    with _hub_errors(model_id, api.endpoint):
        patterns = [glob.escape(file.rfilename) for file in files]
        api.snapshot_download(model_id, revision=revision, local_dir=folder, allow_patterns=patterns)
        checksums = api.verify_repo_checksums(model_id, revision=revision, local_dir=folder)
    # What the listing lacks was not compared with anything.
    _verify(folder, files, {mismatch["path"] for mismatch in checksums.mismatches} | set(checksums.extra_paths))
    if found := list(faults(folder, allow_pickle)):
        hint = _PICKLE_HINT if not allow_pickle and _has_pickled_layers(info) else ""
        raise _HubError(f"The repository {model_id} holds no whole model: {'; '.join(found[:5])}.{hint}")
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    folder.rename(path)
    log.info("%s is whole, in %s.", model_id, path)


@contextmanager
def _hub_errors(model_id: str, endpoint: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into _HubError. Errors of the disk stay OSError."""
    from huggingface_hub.errors import HFValidationError

    host = urlsplit(endpoint).netloc.rpartition("@")[2]
    try:
        yield
    except HFValidationError as error:
        raise _HubError(f"MODEL_ID {model_id!r} is not the name of a repository (owner/name).") from error
    # It passes its HTTP client's own exceptions on, and which client it has depends on its version.
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise
        status = _status(error)
        if status in (401, 403):
            what = f"refuses it ({status}): it does not exist, or needs an HF_TOKEN that may read it"
        elif status == 404:
            what = "does not know it (404)"
        elif status is not None:
            what = f"answered {status}; {_RESUME_HINT}"
        else:
            what = f"cannot be reached, or broke off ({type(error).__name__}); {_RESUME_HINT}"
        raise _HubError(f"{model_id} could not be downloaded: {host} {what}.") from error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error, which huggingface_hub may have wrapped, or None."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _needed_files(info: ModelInfo, allow_pickle: bool) -> tuple[str, list[RepoSibling]]:
    """Return the hash of the repository's current commit, and its files that a model needs. Raises _HubError."""
    siblings = info.siblings or []
    if any("/" not in sibling.rfilename and sibling.rfilename.endswith(".safetensors") for sibling in siblings):
        # The weights of a single layer may still be pickled.
        needed = re.compile(rf"{_NEEDED_FILE.pattern}|{_LAYER_FOLDER}pytorch_model\.bin") if allow_pickle else _NEEDED_FILE
    elif allow_pickle:
        needed = re.compile(rf"{_NEEDED_FILE.pattern}|({_LAYER_FOLDER})?pytorch_model[^/]*\.bin")
    else:
        raise _HubError(f"The repository {info.id} has no weights in safetensors; ALLOW_PICKLE=true allows others.")
    if info.sha is None:
        raise _HubError(f"The hub does not say at which commit {info.id} stands.")
    return info.sha, [sibling for sibling in siblings if needed.fullmatch(sibling.rfilename)]


def _has_pickled_layers(info: ModelInfo) -> bool:
    """Return whether the weights of a layer are only there in pickle format, so that they were not downloaded."""
    names = {sibling.rfilename for sibling in info.siblings or []}
    pickled = {name.rpartition("/")[0] for name in names if re.fullmatch(rf"{_LAYER_FOLDER}pytorch_model\.bin", name)}
    return any(f"{folder}/model.safetensors" not in names for folder in pickled)


def _size(file: RepoSibling) -> int | None:
    """Return the size in bytes of a file of the repository, None if a mirror omits it."""
    return file.lfs.size if file.lfs else file.size


def _clean(folder: Path, names: set[str], size: int) -> None:
    """Remove what an interrupted download left, except whole files that this commit has too; huggingface_hub downloads those of
    an older commit again. Raises OSError if the disk has no room for the rest."""
    present = 0
    for file in [entry for entry in folder.rglob("*") if entry.is_file()]:
        inside = file.relative_to(folder)
        if file.suffix == ".incomplete" or (inside.parts[0] != ".cache" and inside.as_posix() not in names):
            file.unlink()
        else:
            present += file.stat().st_size
    if shutil.disk_usage(folder).free < size - present:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _verify(folder: Path, files: list[RepoSibling], mismatches: set[str]) -> None:
    """Raise _HubError if a file is missing, or has another size or hash than in the repository; `mismatches` has the names of
    those with another hash. A wrong file is removed, so that the next start downloads it anew."""
    wrong = {file.rfilename: fault for file in files if (fault := _fault(folder / file.rfilename, file, mismatches))}
    for name in wrong:
        (folder / name).unlink(missing_ok=True)
    if wrong:
        listed = "; ".join(f"{name} {fault}" for name, fault in list(wrong.items())[:5])
        raise _HubError(f"What came is not what the repository holds: {listed}. The rest is kept; the next start goes on.")


def _fault(path: Path, file: RepoSibling, mismatches: set[str]) -> str | None:
    """Return what is wrong with a downloaded file, or None."""
    if not path.is_file():
        return "did not come"
    expected, size = _size(file), path.stat().st_size
    if expected is not None and size != expected:
        return f"is {size} bytes long instead of {expected}"
    if not file.lfs and not file.blob_id:
        # A mirror without hashes may list a placeholder instead, which matches no file.
        log.warning("The hub gives no hash for %s: only its size is checked.", file.rfilename)
        return None
    return f"has another {'sha256' if file.lfs else 'git hash'}" if file.rfilename in mismatches else None
