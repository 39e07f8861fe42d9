"""Our vectors against the official embedder's: stored ones, and ones that stock transformers computes here.

`python -m tests.conformance.report` prints the figures.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from app.media.image import decode_image
from models.base import EmbeddingInput, PreparedInput
from models.checkpoints.demo import OTHER, TINY, write_demo_checkpoint
from tests.conformance.report import BARS, CASES, CHECKPOINT, Result, case_input, golden, load
from tests.support.image_files import encode
from tests.support.oracle import Oracle, Part, Rows, cosines
from tests.support.whole_model import WholeModel, load_model

WIDTH_OF_BATCH = 32


class Company(NamedTuple):
    """Who is embedded with whom: from what is prepared to a row for each."""

    name: str
    embed: Callable[[WholeModel, Sequence[PreparedInput]], Rows]


def alone(model: WholeModel, prepared: Sequence[PreparedInput]) -> Rows:
    return np.concatenate([model.embed([item]) for item in prepared])


def together(model: WholeModel, prepared: Sequence[PreparedInput]) -> Rows:
    return model.embed(prepared)


def shuffled(model: WholeModel, prepared: Sequence[PreparedInput]) -> Rows:
    """In batches of 32 in a random order, short and long, texts and images mixed."""
    order = np.random.default_rng(len(prepared)).permutation(len(prepared))
    rows = np.full((len(prepared), model.info.width), np.nan, dtype=np.float32)
    for start in range(0, len(order), WIDTH_OF_BATCH):
        chosen = order[start : start + WIDTH_OF_BATCH]
        rows[chosen] = model.embed([prepared[index] for index in chosen])
    return rows


COMPANIES = [Company(embed.__name__, embed) for embed in (alone, together, shuffled)]
in_any_company = pytest.mark.parametrize("company", COMPANIES, ids=lambda company: company.name)


@pytest.fixture(scope="module")
def prepared() -> list[PreparedInput]:
    """The cases; what is prepared is the same for every dtype."""
    model = load("float32")
    return [model.prepare(case_input(case)) for case in CASES]


# --------------------------------------------------------------------------------------------------------------------
# Stored vectors
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["packed", pytest.param("reference", marks=pytest.mark.reference)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.bfloat16)])
@in_any_company
def test_conformance_to_every_stored_vector(dtype: str, backend: str, company: Company, prepared: list[PreparedInput]) -> None:
    rows = company.embed(load(dtype, backend=backend), prepared)
    result = Result(dtype, cosines(rows, golden()))
    print(result)
    assert rows.dtype == np.float32
    assert rows.shape == golden().shape
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    assert result.passed == len(CASES) == 63, str(result)


def test_conformance_in_shuffled_mixed_batches_of_32(prepared: list[PreparedInput]) -> None:
    """More company than the cases have in one pass: each of them four times, in 32-wide batches of ever other neighbours."""
    model, expected = load("float32"), golden()
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(CASES)) for _ in range(4)])
    for start in range(0, len(order), WIDTH_OF_BATCH):
        chosen = order[start : start + WIDTH_OF_BATCH]
        near = cosines(model.embed([prepared[index] for index in chosen]), expected[chosen])
        assert near.min() >= BARS["float32"], (CASES[chosen[near.argmin()]]["id"], near.min())


def test_conformance_bar_tells_different_inputs_apart() -> None:
    """Were all vectors alike, nothing above would mean anything."""
    expected = golden()
    same = {("fused-0", "fused-3")}
    near = expected @ expected.T
    for i, j in zip(*np.triu_indices(len(CASES), 1), strict=True):
        if (CASES[i]["id"], CASES[j]["id"]) not in same:
            assert near[i, j] < 0.995, (CASES[i]["id"], CASES[j]["id"])


# --------------------------------------------------------------------------------------------------------------------
# Vectors of stock transformers
# --------------------------------------------------------------------------------------------------------------------


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Waves of colour with some noise: every patch differs, and so do the two directions."""
    rng = np.random.default_rng(seed + 1000 * width + height)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / a + phase) * np.cos(y / b) for a, b, phase in rng.uniform(3, 60, (3, 3))]
    pixels = 127 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class Example(NamedTuple):
    parts: tuple[Part, ...]
    instruction: str | None = None


