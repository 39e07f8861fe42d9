"""Positions after the padding token, against transformers' own rule, and the tokens that leaves for a text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.mpnet.modeling_mpnet import create_position_ids_from_input_ids

from models.text_encoder.positions import after_padding, max_length, padding_id
from tests.support.text_checkpoints import FAMILIES, config_of, tokenizer_of


@pytest.mark.parametrize("padding", [0, 1, 7])
@pytest.mark.parametrize("seed", range(5))
def test_positions_are_those_of_transformers(padding: int, seed: int) -> None:
    """Of each sequence by itself, with padding tokens at its beginning, within it and at its end, or none."""
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 10 if seed else 5 + padding, length) for length in (1, 4, 9, 30)]
    lengths = np.array([len(ids) for ids in sequences])
    counted = np.concatenate([np.arange(length) for length in lengths])
    expected = [create_position_ids_from_input_ids(torch.from_numpy(ids)[None], padding)[0] for ids in sequences]
    found = after_padding(np.concatenate(sequences), counted, lengths, padding)
    assert found.tolist() == torch.cat(expected).tolist()


def test_positions_without_a_padding_token_are_counted_after_it() -> None:
    assert after_padding(np.array([5, 6, 7]), np.array([0, 0, 1]), np.array([1, 2]), 1).tolist() == [2, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_max_length_leaves_out_the_positions_up_to_the_padding(family: str) -> None:
    config = config_of(family, tokenizer_of(family))
    after = {"mpnet": 1, "roberta": config.pad_token_id, "xlm-roberta": config.pad_token_id}
    assert padding_id(config) == after.get(family)
    assert max_length(config) == (130 if family not in after else 130 - after[family] - 1)
