"""Checkpoints of Qwen3-VL that are broken, or ask for what is not done here: one clear line each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.base import DeviceUnavailable, EmbeddingInput, ModelLoadError
from tests.support.paths import CHECKPOINT
from tests.support.vl_checkpoints import config, config_part, copied, edit_json, edit_weights, image_processor
from tests.support.whole_model import WholeModel, load_model


def drop(name: str) -> Callable[[Path], object]:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        (found,) = [key for key in weights if key.endswith(name)]
        del weights[found]

    return lambda path: edit_weights(path, edit)


def reshape(name: str) -> Callable[[Path], object]:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        (found,) = [key for key in weights if key.endswith(name)]
        weights[found] = weights[found][:-1].clone()

    return lambda path: edit_weights(path, edit)


def cut_short(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def strip(token: str) -> Callable[[Path], object]:
    def edit(content: Any) -> None:
        (found,) = [added for added in content["added_tokens"] if added["content"] == token]
        found["rstrip"] = True

    return lambda path: edit_json(path / "tokenizer.json", edit)


def template(old: str, new: str) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        file = path / "chat_template.jinja"
        file.write_text(file.read_text().replace("{{- " + old, "{{- " + new))

    return edit


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight of the text model": (drop("language_model.layers.1.mlp.up_proj.weight"), "1 weights are missing.*up_proj"),
    "the embedding": (drop("language_model.embed_tokens.weight"), "missing.*embed_tokens"),
    "the last norm": (drop("language_model.norm.weight"), "missing"),
    "a weight of the vision tower": (drop("visual.blocks.0.attn.qkv.bias"), "missing.*qkv"),
    "a weight of another shape": (
        reshape("language_model.layers.0.mlp.up_proj.weight"),
        "of another shape.*layers.0.mlp.up_proj",
    ),
    "half the weights' bytes": (cut_short, "cannot be loaded"),
    "weights that are no weights": (
        lambda path: (path / "model.safetensors").write_bytes(b"version https://git-lfs\n"),
        "cannot be",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"the weights \(model.safetensors\) are missing"),
    "no config.json": (lambda path: (path / "config.json").unlink(), "no readable config.json"),
    "config.json cut short": (lambda path: (path / "config.json").write_text('{"model_type": "qwen3'), "no readable config.json"),
    "config.json in no encoding": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\xff"), "no readable config.json"),
    "config.json is a list": (lambda path: (path / "config.json").write_text("[]"), "no readable config.json"),
    "no model_type": (lambda path: edit_json(path / "config.json", lambda c: c.pop("model_type")), "no readable config.json"),
    "another model_type": (config(model_type="t5"), r"'t5' is not known; known are: bert, .*qwen3_vl"),
    "a model_type that is a list": (config(model_type=["qwen3_vl"]), "cannot be loaded"),
    "another patch size": (image_processor(patch_size=14), "processor's patch_size is 14, but config.json says 16"),
    "another merge size": (image_processor(merge_size=4), "processor's merge_size is 4, but config.json says 2"),
    "another temporal patch size": (image_processor(temporal_patch_size=1), "temporal_patch_size is 1, but config.json says 2"),
    "another image token": (config(image_token_id=413), "image_token_id is 412, but config.json says 413"),
    "pixels that are not normalised": (image_processor(do_normalize=False), "image processor makes other values"),
    "pixels that are not rescaled": (image_processor(do_rescale=False), "image processor makes other values"),
    "one mean for all channels": (image_processor(image_mean=[0.4]), "image processor makes other values"),
    "a merge size that the official code does not know": (
        lambda path: (config_part("vision_config", spatial_merge_size=1)(path), image_processor(merge_size=1)(path)),
        "spatial_merge_size is 1",
    ),
    "tokens that see what comes": (config_part("text_config", is_causal=False), "is_causal"),
    "a layer twice in deepstack": (config_part("vision_config", deepstack_visual_indexes=[1, 1, 2]), "name a layer twice"),
    "special tokens that are split": (
        lambda path: edit_json(path / "tokenizer_config.json", lambda c: c.update(split_special_tokens=True)),
        "split_special_tokens",
    ),
    "a special token that takes in the line's end": (strip("<|im_end|>"), r"takes in what is beside it: <\|im_end\|>"),
    "a template that trims": (template("part.text", "part.text | trim"), "does not leave texts as they are"),
    "a template that escapes": (template("part.text", "part.text | e"), "does not leave texts as they are"),
    "a template that cuts": (template("part.text", "part.text[:5000]"), "does not leave texts as they are"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "cannot be loaded"),
    "no template": (lambda path: (path / "chat_template.jinja").unlink(), "cannot be loaded"),
    "a template with an error": (lambda path: (path / "chat_template.jinja").write_text("{% for %}"), "cannot be loaded"),
    "a template without the user": (lambda path: (path / "chat_template.jinja").write_text("a"), "chat template"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_checkpoint_is_refused_in_one_clear_line(tmp_path: Path, fault: str) -> None:
    path = copied(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(path)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_broken_checkpoint_was_whole_before(tmp_path: Path) -> None:
    assert load_model(copied(tmp_path)).info.width == 64


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no readable config\.json"):
        load_model(tmp_path / "nothing")


def test_pickle_is_loaded_only_if_it_is_allowed(tmp_path: Path, mini: WholeModel) -> None:
    path = copied(tmp_path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError):
        load_model(path)
    pickled = load_model(path, allow_pickle=True)
    item = mini.prepare(EmbeddingInput(("a",)))
    # Not to the bit: where a weight lies in memory decides how a product rounds.
    np.testing.assert_allclose(pickled.embed([item]), mini.embed([item]), atol=1e-6)


def test_pickle_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = copied(tmp_path)
    (path / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        load_model(path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_device_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="DEVICE=cpu"):
        load_model(CHECKPOINT, device="cuda")


def with_modules(path: Path, pooling: dict[str, Any], *more: str) -> Path:
    """The checkpoint as sentence-transformers has it."""
    shutil.copytree(CHECKPOINT, path)
    kinds = ("Transformer", "Pooling", *more, "Normalize")
    rows = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(rows))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
    return path


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode": "lasttoken"}, {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}]
)
def test_modules_json_that_asks_for_the_last_token_changes_nothing(tmp_path: Path, pooling: dict[str, Any]) -> None:
    """The folder is the checkpoint, and its vectors are."""
    found, plain = load_model(with_modules(tmp_path / "model", pooling)), load_model(CHECKPOINT)
    rows = [model.embed([model.prepare(EmbeddingInput(("a dog",)))]) for model in (found, plain)]
    assert np.array_equal(*rows)


@pytest.mark.parametrize(
    ("pooling", "more", "words"),
    [
        ({"pooling_mode": "mean"}, [], "asks for mean pooling"),
        ({"pooling_mode": ["lasttoken", "cls"]}, [], "asks for cls, lasttoken pooling"),
        ({"pooling_mode_mean_tokens": True}, [], "asks for mean pooling"),
        ({}, [], "asks for mean pooling"),
        ({"pooling_mode": "lasttoken"}, ["Dense"], "has a Dense"),
    ],
)
def test_modules_json_that_asks_for_more_is_refused(tmp_path: Path, pooling: dict[str, Any], more: list[str], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        load_model(with_modules(tmp_path / "model", pooling, *more))
