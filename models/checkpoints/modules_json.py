"""modules.json, in which sentence-transformers lists a model's modules in the order in which they run, and its pooling modes.

The only reader of that file: which modules a family runs, and which it refuses, is the family's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import ModelLoadError
from models.checkpoints.json_files import read_json

FILE = "modules.json"

# Older folders have a flag for each mode in place of `pooling_mode`. Several modes are joined in this order.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
POOLING_MODES = tuple(_FLAGS.values())
LAST_TOKEN = "lasttoken"


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One row of modules.json: the module's class, with its package, and its folder within the checkpoint, "" for none of its
    own. The library keys modules by `name`."""

    class_name: str
    folder: str
    name: str

    @property
    def kind(self) -> str:
        """The class's name without its package, such as "Pooling"."""
        return self.class_name.rpartition(".")[2]


def read_modules(path: Path) -> list[ModuleRow] | None:
    """Returns the rows of a checkpoint's modules.json in their order, None if it has no such file. Raises ModelLoadError."""
    file = path / FILE
    if not file.exists():
        return None
    rows = read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"type", "path"} <= row.keys() for row in rows):
        raise ModelLoadError(f"{file} is not a list of modules, each with a type and a path")
    return [ModuleRow(str(row["type"]), str(row["path"]), str(row.get("name"))) for row in rows]


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the modes that a Pooling's config.json names, in the order in which they are joined: by `pooling_mode`, or by the
    flags of older folders; the mean if it names none, as in the library."""
    named = config.get("pooling_mode")
    if named is None:
        return tuple(mode for flag, mode in _FLAGS.items() if config.get(flag)) or ("mean",)
    return (named,) if isinstance(named, str) else tuple(named)
