"""The library's files besides modules: what is followed gives its vectors, and what is not is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from models.base import ModelLoadError
from models.text_encoder.settings import FolderSettings
from tests.support.oracle import cosines
from tests.support.text_checkpoints import WIDTH, dense, write_checkpoint, write_json
from tests.support.text_oracle import TEXTS, assert_same, embed, library, library_limit, oracle
from tests.support.whole_model import load_model

pytestmark = pytest.mark.recorded

LONG = ["the river runs through the old town and then out to sea " * n for n in (1, 12, 400)]
TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("settings") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.live
def test_settings_that_the_library_writes_are_understood(folder: Path) -> None:
    expected = oracle(folder, TEXTS)
    library(folder).save(str(folder.parent / "saved"))
    saved = folder.parent / "saved"
    assert "modality_config" in (saved / "sentence_bert_config.json").read_text()
    assert_same(embed(load_model(saved), TEXTS), expected)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_seq_length": 40}, id="max_seq_length"),
        pytest.param({"max_seq_length": None}, id="none"),
        pytest.param({"max_seq_length": 60, "tokenizer_args": {"model_max_length": 40}}, id="an argument before it"),
        pytest.param({"processor_kwargs": {"model_max_length": 50, "padding_side": "left"}}, id="an argument alone"),
        pytest.param({"processor_kwargs": {"model_max_length": 30}, "tokenizer_args": {"model_max_length": 60}}, id="both names"),
        pytest.param({"processor_kwargs": {"model_max_length": 30}, "tokenizer_args": {}}, id="the old name, and nothing in it"),
        pytest.param({"max_seq_length": 40, "model_args": {"torch_dtype": "float32"}, "config_args": {}}, id="of no matter"),
        pytest.param({"transformer_task": "feature-extraction", "modality_config": {"text": TEXT},
                      "module_output_name": "token_embeddings", "query_length": 5}, id="today's"),
    ],
)  # fmt: skip
def test_settings_of_the_transformer_are_followed(folder: Path, settings: dict[str, Any]) -> None:
    write_json(folder / "sentence_bert_config.json", settings)
    assert_same(embed(load_model(folder), [*TEXTS, *LONG]), oracle(folder, [*TEXTS, *LONG]))
    assert load_model(folder).info.max_tokens == library_limit(folder)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_settings_under_old_names(folder: Path, name: str) -> None:
    write_json(folder / "sentence_bert_config.json", {})
    write_json(folder / f"sentence_{name}_config.json", {"max_seq_length": 30})
    assert load_model(folder).info.max_tokens == library_limit(folder) == 30


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"transformer_task": "fill-mask"}, "transformer_task has fill-mask"),
        ({"modality_config": {"text": TEXT, "message": TEXT}, "module_output_name": "token_embeddings"}, "modality_config has"),
        ({"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs has"),
        ({"tokenizer_args": {"truncation_side": "left"}}, "tokenizer_args has truncation_side"),
        (
            {"max_seq_length": 40, "tokenizer_args": {"model_max_length": None}},
            "model_max_length is None, which takes every limit",
        ),
        ({"config_args": {"num_hidden_layers": 1}}, "config_args has num_hidden_layers"),
        ({"model_kwargs": {"rotary_scaling_factor": 2}}, "model_kwargs has rotary_scaling_factor"),
        ({"lower": True}, "lower has True, which this server does not follow"),
    ],
)
def test_settings_that_are_not_followed_are_refused(folder: Path, settings: dict[str, Any], words: str) -> None:
    write_json(folder / "sentence_bert_config.json", settings)
    with pytest.raises(ModelLoadError, match=words):
        load_model(folder)


@pytest.mark.parametrize("kind", ["SparseEncoder", "CrossEncoder"])
def test_settings_of_another_model_type_are_refused(folder: Path, kind: str) -> None:
    """The library makes another model of it, of whatever pooling."""
    write_json(folder / "config_sentence_transformers.json", {"model_type": kind})
    with pytest.raises(ModelLoadError, match=f"model_type is {kind}, known is SentenceTransformer alone"):
        load_model(folder)


def test_settings_may_name_the_model_type(folder: Path) -> None:
    write_json(folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer"})
    assert_same(embed(load_model(folder), TEXTS), oracle(folder, TEXTS))


@pytest.mark.parametrize("width", [16, WIDTH, 1000])
@pytest.mark.parametrize("heads", [[], [dense(WIDTH, 30), ("Normalize", {}, {})]], ids=["bare", "dense"])
def test_truncate_dim_cuts_vectors(tmp_path: Path, heads: list[Any], width: int) -> None:
    folder = write_checkpoint(tmp_path / "model", heads=heads, prompts={"truncate_dim": width})
    model = load_model(folder)
    assert model.info.width == min(width, 30 if heads else WIDTH)
    assert_same(embed(model, TEXTS), oracle(folder, TEXTS))


@pytest.mark.parametrize("width", [0, -5, True, 7.0, "16"])
def test_truncate_dim_must_be_a_number_of_components(folder: Path, width: Any) -> None:
    write_json(folder / "config_sentence_transformers.json", {"truncate_dim": width})
    with pytest.raises(ModelLoadError, match=r"truncate_dim is .*, which is no number of components"):
        load_model(folder)


@pytest.mark.parametrize("name", ["query", "document"])
def test_default_prompt_that_every_model_has(folder: Path, name: str) -> None:
    write_json(folder / "config_sentence_transformers.json", {"default_prompt_name": name, "prompts": {"other": "the river: "}})
    assert_same(embed(load_model(folder), TEXTS), oracle(folder, TEXTS))
    assert FolderSettings.read(folder).default_prompt == ""


def test_default_prompt_with_special_tokens_is_refused(folder: Path) -> None:
    """The library reads them as such: other vectors than here, where they are plain text."""
    write_json(folder / "config_sentence_transformers.json", {"default_prompt_name": "q", "prompts": {"q": "[MASK] old: "}})
    with pytest.raises(ModelLoadError, match=r"its default prompt has special tokens \(\[MASK\]\)"):
        load_model(folder)
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"q": "[MASK] old: "}})
    assert cosines(embed(load_model(folder), TEXTS[4:], "[MASK] old: "), oracle(folder, TEXTS[4:], "[MASK] old: ")).min() < 0.99
