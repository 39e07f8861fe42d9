"""The adapter behind the seam: loading, counting, refusing, order of rows; and the small modules that it stands on."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import devices, rates
from models.base import (
    DeviceLost,
    DeviceUnavailable,
    EmbeddingInput,
    EmbeddingModel,
    InputTooLong,
    InvalidInput,
    ModelLoadError,
    OutOfDeviceMemory,
    PreparedInput,
    Refusal,
)
from models.checkpoints.demo import OTHER, write_demo_checkpoint
from models.checkpoints.fingerprint import fingerprint
from models.vectors import normalize, to_dimension
from tests.conformance.report import CHECKPOINT
from tests.support.oracle import Oracle, cosines
from tests.support.whole_model import load_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(path: Path, **changes: Any) -> EmbeddingModel:
    settings: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_image_width": 512, "max_image_height": 512, "allow_pickle": False
    }  # fmt: skip
    return load_model(path, **{**settings, **changes})


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "other"
    write_demo_checkpoint(path, seed=3, shape=OTHER)
    return path


@pytest.fixture(scope="module")
def other(other_path: Path) -> EmbeddingModel:
    return load(other_path)


@pytest.fixture(scope="module")
def mini() -> EmbeddingModel:
    return load(CHECKPOINT)


@pytest.fixture(scope="module", params=["mini", "other"])
def model(request: pytest.FixtureRequest) -> EmbeddingModel:
    found: EmbeddingModel = request.getfixturevalue(request.param)
    return found


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mixed() -> list[EmbeddingInput]:
    """Inputs of every kind, short and long, more than one group of them."""
    words = ["the", "river", "runs", "through", "the", "old", "town", "and", "then", "out", "to", "the", "sea"]
    texts = [EmbeddingInput((" ".join(words[i % 7 :] * (1 + i % 5)) + str(i),)) for i in range(28)]
    images = [EmbeddingInput((noise(40 + 30 * i, 200 - 20 * i),)) for i in range(5)]
    fused = [EmbeddingInput((noise(64, 32 + 32 * i), f"picture {i}"), instruction=f"Find {i}") for i in range(4)]
    pairs = [EmbeddingInput((noise(64, 96), "and", noise(96 + 32 * i, 64))) for i in range(3)]
    return texts + images + fused + pairs


# --------------------------------------------------------------------------------------------------------------------
# What a loaded model is
# --------------------------------------------------------------------------------------------------------------------


def test_info(model: EmbeddingModel) -> None:
    info = model.info
    assert (info.model_type, info.width, info.max_tokens, info.device, info.dtype) == ("qwen3_vl", 64, 32768, "cpu", "float32")
    assert info.supports_images
    assert re.fullmatch("[0-9a-f]{16}", info.fingerprint)
    assert model.memory_bytes() == 0


def test_dtype_of_the_weights() -> None:
    half = load(CHECKPOINT, dtype="bfloat16")
    assert half.info.dtype == "bfloat16"
    row = half.embed([half.prepare(EmbeddingInput(("a",)))])
    assert row.dtype == np.float32
    assert abs(np.linalg.norm(row) - 1) < 1e-5, "normalised after it is float32"


def test_auto_keeps_a_float32_checkpoint() -> None:
    assert load(CHECKPOINT, dtype="auto").info.dtype == "float32"


def test_warm_up_measures_a_rate(mini: EmbeddingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "ENOUGH_SECONDS", 0.01)
    assert 1 < mini.warm_up() < math.inf


# --------------------------------------------------------------------------------------------------------------------
# prepare and describe
# --------------------------------------------------------------------------------------------------------------------


def test_tokens_are_accounted_for(model: EmbeddingModel) -> None:
    text = model.prepare(EmbeddingInput(("hello",)))
    assert (text.image_tokens, text.text_tokens, text.positions, text.truncated) == (0, text.num_tokens, None, False)
    assert text.token_ids.dtype == np.int64

    item = model.prepare(EmbeddingInput((noise(64, 96), "hello", noise(128, 64))))
    assert [image.grid.num_tokens for image in item.images] == [6, 8]
    assert [image.grid.grid for image in item.images] == [(6, 4), (4, 8)]
    assert [image.grid.original_size for image in item.images] == [(64, 96), (128, 64)]
    assert item.image_tokens == 14
    assert item.num_tokens == len(item.token_ids) == item.text_tokens + 14
    # An image stands between two tokens of its own.
    assert item.text_tokens == text.num_tokens + 4
    assert item.positions is not None
    assert item.positions.shape == (3, item.num_tokens)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"truncate": True}, id="truncate for nothing"),
        pytest.param({"max_tokens": 60, "truncate": True}, id="cut"),
        pytest.param({"max_tokens": 60}, id="refused"),
        pytest.param({"max_tokens": 3, "truncate": True}, id="below the template"),
        pytest.param({"max_tokens": 0, "truncate": True}, id="a limit of none at all"),
        pytest.param({"max_tokens": 10**9}, id="a limit beyond the model's"),
    ],
)
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(("hello",), id="short"),
        pytest.param(("",), id="empty"),
        pytest.param(("the river runs through the old town " * 9,), id="long"),
        pytest.param((noise(64, 64),), id="image"),
        pytest.param((noise(512, 512),), id="large image"),
        pytest.param((noise(64, 96), "the river runs through the old town " * 9, noise(2000, 1500), "\n"), id="all"),
        pytest.param(("many words " * 10_000,), id="beyond the model"),
        pytest.param(("many words " * 1_000_000,), id="far beyond the model"),
    ],
)
def test_describe_tells_what_prepare_does(mini: EmbeddingModel, parts: tuple[Any, ...], changes: dict[str, Any]) -> None:
    item = EmbeddingInput(parts, **changes)
    limit = mini.info.max_tokens if item.max_tokens is None else min(item.max_tokens, mini.info.max_tokens)
    described = mini.describe(item)
    try:
        prepared = mini.prepare(item)
    except InputTooLong as error:
        assert described.refusal == str(error)
        assert not described.truncated
        assert described.text_tokens is None or described.text_tokens + described.image_tokens > limit
        return
    assert described.refusal is None
    assert (described.text_tokens, described.image_tokens) == (prepared.text_tokens, prepared.image_tokens)
    assert described.truncated is prepared.truncated
    assert described.images == tuple(image.grid for image in prepared.images)
    assert prepared.num_tokens <= limit
    # What is refused is shown whole.
    assert prepared.truncated is (described.prompt != mini.describe(EmbeddingInput(parts, max_tokens=1)).prompt)


def test_describe_shows_the_prompt(model: EmbeddingModel) -> None:
    described = model.describe(EmbeddingInput(("b ", noise(64, 64), "c"), instruction=" Find it "))
    assert described.prompt == (
        "<|im_start|>system\nFind it.<|im_end|>\n"
        "<|im_start|>user\nb <|vision_start|><|image_pad|><|vision_end|>c<|im_end|>\n<|im_start|>assistant\n"
    )


def test_describe_counts_what_is_refused(mini: EmbeddingModel) -> None:
    item = EmbeddingInput(("the river runs " * 20, noise(64, 64)))
    whole = mini.prepare(item)
    described = mini.describe(EmbeddingInput(item.parts, max_tokens=whole.num_tokens - 1))
    assert (described.text_tokens, described.image_tokens) == (whole.text_tokens, whole.image_tokens)
    assert described.refusal is not None
    assert f"{whole.num_tokens} tokens" in described.refusal
    assert mini.describe(EmbeddingInput(("many words " * 1_000_000,))).text_tokens is None, "not worth counting"


def test_the_limit_holds_to_the_token(model: EmbeddingModel) -> None:
    item = EmbeddingInput((noise(64, 64), "the river runs through the old town"))
    count = model.prepare(item).num_tokens
    exact = model.prepare(EmbeddingInput(item.parts, max_tokens=count, truncate=True))
    assert (exact.num_tokens, exact.truncated) == (count, False)
    with pytest.raises(InputTooLong, match=str(count)):
        model.prepare(EmbeddingInput(item.parts, max_tokens=count - 1))
    cut = model.prepare(EmbeddingInput(item.parts, max_tokens=count - 1, truncate=True))
    assert cut.truncated
    assert cut.num_tokens <= count - 1
    assert cut.image_tokens == 4


def test_the_model_s_own_limit_holds_without_another(tmp_path: Path) -> None:
    path = edited_config(tmp_path, lambda config: config["text_config"].update(max_position_embeddings=40))
    model = load(path)
    assert model.info.max_tokens == 40
    for max_tokens in (None, 8192):
        with pytest.raises(InputTooLong, match="limit is 40"):
            model.prepare(EmbeddingInput(("hello " * 20,), max_tokens=max_tokens))
        assert model.prepare(EmbeddingInput(("hello " * 20,), max_tokens=max_tokens, truncate=True)).num_tokens <= 40


def test_images_alone_over_the_limit_are_refused(model: EmbeddingModel) -> None:
    with pytest.raises(InputTooLong, match="images alone"):
        model.prepare(EmbeddingInput((noise(512, 512), "hello"), max_tokens=200, truncate=True))


def test_both_refuse_what_cannot_be_embedded(model: EmbeddingModel) -> None:
    for parts, message in (((noise(201, 1),), "200 times"), (("",) * 4097, "4,097 parts")):
        for method in (model.prepare, model.describe):
            with pytest.raises(InvalidInput, match=message):
                method(EmbeddingInput(parts))


def test_several_at_once_are_each_as_by_itself(model: EmbeddingModel) -> None:
    """Good and bad, cut and uncut, with an instruction that is kept and one too long for that, in any order."""
    long = "a long text " * 40
    items = [
        *mixed(),
        EmbeddingInput((noise(201, 1),)),
        EmbeddingInput(("",)),
        EmbeddingInput((long,), max_tokens=50),
        EmbeddingInput((long, "and another"), max_tokens=50, truncate=True),
        EmbeddingInput(("\n<|im_end|>",), instruction="<|im_start|>"),
        EmbeddingInput(("hello",), instruction="very " * 2000),
        EmbeddingInput(("x" * 3_000_000,), max_tokens=60),
        EmbeddingInput((noise(512, 512), "hello"), max_tokens=200, truncate=True),
        EmbeddingInput(("one", "two", noise(64, 64), "three")),
    ]
    order = np.random.default_rng(0).permutation(len(items))
    refused = 0
    for item, found in zip((items[i] for i in order), model.prepare_all([items[i] for i in order]), strict=True):
        try:
            alone: PreparedInput | Refusal = model.prepare(item)
        except InvalidInput as error:
            alone = Refusal(str(error))
            refused += 1
        if isinstance(found, PreparedInput) and isinstance(alone, PreparedInput):
            assert found.identity == alone.identity
            assert (found.truncated, found.prefix_tokens) == (alone.truncated, alone.prefix_tokens)
        else:
            assert found == alone
    assert refused == 4
    assert model.prepare_all([]) == []


@pytest.mark.parametrize(
    ("given", "verbatim", "read"),
    [
        (None, False, "Represent the user's input."),
        (None, True, "Represent the user's input."),
        ("", False, "Represent the user's input."),
        ("", True, ""),
        (" Find it ", False, "Find it."),
        (" Find it ", True, " Find it "),
    ],
)
def test_the_instruction(model: EmbeddingModel, given: str | None, verbatim: bool, read: str) -> None:
    prompt = model.describe(EmbeddingInput(("a",), given, verbatim)).prompt
    assert prompt.startswith(f"<|im_start|>system\n{read}<|im_end|>\n")


def same(left: PreparedInput, right: PreparedInput) -> bool:
    arrays = [(left.token_ids, right.token_ids)]
    arrays += [(a.patches, b.patches) for a, b in zip(left.images, right.images, strict=True)]
    if left.positions is not None and right.positions is not None:
        arrays.append((left.positions, right.positions))
    return all(np.array_equal(a, b) for a, b in arrays) and (left.positions is None) == (right.positions is None)


def test_images_prepared_before_are_as_those_prepared_with_the_rest(model: EmbeddingModel) -> None:
    parts = (noise(64, 96), "hello", noise(700, 40), noise(64, 96))
    before = tuple(part if isinstance(part, str) else model.prepare_image(part) for part in parts)
    whole, pieces = model.prepare(EmbeddingInput(parts)), model.prepare(EmbeddingInput(before))
    assert same(whole, pieces) and whole.identity == pieces.identity
    assert model.describe(EmbeddingInput(parts)) == model.describe(EmbeddingInput(before))
    assert all(image.patches.nbytes <= model.info.largest_image for image in whole.images)
    assert all(image.patches.nbytes == image.grid.num_tokens * model.info.image_token_bytes for image in whole.images)
    with pytest.raises(InvalidInput, match="200 times"):
        model.prepare_image(Image.new("RGB", (201, 1)))


def test_prepare_in_eight_threads_at_once(other: EmbeddingModel, other_path: Path) -> None:
    """On a model that has prepared nothing yet: what it remembers of templates and instructions is made in the race."""
    inputs = mixed() + [EmbeddingInput((f"text {i} " * 40,), max_tokens=60, truncate=True) for i in range(20)]
    expected = [other.prepare(item) for item in inputs]
    fresh = load(other_path)
    with ThreadPoolExecutor(8) as pool:
        runs = list(
            pool.map(lambda turn: [fresh.prepare(inputs[(i + turn) % len(inputs)]) for i in range(len(inputs))], range(8))
        )
    for turn, run in enumerate(runs):
        for i, prepared in enumerate(run):
            assert same(prepared, expected[(i + turn) % len(inputs)]), (turn, i)
    assert any(item.truncated for item in expected)


# --------------------------------------------------------------------------------------------------------------------
# embed
# --------------------------------------------------------------------------------------------------------------------


def test_rows_are_in_the_order_of_the_batch(model: EmbeddingModel) -> None:
    prepared = [model.prepare(item) for item in mixed()]
    assert len(prepared) > 32, "more than one group"
    solo = np.concatenate([model.embed([item]) for item in prepared])
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(prepared))
        rows = model.embed([prepared[index] for index in order])
        assert rows.shape == (len(prepared), model.info.width)
        assert cosines(rows, solo[order]).min() > 0.99999
        # Each is nearest to itself among all.
        assert np.array_equal((rows @ solo.T).argmax(axis=1), order)


def test_a_batch_of_equal_inputs(model: EmbeddingModel) -> None:
    item = model.prepare(mixed()[-1])
    rows = model.embed([item] * 5)
    assert rows.shape == (5, model.info.width)
    assert cosines(rows, np.repeat(model.embed([item]), 5, axis=0)).min() > 0.999999


def test_rows_are_the_callers_own(model: EmbeddingModel) -> None:
    """A vector that a caller keeps must not change under a later batch."""
    first, second = (model.prepare(EmbeddingInput((text,))) for text in ("first", "second"))
    rows = model.embed([first])
    kept = rows.copy()
    model.embed([second])
    assert np.array_equal(rows, kept)
    rows[:] = 0
    assert np.array_equal(model.embed([first]), kept)


def test_an_image_larger_than_the_limits_is_that_image_at_the_grid(other_path: Path) -> None:
    small = load(other_path, max_image_width=96, max_image_height=0)
    image = noise(300, 200)
    item = small.prepare(EmbeddingInput((image,)))
    assert item.images[0].grid.size == (96, 64)
    expected = Oracle(other_path).vector([image.resize((96, 64), Image.Resampling.BICUBIC)])
    assert cosines(small.embed([item]), expected[None])[0] > 0.99999


def test_errors_of_the_device_carry_no_tensors(monkeypatch: pytest.MonkeyPatch, other_path: Path) -> None:
    model = load(other_path)
    item = model.prepare(EmbeddingInput(("a",)))
    for raised, meant in ((torch.OutOfMemoryError("full"), OutOfDeviceMemory), (torch.AcceleratorError("lost"), DeviceLost)):

        def fail(batch: Sequence[PreparedInput], raised: Exception = raised) -> torch.Tensor:
            raise raised

        monkeypatch.setattr(model.model, "_forward", fail)
        with pytest.raises(meant) as caught:
            model.embed([item])
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints that are not whole
# --------------------------------------------------------------------------------------------------------------------


def copied(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, path)
    return path


def edit_json(file: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(file.read_bytes())
    edit(content)
    file.write_text(json.dumps(content))


def edited_config(tmp_path: Path, edit: Callable[[Any], object]) -> Path:
    path = copied(tmp_path)
    edit_json(path / "config.json", edit)
    return path


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


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


def processor(**changes: Any) -> Callable[[Path], object]:
    return lambda path: edit_json(path / "processor_config.json", lambda content: content["image_processor"].update(changes))


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda path: edit_json(path / "config.json", lambda content: content.update(changes))


def of(part: str, **changes: Any) -> Callable[[Path], object]:
    return lambda path: edit_json(path / "config.json", lambda content: content[part].update(changes))


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
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "cannot be loaded"),
    "no config.json": (lambda path: (path / "config.json").unlink(), "no readable config.json"),
    "config.json cut short": (lambda path: (path / "config.json").write_text('{"model_type": "qwen3'), "no readable config.json"),
    "config.json in no encoding": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\xff"), "no readable config.json"),
    "config.json is a list": (lambda path: (path / "config.json").write_text("[]"), "no readable config.json"),
    "no model_type": (lambda path: edit_json(path / "config.json", lambda c: c.pop("model_type")), "no readable config.json"),
    "another model_type": (config(model_type="t5"), r"'t5' is not known; known are: bert, .*qwen3_vl"),
    "a model_type that is a list": (config(model_type=["qwen3_vl"]), "cannot be loaded"),
    "another patch size": (processor(patch_size=14), "processor's patch_size is 14, but config.json says 16"),
    "another merge size": (processor(merge_size=4), "processor's merge_size is 4, but config.json says 2"),
    "another temporal patch size": (processor(temporal_patch_size=1), "temporal_patch_size is 1, but config.json says 2"),
    "another image token": (config(image_token_id=413), "image_token_id is 412, but config.json says 413"),
    "pixels that are not normalised": (processor(do_normalize=False), "image processor makes other values"),
    "pixels that are not rescaled": (processor(do_rescale=False), "image processor makes other values"),
    "one mean for all channels": (processor(image_mean=[0.4]), "image processor makes other values"),
    "a merge size that the official code does not know": (
        lambda path: (of("vision_config", spatial_merge_size=1)(path), processor(merge_size=1)(path)),
        "spatial_merge_size is 1",
    ),
    "tokens that see what comes": (of("text_config", is_causal=False), "is_causal"),
    "a layer twice in deepstack": (of("vision_config", deepstack_visual_indexes=[1, 1, 2]), "name a layer twice"),
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
def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path, fault: str) -> None:
    path = copied(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(path)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_copy_that_is_whole_loads(tmp_path: Path) -> None:
    assert load(copied(tmp_path)).info.width == 64


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no readable config\.json"):
        load(tmp_path / "nothing")


def test_pickled_weights_only_where_they_are_allowed(tmp_path: Path, mini: EmbeddingModel) -> None:
    path = copied(tmp_path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError):
        load(path)
    pickled = load(path, allow_pickle=True)
    item = mini.prepare(EmbeddingInput(("a",)))
    # Not to the bit: where a weight lies in memory decides how a product rounds.
    np.testing.assert_allclose(pickled.embed([item]), mini.embed([item]), atol=1e-6)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = copied(tmp_path)
    (path / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        load(path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_cuda_that_is_absent_is_said_before_the_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="DEVICE=cpu"):
        load(CHECKPOINT, device="cuda")


# --------------------------------------------------------------------------------------------------------------------
# The fingerprint
# --------------------------------------------------------------------------------------------------------------------


def add_a_grain(name: str) -> Callable[[Path], object]:
    """Change one value that is not among the samples of its tensor, and not the tensor's first."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        (found,) = [key for key in weights if key.endswith(name)]
        weights[found].view(-1)[1] += 2**-12

    return lambda path: edit_weights(path, edit)


