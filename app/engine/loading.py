"""Loading: the model that the settings name, and what becomes of the process when it cannot be loaded or its device is lost."""

from __future__ import annotations

import logging

from app.lifecycle import ExitCode, Lifecycle
from app.settings import Settings
from models.base import DeviceUnavailable, LoadedModel, ModelLoadError

log = logging.getLogger(__name__)


def load_configured_model(settings: Settings, may_download: bool = False) -> LoadedModel:
    """Finds the checkpoint that the settings name, or downloads it if it may, and loads it. Raises ModelLoadError."""
    # torch and transformers take seconds to import: the port is open by then.
    from models.checkpoints.download import find_or_download
    from models.devices import resolve_device
    from models.registry import load_checkpoint

    device = resolve_device(settings.device)
    path = find_or_download(settings.model_path, settings.model_id, may_download=may_download, allow_pickle=settings.allow_pickle)
    return load_checkpoint(
        path,
        device=device,
        dtype=settings.dtype,
        backend=settings.backend,
        compile=settings.compile,
        max_image_width=settings.max_image_width,
        max_image_height=settings.max_image_height,
        allow_pickle=settings.allow_pickle,
    )


def end_on_failure(lifecycle: Lifecycle, error: BaseException, loaded: bool) -> None:
    """Ends the process for a model that does not load, or a device that is lost, with a code that says which."""
    if loaded:
        log.critical("the device has failed: %s", error)
        lifecycle.end(ExitCode.DEVICE_FAILED)
    elif isinstance(error, ModelLoadError):
        log.critical("%s", error)
        lifecycle.end(ExitCode.SETTINGS_WRONG if isinstance(error, DeviceUnavailable) else ExitCode.START_FAILED)
    else:
        log.critical("the model cannot be loaded", exc_info=error)
        lifecycle.end(ExitCode.START_FAILED)