EXAMPLES = {
    "word": Example(("dog",)),
    "empty": Example(("",)),
    "sentence": Example(("The river runs through the old town, past the bridge.",)),
    "long": Example(("A vector search finds the documents nearest to a question. " * 20,)),
    "leading newline": Example(("\n\nafter two newlines",)),
    "white space": Example((" \t two  spaces \r\n",)),
    "unicode": Example(("größe 検索 🚀 поиск العربية",)),
    "decomposed": Example(("cafe\u0301 \u1100\u1161\u11a8 A\u030a",)),
    "added tokens": Example(("<think>aloud</think> and done",)),
    "two texts": Example(("one", "two")),
    "instruction": Example(("dog",), "Retrieve images or text relevant to the user's query"),
    "instruction with space": Example(("dog",), "\n Find duplicates! \t"),
    "instruction in Chinese": Example(("狗",), "对文本进行分类"),
    "landscape": Example((picture(200, 100),)),
    "portrait": Example((picture(100, 200),)),
    "upscaled": Example((picture(20, 7),)),
    "pixel": Example((picture(1, 1),)),
    "strip": Example((picture(400, 3),)),
    "on the grid": Example((picture(96, 64),)),
    "odd": Example((picture(333, 217),)),
    "large": Example((picture(511, 509),)),
    "fused": Example((picture(80, 120), "a dog on the beach")),
    "text first": Example(("a dog on the beach", picture(80, 120))),
    "fused, instruction": Example((picture(150, 90), "what is it?"), "Represent the document."),
    "two images": Example((picture(64, 96), picture(128, 32))),
    "two images, swapped": Example((picture(128, 32), picture(64, 96))),
    "two images and texts": Example((picture(70, 70), "left\n", picture(40, 160), "\nright")),
    "three images": Example((picture(33, 65), picture(300, 40), "between", picture(64, 64))),
}


class Pair(NamedTuple):
    """A checkpoint in both hands."""

    oracle: Oracle
    model: WholeModel
    expected: Rows
    prepared: list[PreparedInput]


@pytest.fixture(scope="module", params=["conformance", "tiny", "other"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path: Path = CHECKPOINT
    if request.param != "conformance":
        path = tmp_path_factory.mktemp("oracle") / request.param
        write_demo_checkpoint(path, seed=7, shape={"tiny": TINY, "other": OTHER}[request.param])
    oracle = Oracle(path)
    model = load_model(path)
    expected = np.stack([oracle.vector(*example) for example in EXAMPLES.values()])
    prepared = [model.prepare(EmbeddingInput(*example)) for example in EXAMPLES.values()]
    return Pair(oracle, model, expected, prepared)


def test_oracle_has_the_same_ids(pair: Pair) -> None:
    for (name, example), item in zip(EXAMPLES.items(), pair.prepared, strict=True):
        assert item.token_ids.tolist() == pair.oracle.ids(*example), name


@in_any_company
def test_oracle_has_the_same_vectors(pair: Pair, company: Company) -> None:
    near = cosines(company.embed(pair.model, pair.prepared), pair.expected)
    worst = int(near.argmin())
    print(f"worst cosine {near[worst]:.7f}")
    assert near[worst] >= BARS["float32"], (list(EXAMPLES)[worst], near[worst])


def test_oracle_tells_its_inputs_apart(pair: Pair) -> None:
    near = pair.expected @ pair.expected.T - 2 * np.eye(len(pair.expected))
    i, j = np.unravel_index(near.argmax(), near.shape)
    assert near.max() < 0.9995, (list(EXAMPLES)[i], list(EXAMPLES)[j], near.max())


def test_oracle_needs_the_kinds_of_tokens(pair: Pair) -> None:
    """Positions of images matter on these weights: a model that numbered all tokens in a row would be found out."""
    inputs = pair.oracle.inputs(*EXAMPLES["two images and texts"])
    in_a_row = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with torch.inference_mode():
        hidden = pair.oracle.model(**inputs, position_ids=in_a_row).last_hidden_state[:, -1].numpy()
    expected = pair.oracle.vector(*EXAMPLES["two images and texts"])[None]
    assert cosines(hidden, expected)[0] < BARS["float32"]


def logo(form: str) -> bytes:
    """A file with one transparent colour, black."""
    image = Image.new("P", (96, 64), 0)
    image.putpalette([0, 0, 0, 200, 30, 60])
    image.paste(1, (20, 10, 50, 40))
    if form == "RGB":
        return encode(image.convert("RGB"), "PNG", transparency=(0, 0, 0))
    if form == "L":
        return encode(image.point(lambda index: index * 99, "L"), "PNG", transparency=0)
    return encode(image, form, transparency=0)


@pytest.mark.parametrize("form", ["PNG", "GIF", "L", "RGB"])
@pytest.mark.parametrize("size", [(96, 64), (150, 100)], ids=["as it is", "resized"])
def test_transparent_colour_is_read_as_the_oracle_reads_it(form: str, size: tuple[int, int]) -> None:
    """As the official code has it, with the processor of the installed transformers."""
    with Image.open(io.BytesIO(logo(form))) as image:
        image.load()
        file = encode(image.resize(size, Image.Resampling.NEAREST), image.format or "", transparency=image.info["transparency"])
    decoded = decode_image(file, 1 << 20, 1 << 20)
    oracle, model = Oracle(CHECKPOINT), load("float32")
    row = model.embed([model.prepare(EmbeddingInput((decoded,)))])
    assert cosines(row, oracle.vector([Image.open(io.BytesIO(file))])[None])[0] >= BARS["float32"]
