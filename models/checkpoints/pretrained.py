"""transformers' modules with a checkpoint's weights, every one of them: what is left out would be random."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from models.base import ModelLoadError

# What a checkpoint may hold beside the model that is asked for: heads. Within its layers nothing may be left over, but what is
# computed anyway.
_WITHIN = re.compile(r"(^|\.)(embeddings|encoder|transformer|layers|blocks)\.(?!.*\b(position_ids|token_type_ids|inv_freq)$)")


# Where a config.json says that weights are not what they are multiplied by; the second is an old name.
_QUANTIZED = ("quantization_config", "compression_config")
# As peft names it.
ADAPTER_CONFIG = "adapter_config.json"
# Kinds of RoPE whose angles depend on the longest sequence of a batch.
_MOVING = {"dynamic", "longrope"}


def load_pretrained(kind: Any, path: Path, dtype: torch.dtype, allow_pickle: bool, *, unused: str = "", **changes: Any) -> Any:
    """A model of transformers' class `kind`. Weights whose names begin with `unused` may be missing; `changes` are its
    from_pretrained's. Code of the checkpoint's own is never run. Raises ModelLoadError."""
    if (path / ADAPTER_CONFIG).exists():
        # Without peft transformers reads past it; with it, weights would be within modules that the packed forward does not know.
        raise ModelLoadError(f"{path / ADAPTER_CONFIG}: an adapter is not applied here; merge it into its model, and remove it")
    _refuse_quantized(path)
    model, report = kind.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=None if allow_pickle else True,
        weights_only=True,
        ignore_mismatched_sizes=True,  # they are named below
        output_loading_info=True,
        **changes,
    )
    if moving := _rotations(model.config.get_text_config()) & _MOVING:
        raise ModelLoadError(f"{path}: where a token stands would depend on the other inputs of its batch (RoPE: {min(moving)})")
    wrong = {
        "missing": [name for name in report["missing_keys"] if not (unused and name.startswith(unused))],
        "of another shape than config.json says": [name for name, *_ in report["mismatched_keys"]],
        "of no use to the model that config.json names": [name for name in report["unexpected_keys"] if _WITHIN.search(name)],
    }
    for fault, names in wrong.items():
        if names:
            raise ModelLoadError(f"{path}: {len(names)} weights are {fault}, {min(names)} among them")
    return model


def _refuse_quantized(path: Path) -> None:
    """Raises ModelLoadError where config.json says so: the packed forward multiplies by the weights as they are."""
    config = json.loads((path / "config.json").read_bytes())
    for part in (config, *config.values()):
        if isinstance(part, dict) and any(part.get(key) for key in _QUANTIZED):
            raise ModelLoadError(
                f"{path}: its weights are quantised, which is not supported; take the checkpoint in its full precision"
            )


def _rotations(config: Any) -> set[str]:
    """The kinds of RoPE that a model has: one, or one for each kind of layer, or none."""
    found = getattr(config, "rope_parameters", None) or {}
    return {str(one.get("rope_type")) for one in (found, *found.values()) if isinstance(one, dict)}
