"""A folder in the layout of sentence-transformers: the modules after the transformer, and its settings.

modules.json lists the modules in order: a Transformer in the folder itself, one Pooling, then any of Dense, LayerNorm, Normalize
and Dropout, each with a config.json of its own. The meaning of every key is the library's. A folder without modules.json is read
as the library reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.base import ModelLoadError
from models.checkpoints.json_files import read_object
from models.checkpoints.modules_json import FILE, LAST_TOKEN, POOLING_MODES, ModuleRow, pooling_modes, read_modules
from models.registry import Family
from models.text_encoder.settings import FolderSettings

POST_POOLING = ("Dense", "LayerNorm", "Normalize", "Dropout")
# Modules that have weights, and so a folder of their own.
WITH_WEIGHTS = ("Dense", "LayerNorm")


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the folder: the name of its class, its own folder, and its config.json, {} if it has none."""

    kind: str
    path: Path
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Folder:
    """`modes` are those of the pooling, joined in their order; `include_prompt` tells whether a prompt's tokens are pooled;
    `post_pooling` are the modules after it; `is_plain` tells that there is no modules.json."""

    modes: tuple[str, ...]
    include_prompt: bool = True
    post_pooling: tuple[Module, ...] = ()
    settings: FolderSettings = field(default_factory=FolderSettings)
    is_plain: bool = False

    @classmethod
    def read(cls, path: Path, config: Any, family: Family) -> Folder:
        """Reads folder `path`; `config` is the transformer's. Raises ModelLoadError for a module that is not known, or settings
        that this server does not follow."""
        rows = read_modules(path)
        if rows is None:
            return cls(modes=(_plain_mode(config, family),), is_plain=True)
        _, pooling, *post_pooling = _modules(path, rows)
        return cls(
            modes=_modes(pooling),
            include_prompt=bool(pooling.config.get("include_prompt", True)),
            post_pooling=tuple(post_pooling),
            settings=FolderSettings.read(path),
        )

    def summary(self) -> dict[str, Any]:
        """Returns all settings that decide a vector, for a fingerprint. A folder's name is none of them."""
        return {
            "modes": self.modes,
            "include_prompt": self.include_prompt,
            "post_pooling": [(module.kind, module.config) for module in self.post_pooling],
            "default_prompt": self.settings.default_prompt,
            "max_seq_length": self.settings.max_seq_length,
            "lower_case": self.settings.lower_case,
            "truncate_dim": self.settings.truncate_dim,
        }


def _plain_mode(config: Any, family: Family) -> str:
    """Returns the pooling of a folder without modules.json, by the library's rule: the last token of a model that was made to
    write, the mean of any other. A causal family was, though its config.json may name the bare model (Qwen3-Embedding)."""
    writes = family.is_causal or (config.architectures or [""])[0].endswith("ForCausalLM")
    return LAST_TOKEN if writes and getattr(config, "is_causal", True) else "mean"


def _modules(path: Path, rows: list[ModuleRow]) -> list[Module]:
    """Returns the Transformer, the Pooling and the modules after them, each with its config. Raises ModelLoadError."""
    for row in rows:
        if row.class_name.partition(".")[0] != "sentence_transformers":
            own = f"{row.class_name!r}, which is code of the checkpoint's own and is never run"
            raise ModelLoadError(f"{path}: {FILE} names {own}")
    kinds = [row.kind for row in rows]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= set(POST_POOLING):
        raise ModelLoadError(
            f"{path}: {FILE} lists {', '.join(kinds) or 'nothing'}; known are a Transformer, a Pooling, and after them "
            f"any of {', '.join(POST_POOLING)}"
        )
    if len({row.name for row in rows}) < len(rows):
        # The library keeps the last of one name, in the place of the first.
        raise ModelLoadError(f"{path}: {FILE} has two modules of one name")
    if rows[0].folder not in ("", "."):
        raise ModelLoadError(f"{path}: {FILE} has the transformer in a folder of its own, {rows[0].folder!r}; put it beside")
    return [_module(path, row) for row in rows]


def _module(path: Path, row: ModuleRow) -> Module:
    """Reads a module's config. Raises ModelLoadError."""
    inside = path / row.folder
    if not inside.resolve().is_relative_to(path.resolve()):
        raise ModelLoadError(f"{path}: {FILE} names a folder outside, {row.folder!r}")
    needed = row.kind in ("Pooling", *WITH_WEIGHTS)
    has_config = row.kind != "Transformer" and (needed or (inside / "config.json").exists())
    config = read_object(inside / "config.json") if has_config else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ModelLoadError(f"{inside}: {key} is {config[key]!r}; known is sentence_embedding alone")
    return Module(row.kind, inside, config)


def _modes(pooling: Module) -> tuple[str, ...]:
    """Returns a Pooling's modes. Raises ModelLoadError for one that is not known."""
    modes = pooling_modes(pooling.config)
    if unknown := set(modes) - set(POOLING_MODES):
        known = ", ".join(POOLING_MODES)
        raise ModelLoadError(f"{pooling.path}: the pooling mode {min(unknown)!r} is not known; known are {known}")
    return modes
