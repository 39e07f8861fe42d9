"""How near our vectors come to the official embedder's vectors, on the miniature checkpoint beside this file.

    python -m tests.conformance.report [DEVICE]

prints, for each dtype, how many of the cases pass and the worst cosine.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from app.media.image import decode_image
from models.base import EmbeddingInput
from tests.support.oracle import cosines
from tests.support.paths import CHECKPOINT, CONFORMANCE
from tests.support.whole_model import WholeModel, load_model

CASES: list[dict[str, Any]] = json.loads((CONFORMANCE / "cases" / "cases.json").read_bytes())
# bfloat16 has eight bits of precision, and a cosine between different inputs may be as high as 0.98.
BARS = {"float32": 0.9999, "bfloat16": 0.995}


@cache
def load(dtype: str, device: str = "cpu", backend: str = "packed") -> WholeModel:
    return load_model(CHECKPOINT, device=device, dtype=dtype, backend=backend)


def case_input(case: dict[str, Any]) -> EmbeddingInput:
    """A case as the seam takes it: images first, then the text."""
    files = case.get("image", [])
    files = [files] if isinstance(files, str) else files
    images = [decode_image((CONFORMANCE / "cases" / file).read_bytes(), 1 << 20, 1 << 24) for file in files]
    texts = [case["text"]] if "text" in case else []
    return EmbeddingInput((*images, *texts), case.get("instruction"))


def golden() -> npt.NDArray[np.float32]:
    """The official vectors, float32 of shape (cases, width), in the order of the cases."""
    with np.load(CONFORMANCE / "cases" / "golden.npz") as vectors:
        return np.stack([vectors[case["id"]] for case in CASES])


@dataclass(frozen=True, slots=True)
class Result:
    """How near a model's rows come to the official ones, by case."""

    dtype: str
    cosines: npt.NDArray[np.float64]

    @property
    def passed(self) -> int:
        return int((self.cosines >= BARS[self.dtype]).sum())

    @property
    def worst(self) -> float:
        return float(self.cosines.min())

    def __str__(self) -> str:
        worst = CASES[int(self.cosines.argmin())]["id"]
        return f"{self.dtype:<10}{self.passed}/{len(CASES)}  worst cosine {self.worst:.7f} ({worst})"


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    results = []
    for dtype in BARS:
        model = load(dtype, device)
        # As it is served: compiled, on CUDA, and in graphs.
        model.warm_up()
        prepared = [model.prepare(case_input(case)) for case in CASES]
        solo = np.concatenate([model.embed([item]) for item in prepared])
        together = model.embed(prepared)
        results.append(Result(dtype, np.minimum(cosines(solo, golden()), cosines(together, golden()))))
        print(results[-1])
    return 0 if all(result.passed == len(CASES) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
