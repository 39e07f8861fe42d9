"""Text models here and in sentence-transformers itself: the same folder, the same texts, one at a time there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from models.base import EmbeddingInput, EmbeddingModel
from tests.support.oracle import Rows, cosines
from tests.support.text_checkpoints import WORDS
from tests.support.whole_model import load_model

SAME = 0.99999
LENGTHS = (0, 1, 2, 3, 5, 5, 8, 8, 9, 13, 17, 21, 30, 30, 40, 60)
TEXTS = [" ".join(np.random.default_rng(100 + i).choice(WORDS[:60], n)) for i, n in enumerate(LENGTHS)]


def load(path: Path, **changes: Any) -> EmbeddingModel:
    settings: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_image_width": 512, "max_image_height": 512, "allow_pickle": False
    }  # fmt: skip
    return load_model(path, **{**settings, **changes})


def embed(model: EmbeddingModel, texts: Sequence[str], instruction: str | None = None) -> Rows:
    """All of them in one batch, cut where they are too long, as the library cuts them."""
    return model.embed([model.prepare(EmbeddingInput((text,), instruction, truncate=True)) for text in texts])


def library(path: Path) -> Any:
    return SentenceTransformer(str(path), device="cpu", local_files_only=True)


def oracle(path: Path, texts: Sequence[str], prompt: str | None = None) -> Rows:
    """The library's vectors, each text alone."""
    model = library(path)
    rows = [model.encode([text], prompt=prompt, normalize_embeddings=True, show_progress_bar=False)[0] for text in texts]
    return np.stack(rows)


def same(one: Rows, other: Rows, bar: float = SAME) -> None:
    assert one.shape == other.shape
    assert cosines(one, other).min() >= bar
