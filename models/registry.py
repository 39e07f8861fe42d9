"""config.json's `model_type` -> the adapter that knows the family."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from models.base import ImageLimits, LoadedModel, ModelLoadError

# Imported only when chosen: an adapter brings its own libraries.
_TEXT = "models.text_encoder.adapter:TextEmbedding"
ADAPTERS = {
    "bert": _TEXT,
    "distilbert": _TEXT,
    "modernbert": _TEXT,
    "mpnet": _TEXT,
    "qwen3": _TEXT,
    "qwen3_vl": "models.qwen3_vl.adapter:Qwen3VLEmbedding",
    "roberta": _TEXT,
    "xlm-roberta": _TEXT,
}


def load_model(
    path: Path,
    *,
    device: str,
    dtype: str,
    max_image_width: int,
    max_image_height: int,
    allow_pickle: bool,
    backend: str = "packed",
    compile: str = "auto",
) -> LoadedModel:
    """Load the checkpoint in folder `path` by its family's adapter.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`; `dtype` is `auto` or a torch dtype's name; image limits are in pixels, 0 for
    none; `backend` is `packed`, or `reference` for transformers' own forward; `compile` is `auto` for what the warm-up may do on
    CUDA (compiled layers and graphs), `layers` for no graphs, or `off`.

    Raises ModelLoadError, whatever is wrong with the checkpoint.
    """
    import transformers

    from models import devices

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    limits = ImageLimits(max_image_width, max_image_height)
    try:
        adapter = _adapter(path)
        resolved = devices.resolve_device(device)
        loaded = adapter(
            path, device=resolved, dtype=dtype, backend=backend, compile=compile, limits=limits, allow_pickle=allow_pickle
        )
        return LoadedModel(loaded, loaded)
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{path}: the checkpoint cannot be loaded ({type(error).__name__}: {_one_line(error)})") from error


def _adapter(path: Path) -> Callable[..., Any]:
    try:
        config = json.loads((path / "config.json").read_bytes())
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path}: no readable config.json with a model_type ({type(error).__name__})") from None
    if model_type not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        if config.get("auto_map"):
            raise ModelLoadError(
                f"{path}: model_type {model_type!r} is code that lies in the checkpoint (auto_map), which is never run; known "
                f"are: {known}"
            )
        raise ModelLoadError(f"{path}: model_type {model_type!r} is not known; known are: {known}")
    module, _, name = ADAPTERS[model_type].partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
