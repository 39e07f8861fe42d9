"""sentence-transformers as the oracle of text models: the same folder and the same texts, there one at a time.

What the library says is recorded; see tests/support/recorded.py. A question is what the folder's JSON files say and what is asked
of it. Weights are no part of it: where they are drawn otherwise than when the vectors were recorded, the vectors differ.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.base import EmbeddingInput
from tests.support.oracle import Rows, cosines
from tests.support.recorded import SENTENCE_TRANSFORMERS
from tests.support.text_checkpoints import WORDS
from tests.support.whole_model import WholeModel

SAME = 0.99999
LENGTHS = (0, 1, 2, 3, 5, 5, 8, 8, 9, 13, 17, 21, 30, 30, 40, 60)
TEXTS = [" ".join(np.random.default_rng(100 + i).choice(WORDS[:60], n)) for i, n in enumerate(LENGTHS)]


def embed(model: WholeModel, texts: Sequence[str], instruction: str | None = None) -> Rows:
    """Embeds texts in one batch; those that are too long are cut, as the library cuts them."""
    return model.embed([model.prepare(EmbeddingInput((text,), instruction, truncate=True)) for text in texts])


def library(path: Path) -> Any:
    """The folder as the library itself loads it: for tests that are marked `live`."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", local_files_only=True)


_last_library: tuple[tuple[Path, dict[str, str]], Any] | None = None


def _kept_library(path: Path) -> Any:
    """The same, loaded anew only where the folder is another than at the last call, or says something else."""
    global _last_library
    folder = path, said_by(path)
    if _last_library is None or _last_library[0] != folder:
        _last_library = folder, library(path)
    return _last_library[1]


def oracle(path: Path, texts: Sequence[str], prompt: str | None = None) -> Rows:
    """The library's vectors, each text alone."""

    def ask() -> Rows:
        model = _kept_library(path)
        rows = [model.encode([text], prompt=prompt, normalize_embeddings=True, show_progress_bar=False)[0] for text in texts]
        return np.stack(rows)

    return SENTENCE_TRANSFORMERS.answer([said_by(path), "vectors", list(texts), prompt], ask)


def library_ids(path: Path, text: str, **options: Any) -> list[int]:
    """The ids that the library's tokenizer gives a text, special ones included; `options` are the tokenizer's."""
    question = [said_by(path), "ids", text, options]
    ids: list[int] = SENTENCE_TRANSFORMERS.answer(
        question, lambda: library(path).tokenizer(text, **options)["input_ids"]
    ).tolist()
    return ids


def library_limit(path: Path) -> int:
    """The tokens that the library takes of a text."""
    return int(SENTENCE_TRANSFORMERS.answer([said_by(path), "limit"], lambda: _kept_library(path).max_seq_length))


def said_by(path: Path) -> dict[str, str]:
    """A digest of what each of a folder's JSON files says, by its name. Which transformers wrote it does not matter."""
    return {file.relative_to(path).as_posix(): _digest(file.read_bytes()) for file in sorted(path.rglob("*.json"))}


def _digest(data: bytes) -> str:
    return hashlib.sha256(re.sub(rb'"transformers_version": "[^"]*"', b"", data)).hexdigest()


def assert_same(one: Rows, other: Rows, bar: float = SAME) -> None:
    """Asserts that every row has a cosine of `bar` or more with the same row of the other."""
    assert one.shape == other.shape
    assert cosines(one, other).min() >= bar