TEMPLATE = (CHECKPOINT / "chat_template.jinja").read_text()
CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any], bool]] = {
    "nothing": (lambda path: None, {}, False),
    "a value of the embedding": (add_a_grain("embed_tokens.weight"), {}, True),
    "a value of the vision tower": (add_a_grain("visual.blocks.2.mlp.linear_fc1.bias"), {}, True),
    "template": (lambda path: (path / "chat_template.jinja").write_text(TEMPLATE + "a"), {}, True),
    "tokenizer": (lambda path: edit_json(path / "tokenizer.json", lambda c: c.update(post_processor=None)), {}, True),
    "image processor": (processor(image_mean=[0.4, 0.5, 0.5]), {}, True),
    "config": (lambda path: edit_json(path / "config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-5)), {}, True),
    "a note beside it": (lambda path: (path / "README.md").write_text("a"), {}, False),
    "dtype": (lambda path: None, {"dtype": "bfloat16"}, True),
    "width of images": (lambda path: None, {"max_image_width": 511}, True),
    "height of images": (lambda path: None, {"max_image_height": 0}, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_fingerprint(tmp_path: Path, mini: EmbeddingModel, change: str) -> None:
    edit, settings, differs = CHANGES[change]
    path = copied(tmp_path)
    edit(path)
    assert (load(path, **settings).info.fingerprint != mini.info.fingerprint) is differs


def test_two_seeds_of_one_shape_differ(tmp_path: Path, other: EmbeddingModel) -> None:
    write_demo_checkpoint(tmp_path / "other", seed=4, shape=OTHER)
    assert load(tmp_path / "other").info.fingerprint != other.info.fingerprint


@pytest.fixture
def thread_count() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_is_the_same_on_another_number_of_cores(
    tmp_path: Path, thread_count: Callable[[int], None], dtype: torch.dtype
) -> None:
    weights = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = set()
    for threads in (1, 2, 3, 4, 8):
        thread_count(threads)
        seen.add(fingerprint(tmp_path, {"weight": weights}, {}))
    assert len(seen) == 1


def test_a_fingerprint_sees_names_shapes_and_every_value(tmp_path: Path) -> None:
    weights = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    changed = weights.clone()
    changed[150, 55] += 1e-6
    states = [{"a": weights}, {"b": weights}, {"a": weights.reshape(100, 300)}, {"a": weights.T}, {"a": changed}, {"a": -weights}]
    assert len({fingerprint(tmp_path, state, {}) for state in states}) == len(states)


# --------------------------------------------------------------------------------------------------------------------
# Devices
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "checkpoint", "device", "cpu_has_bfloat16", "chosen"),
    [
        ("auto", torch.float32, "cpu", False, torch.float32),
        ("auto", torch.float32, "cpu", True, torch.float32),
        ("auto", torch.bfloat16, "cpu", False, torch.float32),
        ("auto", torch.bfloat16, "cpu", True, torch.bfloat16),
        ("auto", torch.float16, "cpu", False, torch.float32),
        ("auto", torch.float16, "cpu", True, torch.float32),
        ("auto", torch.float32, "cuda", False, torch.float32),
        ("auto", torch.bfloat16, "cuda", False, torch.bfloat16),
        ("auto", torch.float16, "cuda:1", False, torch.float16),
        ("float32", torch.bfloat16, "cuda", True, torch.float32),
        ("bfloat16", torch.float32, "cpu", False, torch.bfloat16),
        ("float16", torch.bfloat16, "cpu", True, torch.float16),
    ],
)
def test_choose_dtype(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    checkpoint: torch.dtype,
    device: str,
    cpu_has_bfloat16: bool,
    chosen: torch.dtype,
) -> None:
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: cpu_has_bfloat16)
    assert devices.choose_dtype(setting, checkpoint, torch.device(device)) is chosen


def test_the_cpu_is_asked_for_bfloat16() -> None:
    assert isinstance(devices._cpu_has_bfloat16(), bool)


@pytest.mark.parametrize(
    ("own", "of_text", "expected"),
    [
        ("bfloat16", "float32", torch.bfloat16),
        (torch.float16, None, torch.float16),
        (None, "bfloat16", torch.bfloat16),
        (None, None, torch.float32),
    ],
)
def test_checkpoint_dtype(own: Any, of_text: Any, expected: torch.dtype) -> None:
    class Config:
        def __init__(self, dtype: Any) -> None:
            self.dtype = dtype

        def get_text_config(self) -> Config:
            return Config(of_text)

    assert devices.checkpoint_dtype(Config(own)) is expected


@pytest.mark.parametrize(
    ("setting", "cuda_devices", "expected"),
    [
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda"),
        ("cuda", 1, "cuda"),
        ("cuda:0", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_resolve_device(monkeypatch: pytest.MonkeyPatch, setting: str, cuda_devices: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
    assert devices.resolve_device(setting) == expected


@pytest.mark.parametrize(
    ("setting", "cuda_devices", "message"),
    [
        ("cuda", 0, "DEVICE=cuda, .*set DEVICE=cpu, or DEVICE=auto"),
        ("cuda:1", 0, "DEVICE=cuda:1, .*set DEVICE=cpu, or DEVICE=auto"),
        ("cuda:1", 1, "DEVICE=cuda:1, but only 1 CUDA"),
        ("cuda:7", 2, "DEVICE=cuda:7, but only 2 CUDA"),
    ],
)
def test_a_device_that_is_absent(monkeypatch: pytest.MonkeyPatch, setting: str, cuda_devices: int, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
    with pytest.raises(DeviceUnavailable, match=message):
        devices.resolve_device(setting)


@pytest.mark.parametrize(
    ("error", "meant"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfDeviceMemory),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), OutOfDeviceMemory),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), OutOfDeviceMemory),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceLost),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceLost),
    ],
)
def test_translate(error: Exception, meant: type[Exception]) -> None:
    found = devices.translate(error)
    assert type(found) is meant
    assert str(found) == str(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("a"), StopIteration()])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert devices.translate(error) is error


