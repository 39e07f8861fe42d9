"""What another library answered, recorded: for answers that cost seconds to ask for, and hardly ever change.

An answer is kept under a digest of the whole question, so that a question that was never asked fails and is not answered by
another's answer. pytest's --library says where answers come from: the recording, or the library itself (`live`), which must then
say the same, or the library for a new recording (`record`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.paths import ROOT

SOURCES = ("recorded", "live", "record")
# Floats are kept as float16. For unit vectors that is a cosine of 0.9999999.
NEAR = 2e-3


class Recording:
    """Answers in a file, and where they come from now."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.source = "recorded"
        self._kept: dict[str, npt.NDArray[Any]] | None = None
        self._new: dict[str, npt.NDArray[Any]] = {}

    def answer(self, question: Any, ask: Callable[[], npt.ArrayLike]) -> npt.NDArray[Any]:
        """The answer to a question that JSON can hold; `ask` asks the library. Raises AssertionError if it is not recorded, or if
        the library says otherwise by now."""
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:20]
        if self.source == "record":
            return self._record(key, np.asarray(ask()))
        if self._kept is None:
            with np.load(self._file) as kept:
                self._kept = dict(kept)
        assert key in self._kept, f"{self._file.name} has no answer to this: `make recording` asks the library anew"
        recorded = self._kept[key]
        if self.source == "live":
            answer = np.asarray(ask())
            assert _same(answer, recorded), f"the library says otherwise than {self._file.name}"
            return answer
        return recorded.astype(np.float32) if recorded.dtype == np.float16 else recorded

    def _record(self, key: str, answer: npt.NDArray[Any]) -> npt.NDArray[Any]:
        small = answer.astype(np.float16) if answer.dtype.kind == "f" else answer
        assert _same(small, self._new.setdefault(key, small)), "two questions differ in something that is not part of the key"
        return answer

    def save(self) -> None:
        """Write what was recorded in this run, and nothing of before."""
        if self.source == "record":
            np.savez_compressed(self._file, **dict(sorted(self._new.items())))  # type: ignore[arg-type]


def _same(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    return one.shape == other.shape and np.allclose(one.astype(np.float64), other.astype(np.float64), rtol=0, atol=NEAR)


SENTENCE_TRANSFORMERS = Recording(ROOT / "tests" / "models" / "text_encoder" / "sentence_transformers.npz")
