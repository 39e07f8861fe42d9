"""The fingerprint: all that decides a vector changes it, and nothing else does; no weight is loaded for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base import ModelLoadError
from models.checkpoints.demo import OTHER, write_demo_checkpoint
from models.checkpoints.fingerprint import SAMPLES, fingerprint
from models.checkpoints.weights import StoredTensor, stored_tensors
from models.registry import load_preparer
from tests.support.paths import CHECKPOINT
from tests.support.vl_checkpoints import Edit, config_part, copied, edit_json, edit_weights, image_processor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fingerprint_of(path: Path, **options: Any) -> str:
    """Returns the fingerprint of a checkpoint, as its Preparer has it."""
    defaults = {"device": "cpu", "dtype": "float32", "max_image_width": 512, "max_image_height": 512, "allow_pickle": False}
    return load_preparer(path, **{**defaults, **options}).info.fingerprint


def of_weights(path: Path, weights: dict[str, torch.Tensor], **settings: Any) -> str:
    """Writes weights to a folder of their own, and returns its fingerprint."""
    path.mkdir(exist_ok=True)
    save_file(weights, path / "model.safetensors")
    return fingerprint(path, stored_tensors(path, allow_pickle=False), settings)


def add_a_grain(name: str) -> Edit:
    """Changes one value that is not among the samples of its tensor."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        (found,) = [key for key in weights if key.endswith(name)]
        weights[found].view(-1)[1] += 2**-12

    return lambda path: edit_weights(path, edit)


def add_heads(path: Path) -> None:
    edit_weights(path, lambda weights: weights.update({"lm_head.weight": torch.ones(3, 3), "score.weight": torch.ones(3)}))


