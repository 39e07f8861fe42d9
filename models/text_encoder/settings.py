"""The settings in a folder of sentence-transformers, besides its modules: of the transformer, of prompts, of the vectors' width.

A setting that would change a vector and is not followed here is refused. The meaning of every key is the library's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import ModelLoadError
from models.checkpoints.json_files import read_object

# Files of the transformer's own settings; older folders name them after the architecture. The first that is not empty counts.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Keys of arguments that change no vector, or that this server's own settings decide: of downloads, of the model, of the
# tokenizer.
_LOADING = {"trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder"}
_MODEL = {"torch_dtype", "dtype", "attn_implementation", "device_map", "use_safetensors", "add_pooling_layer"}
_TOKENIZER = {"model_max_length", "padding_side", "use_fast"}
# Arguments that the library passes on, each under its old name and today's, and the keys of them that are accepted.
_ACCEPTED_ARGUMENTS = {
    **dict.fromkeys(("model_args", "model_kwargs"), _LOADING | _MODEL),
    **dict.fromkeys(("tokenizer_args", "processor_kwargs"), _LOADING | _TOKENIZER),
    **dict.fromkeys(("config_args", "config_kwargs"), _LOADING | {"use_cache"}),
}
# Settings that are accepted with one value alone.
_REQUIRED_VALUES: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "processing_kwargs": {},
}
# Settings that are accepted with any value: they are read below, or are of queries and documents, which the library's `encode`
# does not tell apart.
_ACCEPTED_SETTINGS = {"max_seq_length", "do_lower_case", "unpad_inputs", "query_length", "document_length", "query_expansion"}
# The library's class of dense vectors, which a folder is that names none.
_MODEL_TYPE = "SentenceTransformer"
# Prompts that every model of the library has, empty unless the folder fills them.
_PROMPTS = ("query", "document")


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """`prompts` are pairs of name and text; `max_seq_length` counts special tokens; it and `truncate_dim` are None if the folder
    sets none."""

    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str = ""
    max_seq_length: int | None = None
    lower_case: bool = False
    truncate_dim: int | None = None

    @classmethod
    def read(cls, path: Path) -> FolderSettings:
        """Reads the settings in folder `path`. Raises ModelLoadError for those that this server does not follow."""
        transformer = _transformer(path)
        file = path / "config_sentence_transformers.json"
        config = read_object(file) if file.exists() else {}
        if (kind := config.get("model_type", _MODEL_TYPE)) != _MODEL_TYPE:
            # The library would take the transformer alone, and a pooling that the folder does not name.
            raise ModelLoadError(f"{file}: model_type is {kind}, known is {_MODEL_TYPE} alone")
        cut = config.get("truncate_dim")
        if cut is not None and (type(cut) is not int or cut < 1):
            raise ModelLoadError(f"{file}: truncate_dim is {cut!r}, which is no number of components")
        prompts = {str(name): str(text or "") for name, text in (config.get("prompts") or {}).items()}
        default = config.get("default_prompt_name")
        if default is not None and default not in {*prompts, *_PROMPTS}:
            raise ModelLoadError(f"{file}: default_prompt_name is {default!r}, which is none of its prompts")
        return cls(
            prompts=tuple(prompts.items()),
            default_prompt=prompts.get(str(default), ""),
            max_seq_length=transformer.get("max_seq_length"),
            lower_case=bool(transformer.get("do_lower_case", False)),
            truncate_dim=cut,
        )


def _transformer(path: Path) -> dict[str, Any]:
    """Returns the transformer's settings, with the `max_seq_length` of the tokenizer's arguments if they have one. Raises
    ModelLoadError."""
    files = (path / name for name in _TRANSFORMER_CONFIGS)
    file, found = next(((file, read) for file in files if file.exists() and (read := read_object(file))), (path, {}))
    for key, value in found.items():
        if key in _ACCEPTED_ARGUMENTS:
            strange = sorted(set(value or {}) - _ACCEPTED_ARGUMENTS[key])
        elif key in _REQUIRED_VALUES:
            strange = [] if value in (None, _REQUIRED_VALUES[key]) else [str(value)]
        else:
            strange = [] if key in _ACCEPTED_SETTINGS else [str(value)]
        if strange:
            raise ModelLoadError(f"{file}: {key} has {', '.join(strange)[:200]}, which this server does not follow")
    # As in the library, the old name goes before today's, and the argument before the setting, whatever its value.
    arguments = found.get("tokenizer_args" if "tokenizer_args" in found else "processor_kwargs") or {}
    longest = arguments.get("model_max_length", found.get("max_seq_length"))
    if "model_max_length" in arguments and not longest:
        raise ModelLoadError(f"{file}: model_max_length is {longest!r}, which takes every limit away")
    return {**found, "max_seq_length": longest}
