"""Loads a checkpoint, or one half of it, by the `model_type` of its config.json: FAMILIES has a row for each type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from models.base import EmbeddingModel, ImageLimits, LoadedModel, ModelLoadError, Preparer


@dataclass(frozen=True, slots=True)
class Family:
    """The code of one `model_type`, named as "module:name": it is imported only when a checkpoint of the type is loaded, since it
    brings libraries of its own.

    `preparer` and `model` are the classes of the two halves. The other fields tell types of text apart:
    `encoder` is the class of the packed forward, if tokens see all of their sequence. `is_causal` tells that a token sees none
    after it, unless config.json says otherwise; the packed forward is then models/packed/decoder.py. A type with neither is run
    by transformers' own modules. `instruction` is a function that turns an instruction into what stands before the text; without
    one, the instruction itself stands there.
    """

    preparer: str
    model: str
    encoder: str = ""
    is_causal: bool = False
    instruction: str = ""


def _text(encoder: str = "", *, is_causal: bool = False, instruction: str = "") -> Family:
    return Family(
        "models.text_encoder.preparer:TextPreparer", "models.text_encoder.model:TextEmbedding", encoder, is_causal, instruction
    )


_BERT = _text("models.text_encoder.bert:BertEncoder")
FAMILIES = {
    "bert": _BERT,
    "distilbert": _BERT,
    "modernbert": _text("models.text_encoder.modernbert:ModernBertEncoder"),
    "mpnet": _BERT,
    "qwen3": _text(is_causal=True, instruction="models.text_encoder.prompt:instruct"),
    "qwen3_vl": Family("models.qwen3_vl.preparer:Qwen3VLPreparer", "models.qwen3_vl.model:Qwen3VLEmbedding"),
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}


def load_checkpoint(
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
    """Loads both halves of the checkpoint in folder `path`; the arguments are those of `load_preparer` and `load_model`. Raises
    ModelLoadError, whatever is wrong with the checkpoint."""
    limits = {"max_image_width": max_image_width, "max_image_height": max_image_height}
    preparer = load_preparer(path, device=device, dtype=dtype, allow_pickle=allow_pickle, **limits)
    model = load_model(path, device=device, dtype=dtype, allow_pickle=allow_pickle, backend=backend, compile=compile)
    return LoadedModel(preparer, model)


def load_preparer(
    path: Path, *, device: str, dtype: str, max_image_width: int, max_image_height: int, allow_pickle: bool
) -> Preparer:
    """Loads what prepares inputs for the checkpoint in folder `path`. No weight is loaded, and nothing is put on a device.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`, and `dtype` `auto` or a torch dtype's name, both of the model that the inputs
    are for; image limits are in pixels, 0 for none; `allow_pickle` lets pickled weights be looked at, for the fingerprint.

    Raises ModelLoadError, whatever is wrong with the checkpoint.
    """
    with _load_errors(path):
        family = _family(path)
        limits = ImageLimits(max_image_width, max_image_height)
        preparer: Preparer = named(family.preparer)(
            path, family, device=_device(device), dtype=dtype, limits=limits, allow_pickle=allow_pickle
        )
        return preparer


def load_model(
    path: Path, *, device: str, dtype: str, allow_pickle: bool, backend: str = "packed", compile: str = "auto"
) -> EmbeddingModel:
    """Loads the weights of the checkpoint in folder `path`. Neither tokenizer nor chat template is needed.

    `device` and `dtype` are as in `load_preparer`. `backend` is `packed`, or `reference` for transformers' own forward. `compile`
    tells what the warm-up of a decoder does on CUDA: `auto` compiles layers and captures graphs, `layers` compiles alone, which
    only the benchmark asks for, `off` does neither.

    Raises ModelLoadError, whatever is wrong with the checkpoint.
    """
    with _load_errors(path):
        family = _family(path)
        model: EmbeddingModel = named(family.model)(
            path, family, device=_device(device), dtype=dtype, backend=backend, compile=compile, allow_pickle=allow_pickle
        )
        return model


def named(name: str) -> Any:
    """Imports what a field of Family names, as "module:name"."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _device(setting: str) -> str:
    """Returns DEVICE as a torch device. Raises DeviceUnavailable."""
    from models import devices

    return devices.resolve_device(setting)


@contextmanager
def _load_errors(path: Path) -> Iterator[None]:
    """Keeps transformers quiet, and turns every error into a ModelLoadError of one line."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{path}: the checkpoint cannot be loaded ({type(error).__name__}: {_one_line(error)})") from error


def _family(path: Path) -> Family:
    """Returns the row of a checkpoint's type. Raises ModelLoadError if it has none."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path}: no readable config.json with a model_type ({type(error).__name__})") from None
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if config.get("auto_map"):
        raise ModelLoadError(
            f"{path}: model_type {model_type!r} is code that lies in the checkpoint (auto_map), which is never run; known "
            f"are: {known}"
        )
    raise ModelLoadError(f"{path}: model_type {model_type!r} is not known; known are: {known}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
