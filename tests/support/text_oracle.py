"""sentence-transformers as the oracle of text models: the same folder and the same texts, there one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from models.base import EmbeddingInput
from tests.support.oracle import Rows, cosines
from tests.support.text_checkpoints import WORDS
from tests.support.whole_model import WholeModel

SAME = 0.99999
LENGTHS = (0, 1, 2, 3, 5, 5, 8, 8, 9, 13, 17, 21, 30, 30, 40, 60)
TEXTS = [" ".join(np.random.default_rng(100 + i).choice(WORDS[:60], n)) for i, n in enumerate(LENGTHS)]


def embed(model: WholeModel, texts: Sequence[str], instruction: str | None = None) -> Rows:
    """Embeds texts in one batch; those that are too long are cut, as the library cuts them."""
    return model.embed([model.prepare(EmbeddingInput((text,), instruction, truncate=True)) for text in texts])


def library(path: Path) -> Any:
    """Loads a folder by the library."""
    return SentenceTransformer(str(path), device="cpu", local_files_only=True)


def oracle(path: Path, texts: Sequence[str], prompt: str | None = None) -> Rows:
    """Returns the library's vectors, of each text alone."""
    model = library(path)
    rows = [model.encode([text], prompt=prompt, normalize_embeddings=True, show_progress_bar=False)[0] for text in texts]
    return np.stack(rows)


def assert_same(one: Rows, other: Rows, bar: float = SAME) -> None:
    """Asserts that every row has a cosine of `bar` or more with the same row of the other."""
    assert one.shape == other.shape
    assert cosines(one, other).min() >= bar
