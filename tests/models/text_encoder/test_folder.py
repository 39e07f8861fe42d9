"""Folders that are broken, or ask for what is not known: one clear line each, from the check of files or from the loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig

from models.base import ModelLoadError
from models.checkpoints.complete import check_complete
from models.registry import FAMILIES as FAMILIES_BY_TYPE
from models.text_encoder.folder import Folder
from tests.support.text_checkpoints import FAMILIES, WIDTH, config_of, dense, model_of, tokenizer_of, write_checkpoint, write_json
from tests.support.text_oracle import TEXTS, assert_same, embed, oracle
from tests.support.whole_model import load_model

pytestmark = pytest.mark.recorded


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = [dense(WIDTH, 20), ("Normalize", {}, {})]
    return write_checkpoint(tmp_path_factory.mktemp("folder") / "whole", heads=heads)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    write_json(file, {**json.loads(file.read_text()), **values})


def rename_module(folder: Path, index: int, **values: Any) -> None:
    rows = json.loads((folder / "modules.json").read_text())
    rows[index] |= values
    write_json(folder / "modules.json", rows)


def change_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_type(folder: Path, type_id: int) -> None:
    """The tokenizer gives every token a type, as those of BERT's day do."""
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"type_id": 0', f'"type_id": {type_id}'))
    change(folder / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def one_line(error: pytest.ExceptionInfo[ModelLoadError]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


BROKEN_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no pooling config": (lambda f: (f / "1_Pooling/config.json").unlink(), r"1_Pooling/config.json is missing \(modules.json"),
    "no pooling folder": (lambda f: shutil.rmtree(f / "1_Pooling"), "1_Pooling/config.json is missing"),
    "a cut pooling config": (lambda f: (f / "1_Pooling/config.json").write_text('{"pool'), "1_Pooling/config.json is not JSON"),
    "no dense weights": (lambda f: (f / "2_Dense/model.safetensors").unlink(), "2_Dense: the weights .* are missing"),
    "cut dense weights": (
        lambda f: (f / "2_Dense/model.safetensors").write_bytes((f / "2_Dense/model.safetensors").read_bytes()[:-1]),
        "2_Dense/model.safetensors is .* bytes long",
    ),
    "pickled dense weights": (
        lambda f: (f / "2_Dense/model.safetensors").rename(f / "2_Dense/pytorch_model.bin"), "2_Dense: the weights are pickled"
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer .* is missing"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled .* ALLOW_PICKLE=true"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_folder_that_is_incomplete_is_refused(folder: Path, name: str) -> None:
    spoil, message = BROKEN_FILES[name]
    check_complete(folder, allow_pickle=False)
    spoil(folder)
    with pytest.raises(ModelLoadError, match=message) as error:
        check_complete(folder, allow_pickle=False)
    one_line(error)
    # Without that check, as load_model is called by a program, it is one line too.
    with pytest.raises(ModelLoadError) as error:
        load_model(folder)
    one_line(error)


def test_module_without_files_needs_none(folder: Path) -> None:
    shutil.rmtree(folder / "3_Normalize")
    check_complete(folder, allow_pickle=False)
    assert load_model(folder).info.width == 20


STRANGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a chat template and no modules.json": (
        lambda f: ((f / "modules.json").unlink(), (f / "chat_template.jinja").write_text("{{ messages }}")), "has a chat template"
    ),
    "a text of another type": (lambda f: of_type(f, 1), "its tokenizer says that a text is not of the first type"),
    "modules.json of another form": (lambda f: write_json(f / "modules.json", {"a": 1}), "is not a list of modules"),
    "an unknown module": (
        lambda f: rename_module(f, 2, type="sentence_transformers.models.CNN"), "lists Transformer, Pooling, CNN, Normalize; k"
    ),
    "no pooling": (lambda f: rename_module(f, 1, type="sentence_transformers.models.Dense"), "lists Transformer, Dense, Dense"),
    "a module of the checkpoint's own": (
        lambda f: rename_module(f, 0, type="custom_st.Transformer"), "'custom_st.Transformer', which is code of .* never run"
    ),
    "two modules of one name": (lambda f: rename_module(f, 3, name="2"), "modules.json has two modules of one name"),
    "a transformer elsewhere": (lambda f: rename_module(f, 0, path="0_Transformer"), "a folder of its own, '0_Transformer'"),
    "a module outside": (lambda f: rename_module(f, 1, path="../elsewhere"), "a folder outside, '../elsewhere'"),
    "an unknown pooling mode": (
        lambda f: change(f / "1_Pooling/config.json", pooling_mode="median"), "the pooling mode 'median' is not known"
    ),
    "a dense layer over tokens": (
        lambda f: change(f / "2_Dense/config.json", module_input_name="token_embeddings"), "module_input_name is 'token_emb"
    ),
    "an unknown activation": (
        lambda f: change(f / "2_Dense/config.json", activation_function="own.code.Act"), "the activation 'own.code.Act' is not"
    ),
    "a dense layer without the bias that it has": (
        lambda f: change(f / "2_Dense/config.json", bias=False), "its weights are not those of a dense layer of 48 components"
    ),
    "an unknown default prompt": (
        lambda f: change(f / "config_sentence_transformers.json", default_prompt_name="web"), "'web', which is none of its"
    ),
    "another model_type": (lambda f: change(f / "config.json", model_type="t5"), "model_type 't5' is not known; known are"),
    "weights of another model": (
        lambda f: change_weights(f, lambda w: w.pop("encoder.layer.1.output.dense.weight")),
        "1 weights are missing, encoder.layer.1.output.dense.weight among them",
    ),
    "weights of another shape": (lambda f: change(f / "config.json", intermediate_size=95), "of another shape than config.json"),
    "weights that are left over": (
        lambda f: change_weights(f, lambda w: w.update({"encoder.layer.0.gate.weight": torch.ones(2)})),
        "1 weights are of no use to the model that config.json names, encoder.layer.0.gate.weight among them",
    ),
    "fewer layers than the file": (lambda f: change(f / "config.json", num_hidden_layers=2), "weights are of no use to"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_folder_that_is_not_understood_is_refused(folder: Path, name: str) -> None:
    spoil, message = STRANGE[name]
    spoil(folder)
    with pytest.raises(ModelLoadError, match=message) as error:
        load_model(folder)
    one_line(error)


def test_pooler_and_heads_do_not_matter(folder: Path) -> None:
    before = load_model(folder).info

    def edit(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith("pooler.")]:
            weights.pop(name)
        weights["cls.predictions.bias"] = torch.ones(3)
        weights["embeddings.position_ids"] = torch.arange(130)[None]

    change_weights(folder, edit)
    assert load_model(folder).info.width == before.width


def test_fingerprint_is_of_all_that_decides_a_vector(folder: Path) -> None:
    seen = {load_model(folder).info.fingerprint}

    def is_new() -> bool:
        found = load_model(folder).info.fingerprint
        new = found not in seen
        seen.add(found)
        return new

    assert not is_new()
    change(folder / "1_Pooling/config.json", pooling_mode="max")
    assert is_new()
    change(folder / "2_Dense/config.json", activation_function="torch.nn.modules.activation.ReLU")
    assert is_new()
    change_weights(folder / "2_Dense", lambda w: w["linear.bias"].add_(0.01))
    assert is_new()
    change_weights(folder, lambda w: w["encoder.layer.1.output.dense.bias"].add_(0.01))
    assert is_new()
    change(folder / "sentence_bert_config.json", max_seq_length=100)
    assert is_new()
    rows = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", rows[:-1])
    assert is_new()


def test_modules_under_todays_names(folder: Path) -> None:
    """Version 6 of the library writes other paths of its classes, and one key for the mode."""
    names = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling", "base.modules.dense.Dense"]
    for index, name in enumerate(names):
        rename_module(folder, index, type=f"sentence_transformers.{name}")
    write_json(folder / "1_Pooling/config.json", {"embedding_dimension": WIDTH, "pooling_mode": "cls", "include_prompt": True})
    read = Folder.read(folder, BertConfig(), FAMILIES_BY_TYPE["bert"])
    assert (read.modes, [module.kind for module in read.post_pooling]) == (("cls",), ["Dense", "Normalize"])


def test_limit_is_never_beyond_the_positions(folder: Path) -> None:
    change(folder / "sentence_bert_config.json", max_seq_length=4096)
    assert load_model(folder).info.max_tokens == 130
    (folder / "sentence_bert_config.json").unlink()
    change(folder / "tokenizer_config.json", model_max_length=77)
    assert load_model(folder).info.max_tokens == 77


def test_limit_leaves_out_the_positions_before_the_text(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "xlm-roberta", transformer={"max_seq_length": 512})
    assert load_model(folder).info.max_tokens == 128


# --- A folder without modules.json ---------------------------------------------------------------------------------------------

HEADS = {
    "bert": AutoModelForMaskedLM, "distilbert": AutoModelForMaskedLM, "modernbert": AutoModelForMaskedLM,
    "mpnet": AutoModelForMaskedLM, "qwen3": AutoModelForCausalLM, "roberta": AutoModelForMaskedLM,
    "xlm-roberta": AutoModelForSequenceClassification,
}  # fmt: skip


def write_plain(path: Path, family: str, kind: Any) -> Path:
    """A model with its head, as transformers saves it: the transformer's weights are named after it."""
    model = kind.from_config(config_of(family, tokenizer_of(family)))
    missing, left = model.base_model.load_state_dict(model_of(family).state_dict(), strict=False)
    assert not missing
    assert all("pooler" in name for name in left)
    model.save_pretrained(path)
    tokenizer_of(family).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [True, False], ids=["with a head", "bare"])
def test_plain_folder_is_read_as_the_library_reads_it(
    tmp_path: Path, family: str, head: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_plain(tmp_path / "model", family, HEADS[family] if head else AutoModel)
    names = load_file(folder / "model.safetensors").keys()
    assert any(name.startswith(("bert.", "distilbert.", "model.", "mpnet.", "roberta.")) for name in names) is head
    model = load_model(folder)
    assert model.info.max_tokens == (128 if family in ("mpnet", "roberta", "xlm-roberta") else 130)
    how = "the last one is taken" if family == "qwen3" else "their mean is taken"
    assert f"no modules.json, which says how tokens are pooled: {how}" in caplog.text
    # Past the places that an XLM-R has the library fails.
    texts = [text for text in TEXTS if len(text) < 150]
    rows = embed(model, texts)
    if family == "qwen3" and not head:
        # The library takes the mean of a Qwen3Model, which for Qwen3-Embedding is not right.
        change(folder / "config.json", architectures=["Qwen3ForCausalLM"])
    assert_same(rows, oracle(folder, texts))
    assert_same(np.concatenate([embed(model, [text]) for text in texts]), rows)


def test_plain_folder_of_a_bidirectional_decoder_is_pooled_by_its_mean(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "model", "qwen3", AutoModelForCausalLM)
    change(folder / "config.json", is_causal=False)
    assert_same(embed(load_model(folder), TEXTS), oracle(folder, TEXTS))


def test_weights_of_a_model_with_its_head_are_found(folder: Path) -> None:
    """Saved with its head: the same weights, under names that begin with the model's."""
    before = embed(load_model(folder), TEXTS)
    weights = load_file(folder / "model.safetensors")
    heads = {"cls.predictions.bias": torch.ones(3), "cls.predictions.transform.dense.weight": torch.ones(2, 2)}
    named = {f"bert.{name}": tensor for name, tensor in weights.items()}
    save_file({**named, **heads}, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(embed(load_model(folder), TEXTS), before)


def test_tokenizer_that_cuts_the_beginning_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder / "tokenizer_config.json", truncation_side="left")
    load_model(folder)
    assert "its tokenizer cuts a text's beginning; here `truncate` cuts its end" in caplog.text


@pytest.mark.parametrize("tokens", [{"extra_special_tokens": ["[Q]", "river"]}, {"mask_token": "#"}])
def test_special_tokens_that_texts_hold_are_refused(folder: Path, tokens: dict[str, Any]) -> None:
    """The library reads them as special in every text."""
    change(folder / "tokenizer_config.json", extra_special_tokens=["[Q]"])
    load_model(folder)
    change(folder / "tokenizer_config.json", **tokens)
    with pytest.raises(ModelLoadError, match=r"special tokens that texts are likely to hold \((river|#)\)"):
        load_model(folder)


def test_tokenizer_that_gives_types(folder: Path) -> None:
    of_type(folder, 0)
    assert_same(embed(load_model(folder), TEXTS[:5]), oracle(folder, TEXTS[:5]))
