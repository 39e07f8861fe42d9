"""Text -> ids: special tokens are out of reach of every tokenizer's users, and the checkpoint's own are where they belong."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from models.base import EmbeddingInput, Refusal
from models.text_encoder.prompt import FittedText, TextPrompt, TextTokenizer, instruct
from tests.support.text_checkpoints import CORPUS, FAMILIES, tokenizer_of, write_checkpoint
from tests.support.text_oracle import library_ids
from tests.support.whole_model import load_model

pytestmark = pytest.mark.recorded


@pytest.fixture(params=FAMILIES)
def stock(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(request.param)


def ids(tokenizer: TextTokenizer, text: str, before: str = "", limit: int = 10_000, truncate: bool = False) -> list[int]:
    (fitted,) = tokenizer.fit_all([TextPrompt(before, text)], [limit], [truncate])
    assert isinstance(fitted, FittedText)
    return fitted.ids


def test_tokenizer_leaves_the_stock_one_as_it_was(stock: Any) -> None:
    before = stock.backend_tokenizer.to_str()
    TextTokenizer(stock, lower_case=True)
    assert stock.backend_tokenizer.to_str() == before


def test_special_tokens_are_plain_text(stock: Any) -> None:
    tokenizer = TextTokenizer(stock, lower_case=False)
    specials = {token.content: id for id, token in stock.added_tokens_decoder.items()}
    template = ids(tokenizer, "")
    unknown = getattr(stock.backend_tokenizer.model, "unk_token", None)
    reachable = {stock.backend_tokenizer.token_to_id(unknown or "<unk>")}
    for name in specials:
        assert specials[name] in stock(f"a {name} b")["input_ids"], "the stock tokenizer reads it as a special token"
        for text in (f"a {name} b", name, name * 3, f"a{name}b", f"{name[:2]}{name[2:]}", f" {name} "):
            for before in ("", name, "query: "):
                inside = ids(tokenizer, text, before)
                content = inside[1:-1] if len(template) == 2 else inside[:-1]
                assert not (set(content) - reachable) & set(specials.values())
                assert [*inside[: len(template) - 1], inside[-1]] == template


def test_special_tokens_that_tokenizer_json_does_not_mark(stock: Any, tmp_path: Path) -> None:
    """tokenizer_config.json names them, and the template has them."""
    stock.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    own = json.loads(file.read_text())
    for token in own["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(own))
    test_special_tokens_are_plain_text(AutoTokenizer.from_pretrained(tmp_path, local_files_only=True))


def test_ids_of_clean_texts_are_the_stock_tokenizers(stock: Any) -> None:
    tokenizer = TextTokenizer(stock, lower_case=False)
    for text in [*CORPUS[:20], "", " ", "zzz ÀÉ 海 unknown ✓", "a\nb\t c"]:
        assert ids(tokenizer, text) == stock(text)["input_ids"]
        assert ids(tokenizer, text, limit=9, truncate=True) == stock(text, truncation=True, max_length=9)["input_ids"]


def test_fit_all_fits_each_as_alone(stock: Any) -> None:
    tokenizer = TextTokenizer(stock, lower_case=False)
    prompts = [TextPrompt("query: " if index % 2 else "", text * (1 + index % 40)) for index, text in enumerate(CORPUS[:60])]
    limits = [20 + index for index in range(60)]
    together = tokenizer.fit_all(prompts, limits, [index % 3 > 0 for index in range(60)])
    for index, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = tokenizer.fit_all([prompt], [limits[index]], [index % 3 > 0])
        assert alone == found
    assert {type(found) for found in together} == {FittedText, Refusal}


def test_ids_in_many_threads(stock: Any) -> None:
    tokenizer = TextTokenizer(stock, lower_case=False)
    expected = [ids(tokenizer, text) for text in CORPUS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: ids(tokenizer, text), CORPUS)) == expected


def test_limit_holds_to_the_token(stock: Any) -> None:
    tokenizer = TextTokenizer(stock, lower_case=False)
    count = len(ids(tokenizer, CORPUS[0]))
    assert len(ids(tokenizer, CORPUS[0], limit=count)) == count
    (refused,) = tokenizer.fit_all([TextPrompt("", CORPUS[0])], [count - 1], [False])
    assert isinstance(refused, Refusal)
    assert f"{count} tokens" in refused.message
    for limit in range(3, count):
        cut = ids(tokenizer, CORPUS[0], limit=limit, truncate=True)
        assert len(cut) == limit
        assert cut[-1] == ids(tokenizer, CORPUS[0])[-1], "the special token at the end stays"


@pytest.mark.parametrize("limit", [-1, 0, 1, 2])
def test_limit_below_the_template_is_refused(stock: Any, limit: int) -> None:
    tokenizer = TextTokenizer(stock, lower_case=False)
    for found in tokenizer.fit_all([TextPrompt("query: ", "text")] * 2, [limit] * 2, [True, False]):
        assert isinstance(found, Refusal)


@pytest.mark.parametrize("truncate", [False, True])
def test_truncation_of_a_word_that_is_read_in_part(stock: Any, truncate: bool) -> None:
    """Whole it may be one unknown token, and its beginning dozens."""
    tokenizer = TextTokenizer(stock, lower_case=False)
    limit = 6
    for word in ("runs", "beach"):
        for blanks in range(0, 32 * limit, 7):
            text = " " * blanks + word * 300
            expected = stock(text)["input_ids"]
            if len(expected) <= limit:
                assert ids(tokenizer, text, limit=limit, truncate=truncate) == expected
            elif truncate:
                assert (
                    ids(tokenizer, text, limit=limit, truncate=True)
                    == stock(text, truncation=True, max_length=limit)["input_ids"]
                )


def test_describe_shows_of_a_cut_text_what_is_read(stock: Any) -> None:
    tokenizer = TextTokenizer(stock, lower_case=False)
    prompt = TextPrompt("query: ", CORPUS[1] * 50)
    for limit in (12, 20, 300):
        (fitted,) = tokenizer.fit_all([prompt], [limit], [True])
        assert isinstance(fitted, FittedText)
        shown = tokenizer.cut_text(prompt, fitted)
        assert prompt.render().startswith(shown)
        # A character of several tokens is shown whole.
        assert ids(tokenizer, shown)[: limit - 1] == fitted.ids[:-1]
        assert len(ids(tokenizer, shown)) <= limit + 3


NORMALIZERS = {
    "alone": normalizers.Lowercase(),
    "among others": normalizers.Sequence([normalizers.Replace("A", "b"), normalizers.Lowercase()]),
    "within another": normalizers.BertNormalizer(lowercase=True),
    "of others": normalizers.Sequence([normalizers.Replace("A", "b")]),
}


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_lower_case_is_not_applied_twice(kind: str, tmp_path: Path) -> None:
    """The library puts a text into lower case first only where none of the tokenizer's own steps does."""
    folder = write_checkpoint(tmp_path / "model", transformer={"max_seq_length": 128, "do_lower_case": True})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = NORMALIZERS[kind]
    tokenizer.save(str(folder / "tokenizer.json"))
    model = load_model(folder)
    for text in ("A dog plays", "THE RIVER RUNS TO A BEACH", "a b A B"):
        assert model.prepare(EmbeddingInput((text,))).token_ids.tolist() == library_ids(folder, text)


def test_instruction_in_qwen3s_form() -> None:
    assert instruct("Find music") == "Instruct: Find music\nQuery:"
    assert instruct("") == ""
