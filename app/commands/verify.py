"""`python -m app verify`: does the configured checkpoint, as this machine runs it, give the published figure?

The two sentences, the instruction and their cosine are from the official repository's vLLM example (QwenLM/Qwen3-VL-Embedding),
in bfloat16. The 2B alone has a published figure.
"""

from __future__ import annotations

import sys
from enum import IntEnum

from app.engine.engine import LoadModel
from app.settings import Settings
from models.base import DeviceUnavailable, EmbeddingInput, InvalidInput, ModelInfo, ModelLoadError

INSTRUCTION = "Retrieve images or text relevant to the user's query."
QUERY = "A woman playing with her dog on a beach at sunset."
DOCUMENT = (
    "A woman shares a joyful moment with her golden retriever on a sun-drenched beach at sunset, as the dog offers its paw in a "
    "heartwarming display of companionship and trust."
)
PUBLISHED_COSINE = 0.7896
TOLERANCE = 0.01

# What the 2B looks like: type and width. Another of the same shape cannot be told apart, and has no figure of its own.
JUDGED = ("qwen3_vl", 2048)


class Verdict(IntEnum):
    """The exit code of `python -m app verify`."""

    PASS = 0
    FAIL = 1
    SETTINGS_WRONG = 2
    CANNOT_JUDGE = 4


def verify(settings: Settings, load_model: LoadModel) -> Verdict:
    """Embeds the two sentences, and prints the figure with the verdict."""
    try:
        loaded = load_model()
    except ModelLoadError as error:
        print(error, file=sys.stderr)
        return Verdict.SETTINGS_WRONG if isinstance(error, DeviceUnavailable) else Verdict.FAIL
    preparer = loaded.preparer
    inputs = [EmbeddingInput((QUERY,), INSTRUCTION), EmbeddingInput((DOCUMENT,))]
    try:
        query, document = loaded.model.embed([preparer.prepare(item) for item in inputs])
        verdict, message = judge(float(query @ document), preparer.info)
    except InvalidInput as error:
        verdict, message = Verdict.CANNOT_JUDGE, f"cannot judge: {error}"
    print(f"{settings.model_path} on {preparer.info.device} in {preparer.info.dtype}: {message}")
    return verdict


def judge(cosine: float, info: ModelInfo) -> tuple[Verdict, str]:
    """Judges a cosine of the two sentences; returns the verdict and a line that says it."""
    if (info.model_type, info.width) != JUDGED:
        return Verdict.CANNOT_JUDGE, f"cosine {cosine:.4f}; cannot judge: only Qwen3-VL-Embedding-2B has a published figure"
    passed = abs(cosine - PUBLISHED_COSINE) <= TOLERANCE
    verdict = Verdict.PASS if passed else Verdict.FAIL
    return verdict, f"cosine {cosine:.4f}, published {PUBLISHED_COSINE} within {TOLERANCE}: {'pass' if passed else 'FAIL'}"
