"""Weights that are missing, in excess or of another shape are refused in checkpoints of every kind; unused heads are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base import ModelLoadError
from tests.conformance.report import CHECKPOINT
from tests.support.text_checkpoints import write_checkpoint
from tests.support.whole_model import load_model

# A checkpoint, and the name of a weight within its last layer.
LAST = {
    "qwen3_vl": "language_model.layers.3.mlp.down_proj.weight",
    "bert": "layer.2.output.dense.weight",
    "qwen3": "layers.2.mlp.down_proj.weight",
}


@pytest.fixture(params=LAST)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "qwen3_vl":
        return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    return write_checkpoint(tmp_path / "model", request.param)


def kind_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_bytes())["model_type"])


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith(LAST[kind_of(folder)]) and "visual" not in name]
    change(weights, name)
    save_file(weights, file, metadata={"format": "pt"})


def another_layer(weights: dict[str, torch.Tensor], name: str) -> None:
    """Add a copy of the last layer after it."""
    number = next(part for part in name.split(".") if part.isdigit())
    layer, _, _ = name.partition(f".{number}.")
    for old in [old for old in weights if old.startswith(f"{layer}.{number}.")]:
        weights[old.replace(f"{layer}.{number}.", f"{layer}.{int(number) + 1}.", 1)] = weights[old].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda weights, name: weights.pop(name), "1 weights are missing, ", id="missing"),
        pytest.param(
            lambda weights, name: weights.update({name: torch.ones(3, 3)}), "1 weights are of another shape", id="misshapen"
        ),
        pytest.param(another_layer, "weights are of no use to the model that config.json names", id="left over"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, change: Callable[..., object], words: str) -> None:
    edit(folder, change)
    with pytest.raises(ModelLoadError, match=words):
        load_model(folder)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl", "modernbert"])
def test_rope_that_depends_on_the_batch_is_refused(tmp_path: Path, family: str, kind: str) -> None:
    """The angles of every input would depend on the longest one."""
    folder = tmp_path / "model"
    if family == "qwen3_vl":
        shutil.copytree(CHECKPOINT, folder)
    else:
        write_checkpoint(folder, family)
    config = json.loads((folder / "config.json").read_bytes())
    text = config.get("text_config", config)
    found = text["rope_parameters"]
    factors = [1.0] * (6 if family == "modernbert" else 8)
    for one in found.values() if "full_attention" in found else [found]:
        one |= {"rope_type": kind, "factor": 2.0, "short_factor": factors, "long_factor": factors}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=f"where a token stands would depend on the other inputs .*{kind}"):
        load_model(folder)


def test_weights_of_a_head_are_ignored(folder: Path) -> None:
    before = load_model(folder).info
    edit(folder, lambda weights, _: weights.update({"lm_head.weight": torch.ones(3, 3), "cls.predictions.bias": torch.ones(3)}))
    assert load_model(folder).info == before


def test_adapter_is_refused(folder: Path) -> None:
    """Without peft, transformers ignores it; with peft, the packed forward would. The vectors would be those of the bare
    model."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)}))
    with pytest.raises(ModelLoadError, match=r"adapter_config\.json: an adapter is not applied here"):
        load_model(folder)


@pytest.mark.parametrize("part", ["", "text_config"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_weights_that_are_quantised_are_refused(folder: Path, part: str, key: str) -> None:
    """Also if a library that could load them is installed."""
    config = json.loads((folder / "config.json").read_bytes())
    (config.setdefault(part, {}) if part else config)[key] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="its weights are quantised"):
        load_model(folder)