# --------------------------------------------------------------------------------------------------------------------
# Vectors, rates
# --------------------------------------------------------------------------------------------------------------------

UNIT = np.array([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [2 / 3, -1 / 3, 2 / 3]], dtype=np.float32)


@pytest.mark.parametrize(
    ("rows", "dimension", "expected"),
    [
        (UNIT, 3, UNIT),
        (UNIT[[0, 2]], 1, [[1.0], [1.0]]),
        (UNIT, 2, [[1, 0], [0, 1], [2 / 5**0.5, -1 / 5**0.5]]),
        (UNIT, 5, np.pad(UNIT, ((0, 0), (0, 2)))),
        (UNIT[:0], 2, np.zeros((0, 2))),
    ],
)
def test_to_dimension(rows: Any, dimension: int, expected: Any) -> None:
    found = to_dimension(rows, dimension)
    assert found.dtype == np.float32
    assert found.shape == (len(rows), dimension)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_to_dimension_refuses_to_make_up_a_direction() -> None:
    with pytest.raises(ValueError, match="all zero"):
        to_dimension(UNIT, 1)


def test_filling_up_leaves_cosines_and_distances() -> None:
    filled = to_dimension(UNIT, 2560)
    np.testing.assert_allclose(filled @ filled.T, UNIT @ UNIT.T, rtol=1e-6)


