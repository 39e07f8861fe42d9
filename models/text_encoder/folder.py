"""What a folder in the layout of sentence-transformers says besides weights: the modules after the transformer, and its settings.

modules.json lists the modules in order: a Transformer in the folder itself, one Pooling, then any of Dense, LayerNorm, Normalize
and Dropout, each with a config.json of its own. The meaning of every key is that of the library of that name. A folder without
modules.json is taken as the library takes it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.base import ModelLoadError
from models.text_encoder.settings import Settings, read_json, read_object

log = logging.getLogger(__name__)

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Before there was `pooling_mode`, each mode had a flag; the order is that in which the library joins them.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
HEADS = ("Dense", "LayerNorm", "Normalize", "Dropout")
# What a folder without modules.json is told of.
_PLAIN = {"lasttoken": "the last one is taken, as of Qwen3-Embedding", "mean": "their mean is taken, as the library does"}


@dataclass(frozen=True, slots=True)
class Module:
    """A row of modules.json: the class's own name, its folder, and what its config.json says, nothing where it has none."""

    kind: str
    path: Path
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Folder:
    """`modes` are joined in their order; `include_prompt` tells whether a prompt's tokens are pooled; `is_plain` that there is no
    modules.json."""

    modes: tuple[str, ...]
    include_prompt: bool = True
    heads: tuple[Module, ...] = ()
    settings: Settings = field(default_factory=Settings)
    is_plain: bool = False

    @classmethod
    def read(cls, path: Path, config: Any) -> Folder:
        """`config` is the transformer's. Raises ModelLoadError for a module that is not known, or settings that this server does
        not follow."""
        if not (path / "modules.json").exists():
            return cls(modes=(_plain_mode(path, config),), is_plain=True)
        _, pooling, *heads = _modules(path)
        return cls(
            modes=_modes(pooling),
            include_prompt=bool(pooling.config.get("include_prompt", True)),
            heads=tuple(heads),
            settings=Settings.read(path),
        )

    def summary(self) -> dict[str, Any]:
        """All that decides a vector, for a fingerprint. A folder's name decides nothing."""
        return {
            "modes": self.modes,
            "include_prompt": self.include_prompt,
            "heads": [(head.kind, head.config) for head in self.heads],
            "default_prompt": self.settings.default_prompt,
            "max_seq_length": self.settings.max_seq_length,
            "lower_case": self.settings.lower_case,
            "truncate_dim": self.settings.truncate_dim,
        }


def _plain_mode(path: Path, config: Any) -> str:
    """The library's rule: the last token of what was made to write on, the mean of all else. A Qwen3 is of the first kind, though
    its config.json may name the bare model: Qwen3-Embedding."""
    writes = config.model_type == "qwen3" or (config.architectures or [""])[0].endswith("ForCausalLM")
    mode = "lasttoken" if writes and getattr(config, "is_causal", True) else "mean"
    log.warning("%s has no modules.json, which says how tokens are pooled: %s", path, _PLAIN[mode])
    return mode


def _modules(path: Path) -> list[Module]:
    """The Transformer, the Pooling and what comes after them, each with its config."""
    rows = read_json(path / "modules.json")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"type", "path"} <= row.keys() for row in rows):
        raise ModelLoadError(f"{path / 'modules.json'} is not a list of modules, each with a type and a path")
    kinds = [_kind(path, str(row["type"])) for row in rows]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= set(HEADS):
        raise ModelLoadError(
            f"{path}: modules.json lists {', '.join(kinds) or 'nothing'}; known are a Transformer, a Pooling, and after them "
            f"any of {', '.join(HEADS)}"
        )
    if len({str(row.get("name")) for row in rows}) < len(rows):
        # The library keeps the last of one name, in the place of the first.
        raise ModelLoadError(f"{path}: modules.json has two modules of one name")
    if rows[0]["path"] not in ("", "."):
        raise ModelLoadError(
            f"{path}: modules.json has the transformer in a folder of its own, {rows[0]['path']!r}; put it beside"
        )
    return [_module(path, kind, str(row["path"])) for kind, row in zip(kinds, rows, strict=True)]


def _kind(path: Path, type_name: str) -> str:
    package, _, kind = type_name.rpartition(".")
    if package.partition(".")[0] != "sentence_transformers":
        raise ModelLoadError(f"{path}: modules.json names {type_name!r}, which is code of the checkpoint's own and is never run")
    return kind


def _module(path: Path, kind: str, folder: str) -> Module:
    inside = path / folder
    if not inside.resolve().is_relative_to(path.resolve()):
        raise ModelLoadError(f"{path}: modules.json names a folder outside, {folder!r}")
    needed = kind in ("Pooling", "Dense", "LayerNorm")
    there = kind != "Transformer" and (needed or (inside / "config.json").exists())
    config = read_object(inside / "config.json") if there else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ModelLoadError(f"{inside}: {key} is {config[key]!r}; known is sentence_embedding alone")
    return Module(kind, inside, config)


def _modes(pooling: Module) -> tuple[str, ...]:
    config = pooling.config
    named = config.get("pooling_mode")
    if named is None:
        modes = tuple(mode for flag, mode in _FLAGS.items() if config.get(flag)) or ("mean",)
    else:
        modes = (named,) if isinstance(named, str) else tuple(named)
    if unknown := set(modes) - set(MODES):
        raise ModelLoadError(f"{pooling.path}: the pooling mode {min(unknown)!r} is not known; known are {', '.join(MODES)}")
    return modes
