"""A checkpoint's transformer as transformers loads it, every weight of it: what is left out would be random."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from models.base import ModelLoadError

# A layer that reads the first token's state, which no pooling of ours does: many checkpoints do not have it.
_UNUSED = "pooler."
# What a checkpoint may hold beside its transformer: heads. Within it nothing may be left over, but what is computed anyway.
_WITHIN = re.compile(r"(^|\.)(embeddings|encoder|transformer|layers)\.(?!.*\b(position_ids|token_type_ids|inv_freq)$)")


def load_transformer(path: Path, dtype: torch.dtype, allow_pickle: bool) -> Any:
    """Code of the checkpoint's own is never run. Raises ModelLoadError."""
    model, report = AutoModel.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=None if allow_pickle else True,
        weights_only=True,
        ignore_mismatched_sizes=True,  # they are named below
        output_loading_info=True,
    )
    wrong = {
        "missing": [name for name in report["missing_keys"] if not name.startswith(_UNUSED)],
        "of another shape than config.json says": [name for name, *_ in report["mismatched_keys"]],
        "of no use to the model that config.json names": [name for name in report["unexpected_keys"] if _WITHIN.search(name)],
    }
    for fault, names in wrong.items():
        if names:
            raise ModelLoadError(f"{path}: {len(names)} weights are {fault}, {min(names)} among them")
    # Keys and values are never kept.
    model.config.use_cache = False
    return model
