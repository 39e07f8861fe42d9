"""The loader of transformers' models. It refuses a checkpoint whose weights do not all fit: a missing one would be random."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from models.base import ModelLoadError

# A weight within the layers, which no checkpoint may have in excess. Unused heads are allowed, and so are the buffers named here,
# which the model computes anyway.
_LAYER_WEIGHT = re.compile(
    r"(^|\.)(embeddings|encoder|transformer|layers|blocks)\.(?!.*\b(position_ids|token_type_ids|inv_freq)$)"
)

# Keys of config.json that say that the weights are quantised; the second is an old name of the first.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# peft's name for it.
ADAPTER_CONFIG = "adapter_config.json"
# Types of RoPE whose angles depend on the longest sequence of a batch.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def load_pretrained(kind: Any, path: Path, dtype: torch.dtype, allow_pickle: bool, *, unused: str = "", **changes: Any) -> Any:
    """Load a model of transformers' class `kind`. Weights whose names begin with `unused` may be missing; `changes` are further
    arguments of from_pretrained. The checkpoint's own code is never run. Raises ModelLoadError."""
    if (path / ADAPTER_CONFIG).exists():
        # Without peft, transformers ignores it; with peft, it wraps layers in modules that the packed forward does not know.
        raise ModelLoadError(f"{path / ADAPTER_CONFIG}: an adapter is not applied here; merge it into its model, and remove it")
    _refuse_quantized(path)
    model, report = kind.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=None if allow_pickle else True,
        weights_only=True,
        ignore_mismatched_sizes=True,  # refused below, with their names
        output_loading_info=True,
        **changes,
    )
    if refused := _rope_types(model.config.get_text_config()) & _BATCH_DEPENDENT_ROPE:
        raise ModelLoadError(f"{path}: where a token stands would depend on the other inputs of its batch (RoPE: {min(refused)})")
    wrong = {
        "missing": [name for name in report["missing_keys"] if not (unused and name.startswith(unused))],
        "of another shape than config.json says": [name for name, *_ in report["mismatched_keys"]],
        "of no use to the model that config.json names": [
            name for name in report["unexpected_keys"] if _LAYER_WEIGHT.search(name)
        ],
    }
    for fault, names in wrong.items():
        if names:
            raise ModelLoadError(f"{path}: {len(names)} weights are {fault}, {min(names)} among them")
    return model


def _refuse_quantized(path: Path) -> None:
    """Raise ModelLoadError if config.json says that the weights are quantised: the packed forward takes them as they are."""
    config = json.loads((path / "config.json").read_bytes())
    for part in (config, *config.values()):
        if isinstance(part, dict) and any(part.get(key) for key in _QUANTIZATION_KEYS):
            raise ModelLoadError(
                f"{path}: its weights are quantised, which is not supported; take the checkpoint in its full precision"
            )


def _rope_types(config: Any) -> set[str]:
    """Return the types of RoPE that a model has: one, or one for each type of layer, or none."""
    found = getattr(config, "rope_parameters", None) or {}
    return {str(one.get("rope_type")) for one in (found, *found.values()) if isinstance(one, dict)}
