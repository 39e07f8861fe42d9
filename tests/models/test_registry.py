"""The two halves of a checkpoint, each loaded without the other: inputs without weights, and weights without a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

from models.base import EmbeddingInput, PreparedInput
from models.registry import FAMILIES, load_checkpoint, load_model, load_preparer, named
from tests.support import text_checkpoints
from tests.support.modules import of, reached
from tests.support.paths import CHECKPOINT
from tests.support.text_checkpoints import WIDTH, dense, write_checkpoint

PREPARER: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_image_width": 512, "max_image_height": 512, "allow_pickle": False
}  # fmt: skip
MODEL: dict[str, Any] = {"device": "cpu", "dtype": "float32", "allow_pickle": False}
ITEMS = [EmbeddingInput(("a dog on the beach",)), EmbeddingInput(("music and rain",), "find the river: "), EmbeddingInput(("",))]
PICTURE = EmbeddingInput((Image.new("RGB", (70, 50), "blue"), "a boat"))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each type; a text model's has a dense layer, whose weights lie in a file of their own."""
    if request.param == "qwen3_vl":
        return CHECKPOINT
    return write_checkpoint(tmp_path_factory.mktemp("halves") / request.param, request.param, heads=[dense(WIDTH, 20)])


def items_of(folder: Path) -> list[EmbeddingInput]:
    return [*ITEMS, PICTURE] if folder == CHECKPOINT else ITEMS


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("this is not to be called")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a module nor a parameter of torch can be made, no weight loaded, and CUDA not be used."""
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", forbidden)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", forbidden)
    monkeypatch.setattr(torch.nn.Module, "__init__", forbidden)
    monkeypatch.setattr(torch.nn.Parameter, "__new__", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(safetensors.torch, "load_file", forbidden)
    monkeypatch.setattr(safetensors, "safe_open", forbidden)
    monkeypatch.setattr(torch.cuda, "_lazy_init", forbidden)
    monkeypatch.setattr(torch.cuda, "set_device", forbidden)


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[Any, list[PreparedInput]]:
    """Info and inputs of a checkpoint that is loaded whole."""
    loaded = load_checkpoint(folder, **PREPARER)
    return loaded.preparer.info, [loaded.preparer.prepare(item) for item in items_of(folder)]


@pytest.mark.usefixtures("no_weights")
def test_load_preparer_needs_no_weights_and_no_device(folder: Path, expected: tuple[Any, list[PreparedInput]]) -> None:
    info, inputs = expected
    preparer = load_preparer(folder, **PREPARER)
    assert preparer.info == info
    found = preparer.prepare_all(items_of(folder))
    for one, other in zip(found, inputs, strict=True):
        assert isinstance(one, PreparedInput)
        assert one.content_hash == other.content_hash
        assert (one.truncated, one.prefix_tokens) == (other.truncated, other.prefix_tokens)


@pytest.mark.usefixtures("no_weights")
def test_load_preparer_asks_only_whether_there_is_a_cuda_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of a device that another process uses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    info = load_preparer(folder, **{**PREPARER, "device": "cuda:1", "dtype": "bfloat16"}).info
    assert (info.device, info.dtype, info.cuda_available) == ("cuda:1", "bfloat16", True)


def test_load_model_needs_no_tokenizer(folder: Path, expected: tuple[Any, list[PreparedInput]], tmp_path: Path) -> None:
    """A replica's folder: weights, config.json, and the settings of images and modules."""
    bare = tmp_path / "bare"
    ignored = shutil.ignore_patterns("tokenizer*", "chat_template*", "vocab*", "merges*", "special_tokens_map*")
    shutil.copytree(folder, bare, ignore=ignored)
    assert not list(bare.glob("tokenizer*"))
    inputs = expected[1]
    model = load_model(bare, **MODEL)
    assert model.device == "cpu"
    assert np.array_equal(model.embed(inputs), load_checkpoint(folder, **PREPARER).model.embed(inputs))
    assert model.warm_up() > 0


def test_load_model_holds_nothing_of_the_preparer(folder: Path) -> None:
    model = load_model(folder, **MODEL)
    assert not hasattr(model, "prepare") and not hasattr(model, "info")
    assert not hasattr(load_preparer(folder, **PREPARER), "embed")


def test_family_rows_name_what_there_is() -> None:
    fields = [(family, name) for family in FAMILIES.values() for name in (family.preparer, family.model, family.encoder)]
    assert all(callable(named(name)) for _, name in fields if name)
    text = {name for name, family in FAMILIES.items() if "text_encoder" in family.model}
    assert text == set(text_checkpoints.FAMILIES)
    assert all(family.encoder or family.is_causal for name, family in FAMILIES.items() if name in text), "packed, each of them"


def test_family_preparers_reach_no_forward() -> None:
    """Neither do the models reach what prepares."""
    for family in set(FAMILIES.values()):
        preparer, model = (reached(name.partition(":")[0]) for name in (family.preparer, family.model))
        for name in ("models.packed", "models.base_model", "models.checkpoints.pretrained", family.model.partition(":")[0]):
            assert not of(name, preparer), name
        for name in ("models.tokenizer", "models.base_preparer", family.preparer.partition(":")[0]):
            assert not of(name, model), name


def test_family_is_imported_only_when_it_is_chosen() -> None:
    loaded = reached("models.registry")
    assert not any(of(name, loaded) for name in ("torch", "models.qwen3_vl", "models.text_encoder"))
