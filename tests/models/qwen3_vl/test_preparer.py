"""The Preparer of Qwen3-VL: token counts, limits, refusals, and many inputs at once."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.base import EmbeddingInput, InputTooLong, InvalidInput, PreparedInput, Refusal
from tests.support.vl_checkpoints import edited_config
from tests.support.vl_inputs import mixed, noise
from tests.support.whole_model import WholeModel, load_model


def test_info_is_known(model: WholeModel) -> None:
    info = model.info
    assert (info.model_type, info.width, info.max_tokens, info.device, info.dtype) == ("qwen3_vl", 64, 32768, "cpu", "float32")
    assert info.supports_images
    assert re.fullmatch("[0-9a-f]{16}", info.fingerprint)
    assert model.memory_bytes() == 0


def test_token_counts_add_up(model: WholeModel) -> None:
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
def test_describe_agrees_with_prepare(mini: WholeModel, parts: tuple[Any, ...], changes: dict[str, Any]) -> None:
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


def test_describe_shows_the_prompt(model: WholeModel) -> None:
    described = model.describe(EmbeddingInput(("b ", noise(64, 64), "c"), instruction=" Find it "))
    assert described.prompt == (
        "<|im_start|>system\nFind it.<|im_end|>\n"
        "<|im_start|>user\nb <|vision_start|><|image_pad|><|vision_end|>c<|im_end|>\n<|im_start|>assistant\n"
    )


def test_describe_counts_what_is_refused(mini: WholeModel) -> None:
    item = EmbeddingInput(("the river runs " * 20, noise(64, 64)))
    whole = mini.prepare(item)
    described = mini.describe(EmbeddingInput(item.parts, max_tokens=whole.num_tokens - 1))
    assert (described.text_tokens, described.image_tokens) == (whole.text_tokens, whole.image_tokens)
    assert described.refusal is not None
    assert f"{whole.num_tokens} tokens" in described.refusal
    assert mini.describe(EmbeddingInput(("many words " * 1_000_000,))).text_tokens is None, "not worth counting"


def test_limit_holds_to_the_token(model: WholeModel) -> None:
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


def test_limit_is_the_models_own_without_another(tmp_path: Path) -> None:
    path = edited_config(tmp_path, lambda config: config["text_config"].update(max_position_embeddings=40))
    model = load_model(path)
    assert model.info.max_tokens == 40
    for max_tokens in (None, 8192):
        with pytest.raises(InputTooLong, match="limit is 40"):
            model.prepare(EmbeddingInput(("hello " * 20,), max_tokens=max_tokens))
        assert model.prepare(EmbeddingInput(("hello " * 20,), max_tokens=max_tokens, truncate=True)).num_tokens <= 40


def test_limit_refuses_images_that_alone_exceed_it(model: WholeModel) -> None:
    with pytest.raises(InputTooLong, match="images alone"):
        model.prepare(EmbeddingInput((noise(512, 512), "hello"), max_tokens=200, truncate=True))


def test_refusals_of_prepare_and_describe_are_the_same(model: WholeModel) -> None:
    for parts, message in (((noise(201, 1),), "200 times"), (("",) * 4097, "4,097 parts")):
        for method in (model.prepare, model.describe):
            with pytest.raises(InvalidInput, match=message):
                method(EmbeddingInput(parts))


def test_prepare_all_prepares_each_as_by_itself(model: WholeModel) -> None:
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
            assert found.content_hash == alone.content_hash
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
def test_instruction_is_tidied_unless_verbatim(model: WholeModel, given: str | None, verbatim: bool, read: str) -> None:
    prompt = model.describe(EmbeddingInput(("a",), given, verbatim)).prompt
    assert prompt.startswith(f"<|im_start|>system\n{read}<|im_end|>\n")


def same(left: PreparedInput, right: PreparedInput) -> bool:
    arrays = [(left.token_ids, right.token_ids)]
    arrays += [(a.patches, b.patches) for a, b in zip(left.images, right.images, strict=True)]
    if left.positions is not None and right.positions is not None:
        arrays.append((left.positions, right.positions))
    return all(np.array_equal(a, b) for a, b in arrays) and (left.positions is None) == (right.positions is None)


def test_prepare_image_gives_the_input_that_prepare_gives(model: WholeModel) -> None:
    parts = (noise(64, 96), "hello", noise(700, 40), noise(64, 96))
    before = tuple(part if isinstance(part, str) else model.prepare_image(part) for part in parts)
    whole, pieces = model.prepare(EmbeddingInput(parts)), model.prepare(EmbeddingInput(before))
    assert same(whole, pieces) and whole.content_hash == pieces.content_hash
    assert model.describe(EmbeddingInput(parts)) == model.describe(EmbeddingInput(before))
    assert all(image.patches.nbytes <= model.info.largest_image for image in whole.images)
    assert all(image.patches.nbytes == image.grid.num_tokens * model.info.image_token_bytes for image in whole.images)
    with pytest.raises(InvalidInput, match="200 times"):
        model.prepare_image(Image.new("RGB", (201, 1)))


@pytest.mark.parametrize("size", [(1200, 800), (4001, 3000), (513, 512), (512, 512), (64, 64), (6000, 30)])
def test_reduced_size_keeps_the_plan_of_the_original(model: WholeModel, size: tuple[int, int]) -> None:
    whole = noise(*size)
    reduced = model.reduced_size(size)
    plan = model.prepare_image(whole).grid
    assert reduced == (plan.size if plan.official_size else None)
    if reduced is not None:
        half = whole.resize((-(-size[0] // 2), -(-size[1] // 2)))
        assert model.prepare_image(half, size).grid == plan


def test_prepare_in_eight_threads_at_once(other: WholeModel, other_path: Path) -> None:
    """On a model that has prepared nothing yet: what it remembers of templates and instructions is made in the race."""
    inputs = mixed() + [EmbeddingInput((f"text {i} " * 40,), max_tokens=60, truncate=True) for i in range(20)]
    expected = [other.prepare(item) for item in inputs]
    fresh = load_model(other_path)
    with ThreadPoolExecutor(8) as pool:
        runs = list(
            pool.map(lambda turn: [fresh.prepare(inputs[(i + turn) % len(inputs)]) for i in range(len(inputs))], range(8))
        )
    for turn, run in enumerate(runs):
        for i, prepared in enumerate(run):
            assert same(prepared, expected[(i + turn) % len(inputs)]), (turn, i)
    assert any(item.truncated for item in expected)
