"""Which prefixes are computed, which are kept, and that inputs on a prefix get the vectors that they get without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.base import EmbeddingInput, PreparedInput
from models.packed import prefix_cache
from models.packed.prefix_cache import PrefixCache
from tests.conformance.report import load
from tests.support.oracle import cosines


def item(*ids: int, prefix: int) -> PreparedInput:
    return PreparedInput(np.array(ids), prefix_tokens=prefix)


class Recorder:
    """A `compute` that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, token_ids: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self.asked.append(token_ids.tolist())
        return [(torch.zeros(len(token_ids), 1, 1), torch.zeros(len(token_ids), 1, 1))]


def test_prefix_cache_computes_a_prefix_for_its_third_input() -> None:
    compute = Recorder()
    cache = PrefixCache(compute)
    assert cache.for_batch([item(1, 2, 9, prefix=2)]) == [None]
    assert cache.for_batch([item(1, 2, 9, prefix=2)]) == [None]
    (found,) = cache.for_batch([item(1, 2, 8, prefix=2)])
    assert found is not None
    assert (found.length, compute.asked) == (2, [[1, 2]])
    assert cache.for_batch([item(1, 2, 7, prefix=2)]) == [found]
    assert len(compute.asked) == 1


def test_prefix_cache_shares_a_prefix_within_a_batch() -> None:
    compute = Recorder()
    batch = [item(1, 2, 9, prefix=2), item(5, 6, prefix=1), item(1, 2, 7, prefix=2), item(1, 2, 3, prefix=2)]
    found = PrefixCache(compute).for_batch(batch)
    assert found[0] is found[2] is found[3] is not None
    assert found[1] is None
    assert compute.asked == [[1, 2]]


def test_prefix_cache_computes_few_for_a_batch_and_the_most_frequent() -> None:
    compute = Recorder()
    cache = PrefixCache(compute)
    batch = [item(first, 9, prefix=1) for first in range(20) for _ in range(4 if first in (3, 17) else 3)]
    cache.for_batch(batch)
    assert len(compute.asked) == prefix_cache.MAX_NEW
    assert [3] in compute.asked
    assert [17] in compute.asked


def test_prefix_cache_leaves_empty_and_long_ones_alone() -> None:
    compute = Recorder()
    long = list(range(prefix_cache.MAX_PREFIX_TOKENS + 1))
    batch = [item(1, prefix=0), item(*long, 1, prefix=len(long))] * 3
    assert PrefixCache(compute).for_batch(batch) == [None] * 6
    assert compute.asked == []


def test_prefix_cache_evicts_the_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_TOKENS", 4)
    compute = Recorder()
    cache = PrefixCache(compute)
    for first in (1, 2, 1, 3):
        cache.for_batch([item(first, 0, 9, prefix=2)] * 3)
    assert compute.asked == [[1, 0], [2, 0], [3, 0]]
    assert len(cache) == 2
    cache.for_batch([item(1, 0, 9, prefix=2)] * 3)
    assert len(compute.asked) == 3
    cache.for_batch([item(2, 0, 9, prefix=2)] * 3)
    assert compute.asked[3:] == [[2, 0]]


def test_prefix_cache_forgets_old_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_COUNTED", 2)
    compute = Recorder()
    cache = PrefixCache(compute)
    for first in (1, 1, 2, 3, 1):
        cache.for_batch([item(first, 9, prefix=1)])
    assert compute.asked == []
    for _ in range(3):
        cache.for_batch([item(9, 9, prefix=1)])
    assert compute.asked == [[9]]


TEXTS = ["dog", "", "\n\nafter two newlines", "\nx", " a", "river " * 40, "größe 検索 🚀"]
INSTRUCTIONS = [None, "Find duplicates!", "Represent the document for retrieval"]


def test_prefix_gives_the_vectors_without_it() -> None:
    """Many instructions in one batch, texts that merge with the template's last newline among them; cold, then warm."""
    model = load("float32")
    prepared = [model.prepare(EmbeddingInput((text,), instruction)) for instruction in INSTRUCTIONS for text in TEXTS]
    whole = np.concatenate([model.embed([replace(one, prefix_tokens=0)]) for one in prepared])
    assert all(one.prefix_tokens > 10 for one in prepared)
    for _ in range(2):
        near = cosines(model.embed(prepared), whole)
        assert near.min() >= 0.9999999, near.min()


def test_prefix_is_what_inputs_of_an_instruction_share() -> None:
    model = load("float32")
    for instruction in INSTRUCTIONS:
        one, other = (model.prepare(EmbeddingInput((text,), instruction)) for text in ("dog", "2 cats"))
        length = one.prefix_tokens
        assert length == other.prefix_tokens
        assert one.token_ids[:length].tolist() == other.token_ids[:length].tolist()
        assert one.token_ids[length] != other.token_ids[length]


def test_prefix_is_shorter_for_a_text_that_merges_with_the_template() -> None:
    """As a leading newline does where the tokenizer has a token for two of them; the reference tokenizer has none."""
    tokenizer = load("float32").preparer._tokenizer
    prompt = tokenizer.prompt("Find duplicates!", ["dog"])
    ids = tokenizer.encode(prompt)
    length = tokenizer.prefix_length(prompt, ids)
    assert ids[length] == tokenizer.encode(tokenizer.prompt("Find duplicates!", ["dogs"]))[length]
    assert tokenizer.prefix_length(prompt, [*ids[: length - 1], 77, *ids[length:]]) == length - 1
    assert tokenizer.prefix_length(tokenizer.prompt("x" * 5000, ["dog"]), ids) == 0