def test_normalize() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1e-20, 0.0]])
    torch.testing.assert_close(normalize(rows), torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]]))


class Clock:
    """A clock that only work moves on: so many seconds an input, half as much again every third time."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds, self.batches = 0.0, seconds, list[int]()

    def perf_counter(self) -> float:
        return self.now

    def embed(self, batch: Sequence[PreparedInput]) -> None:
        self.now += len(batch) * self.seconds * (1.5 if len(self.batches) % 3 == 0 else 1)
        self.batches.append(len(batch))


@pytest.mark.parametrize(
    ("seconds", "largest"),
    [
        pytest.param(0.01, 32, id="grows until it takes long enough"),
        pytest.param(5.0, 1, id="slow: one is enough"),
        pytest.param(1e-6, rates.MOST_INPUTS, id="fast: no more than the most"),
    ],
)
def test_measure(monkeypatch: pytest.MonkeyPatch, seconds: float, largest: int) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(rates, "time", clock)
    item = PreparedInput(np.arange(50))
    assert rates.measure(clock.embed, item) == pytest.approx(50 / seconds)
    assert max(clock.batches) == clock.batches[-1] == largest
    assert clock.batches == sorted(clock.batches)


@pytest.mark.parametrize("size", [(1200, 800), (4001, 3000), (513, 512), (512, 512), (64, 64), (6000, 30)])
def test_an_image_that_was_reduced_is_planned_as_the_original(model: EmbeddingModel, size: tuple[int, int]) -> None:
    whole = noise(*size)
    reduced = model.reduced_size(size)
    plan = model.prepare_image(whole).grid
    assert reduced == (plan.size if plan.official_size else None)
    if reduced is not None:
        half = whole.resize((-(-size[0] // 2), -(-size[1] // 2)))
        assert model.prepare_image(half, size).grid == plan


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
def test_a_modules_json_that_says_what_is_done(tmp_path: Path, pooling: dict[str, Any]) -> None:
    """The folder is the checkpoint, and its vectors are."""
    found, plain = load(with_modules(tmp_path / "model", pooling)), load(CHECKPOINT)
    rows = [model.embed([model.prepare(EmbeddingInput(("a dog",)))]) for model in (found, plain)]
    assert np.array_equal(*rows)


@pytest.mark.parametrize(
    ("pooling", "more", "words"),
    [
        ({"pooling_mode": "mean"}, [], "asks for mean pooling"),
        ({"pooling_mode": ["lasttoken", "cls"]}, [], "asks for cls, lasttoken pooling"),
        ({"pooling_mode_mean_tokens": True}, [], "asks for mean_tokens pooling"),
        ({"pooling_mode": "lasttoken"}, ["Dense"], "has a Dense"),
    ],
)
def test_a_modules_json_that_asks_for_more(tmp_path: Path, pooling: dict[str, Any], more: list[str], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        load(with_modules(tmp_path / "model", pooling, *more))
