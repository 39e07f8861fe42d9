"""What the files of sentence-transformers say besides modules: of the transformer, of prompts, of the vectors' width.

What would change a vector and is not followed here is refused. The meaning of every key is that of the library of that name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import ModelLoadError

# The transformer's own settings; the names of old are those of the architecture. The first that says anything counts.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Where a file comes from, and how it is loaded: of no consequence for a vector, or for this server to say.
_LOADING = {"trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder"}
_MODEL = {"torch_dtype", "dtype", "attn_implementation", "device_map", "use_safetensors", "add_pooling_layer"}
_TOKENIZER = {"model_max_length", "padding_side", "use_fast"}
# Arguments that the library passes on, each under its name of old and of today; what is not among these is refused.
_PASSED_ON = {
    **dict.fromkeys(("model_args", "model_kwargs"), _LOADING | _MODEL),
    **dict.fromkeys(("tokenizer_args", "processor_kwargs"), _LOADING | _TOKENIZER),
    **dict.fromkeys(("config_args", "config_kwargs"), _LOADING | {"use_cache"}),
}
# The one value of a setting that this server knows.
_KNOWN: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "processing_kwargs": {},
}
# Read below; or of queries and documents, which the library's `encode` does not tell apart.
_NO_MATTER = {"max_seq_length", "do_lower_case", "unpad_inputs", "query_length", "document_length", "query_expansion"}
# Of the library's classes, that of dense vectors: what a folder is that names none.
_MODEL_TYPE = "SentenceTransformer"
# Prompts that every model of the library has, empty unless the folder fills them.
_PROMPTS = ("query", "document")


@dataclass(frozen=True, slots=True)
class Settings:
    """`prompts` by name; `max_seq_length` counts special tokens; it, and `truncate_dim`, are None where the folder sets none."""

    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str = ""
    max_seq_length: int | None = None
    lower_case: bool = False
    truncate_dim: int | None = None

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Raises ModelLoadError for settings that this server does not follow."""
        transformer = _transformer(path)
        file = path / "config_sentence_transformers.json"
        config = read_object(file) if file.exists() else {}
        if (kind := config.get("model_type", _MODEL_TYPE)) != _MODEL_TYPE:
            # Of another the library takes the transformer alone, and a pooling that the folder does not name.
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
    """The transformer's settings, `max_seq_length` as the tokenizer's arguments have it where they do."""
    files = (path / name for name in _TRANSFORMER_CONFIGS)
    file, found = next(((file, read) for file in files if file.exists() and (read := read_object(file))), (path, {}))
    for key, value in found.items():
        if key in _PASSED_ON:
            strange = sorted(set(value or {}) - _PASSED_ON[key])
        elif key in _KNOWN:
            strange = [] if value in (None, _KNOWN[key]) else [str(value)]
        else:
            strange = [] if key in _NO_MATTER else [str(value)]
        if strange:
            raise ModelLoadError(f"{file}: {key} has {', '.join(strange)[:200]}, which this server does not follow")
    # As the library has it: the name of old goes before today's, and the argument before the setting, whatever it says.
    arguments = found.get("tokenizer_args" if "tokenizer_args" in found else "processor_kwargs") or {}
    longest = arguments.get("model_max_length", found.get("max_seq_length"))
    if "model_max_length" in arguments and not longest:
        raise ModelLoadError(f"{file}: model_max_length is {longest!r}, which takes every limit away")
    return {**found, "max_seq_length": longest}


def read_json(file: Path) -> Any:
    """Raises ModelLoadError."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} cannot be read ({type(error).__name__})") from None


def read_object(file: Path) -> dict[str, Any]:
    """Raises ModelLoadError."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise ModelLoadError(f"{file} holds no JSON object")
    return found