def shard(path: Path) -> None:
    """Spreads the weights over two files, in an order of their own."""
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    halves = {"b.safetensors": sorted(weights)[::2], "a.safetensors": sorted(weights)[1::2]}
    for file, names in halves.items():
        save_file({name: weights[name] for name in names[::-1]}, path / file, metadata={"format": "pt"})
    index = {name: file for file, names in halves.items() for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def pickle_weights(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


TEMPLATE = (CHECKPOINT / "chat_template.jinja").read_text()
CHANGES: dict[str, tuple[Edit, dict[str, Any], bool]] = {
    "nothing": (lambda path: None, {}, False),
    "a value of the embedding": (add_a_grain("embed_tokens.weight"), {}, True),
    "a value of the vision tower": (add_a_grain("visual.blocks.2.mlp.linear_fc1.bias"), {}, True),
    "template": (lambda path: (path / "chat_template.jinja").write_text(TEMPLATE + "a"), {}, True),
    "tokenizer": (lambda path: edit_json(path / "tokenizer.json", lambda c: c.update(post_processor=None)), {}, True),
    "image processor": (image_processor(image_mean=[0.4, 0.5, 0.5]), {}, True),
    "config": (config_part("text_config", rms_norm_eps=1e-5), {}, True),
    "a note beside it": (lambda path: (path / "README.md").write_text("a"), {}, False),
    "heads": (add_heads, {}, False),
    "shards": (shard, {}, False),
    "pickled": (pickle_weights, {"allow_pickle": True}, False),
    "dtype": (lambda path: None, {"dtype": "bfloat16"}, True),
    "width of images": (lambda path: None, {"max_image_width": 511}, True),
    "height of images": (lambda path: None, {"max_image_height": 0}, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with_what_decides_a_vector(tmp_path: Path, change: str) -> None:
    edit, settings, differs = CHANGES[change]
    path = copied(tmp_path)
    edit(path)
    assert (fingerprint_of(path, **settings) != fingerprint_of(CHECKPOINT)) is differs


def test_fingerprint_differs_for_two_seeds_of_one_shape(tmp_path: Path) -> None:
    for seed in (3, 4):
        write_demo_checkpoint(tmp_path / str(seed), seed=seed, shape=OTHER)
    assert fingerprint_of(tmp_path / "3") != fingerprint_of(tmp_path / "4")


@pytest.fixture
def thread_count() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fingerprint_is_the_same_on_another_number_of_cores(
    tmp_path: Path, thread_count: Callable[[int], None], dtype: torch.dtype
) -> None:
    weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"weight": weights}, tmp_path / "model.safetensors")
    seen = set()
    for threads in (1, 2, 3, 4, 8):
        thread_count(threads)
        seen.add(fingerprint(tmp_path, stored_tensors(tmp_path, allow_pickle=False), {}))
    assert len(seen) == 1


def test_fingerprint_sees_names_shapes_dtypes_and_every_value(tmp_path: Path) -> None:
    weights = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    changed = weights.clone()
    changed[150, 55] += 1e-6
    states = [
        {"a": weights},
        {"b": weights},
        {"a": weights, "b": weights.clone()},
        {"a": weights.reshape(100, 300)},
        {"a": weights.T.contiguous()},
        {"a": weights.view(torch.int32)},
        {"a": changed},
        {"a": -weights},
    ]
    assert len({of_weights(tmp_path / str(index), state) for index, state in enumerate(states)}) == len(states)
    assert of_weights(tmp_path / "0", {"a": weights}) == of_weights(tmp_path / "again", {"a": weights.clone()})
    assert of_weights(tmp_path / "0", {"a": weights}, dtype="x") != of_weights(tmp_path / "0", {"a": weights}, dtype="y")


@pytest.mark.parametrize("count", [1, 3, 7, 4 * SAMPLES + 3])
def test_fingerprint_sees_every_byte(tmp_path: Path, count: int) -> None:
    """Of tensors of any size, of which the last bytes are no whole word."""
    data = np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8)

    def of(content: np.ndarray) -> str:
        return fingerprint(tmp_path, [StoredTensor("a", "U8", content.shape, content)], {})

    for place in range(count) if count < 100 else (1, count // 2, count - 4, count - 1):
        changed = data.copy()
        changed[place] ^= 1
        assert of(changed) != of(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_stored_tensors_of_a_pickle_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of any shape, also where the pickled tensor is a view of a larger one."""
    state = {"matrix": torch.ones(3, 5).to(dtype), "number": torch.tensor(1).to(dtype), "none": torch.empty(0, 4).to(dtype)}
    state["columns"] = torch.arange(6).reshape(2, 3).to(dtype).T
    for kind in ("new", "old", "safe"):
        (tmp_path / kind).mkdir()
    for kind in ("new", "old"):
        torch.save(state, tmp_path / kind / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "new")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "safe" / "model.safetensors")
    new, old, safe = (
        sorted((one.name, one.dtype, one.shape, one.data.tobytes()) for one in stored_tensors(tmp_path / kind, allow_pickle=True))
        for kind in ("new", "old", "safe")
    )
    assert new == old == safe


def test_stored_tensors_are_read_only_views_of_the_file() -> None:
    weights = load_file(CHECKPOINT / "model.safetensors")
    found = {tensor.name: tensor for tensor in stored_tensors(CHECKPOINT, allow_pickle=False)}
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert tensor.shape == tuple(weights[name].shape)
        assert not tensor.data.flags.writeable and not tensor.data.flags.owndata
        assert tensor.data.tobytes() == weights[name].numpy().tobytes()


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut off, or not safetensors"),
    "no safetensors": (b"version https://git-lfs", "cut off, or not safetensors"),
    "half": ((CHECKPOINT / "model.safetensors").read_bytes()[:100_000], "is cut off"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_stored_tensors_of_a_broken_file_are_refused(tmp_path: Path, kind: str) -> None:
    content, words = BROKEN[kind]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list(stored_tensors(tmp_path, allow_pickle=False))


def test_stored_tensors_that_are_pickled_are_read_only_if_allowed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"the weights are pickled .* ALLOW_PICKLE=true"):
        list(stored_tensors(tmp_path, allow_pickle=False))
    with pytest.raises(ModelLoadError, match="are missing"):
        list(stored_tensors(tmp_path / "nothing", allow_pickle=True))
