"""What is measured: texts of a given number of content tokens, a mix as traffic has it, and images; drawn with a fixed seed."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

WORDS = "the of model river image vector search quickly train dog straße données 模型 検索 поиск 北京 query sea light"
VOCABULARY = WORDS.split()

LENGTHS = (16, 32, 128, 512)
# Queries and passages together: half under 40 content tokens, one in a hundred over 320.
MIXED = (3.7, 0.9)


def texts(path: Path, name: str, count: int) -> list[str]:
    """`count` texts of the workload `name`: a number of content tokens of the checkpoint's tokenizer, or "mixed"."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    rng = random.Random(name)
    lengths = [min(2000, max(1, round(rng.lognormvariate(*MIXED)))) if name == "mixed" else int(name) for _ in range(count)]
    return [cut(tokenizer, " ".join(rng.choices(VOCABULARY, k=length + 1)), length) for length in lengths]


def cut(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The first `tokens` tokens of a text."""
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return text[: offsets[min(tokens, len(offsets)) - 1][1]]


def images(count: int) -> list[Image.Image]:
    """Images of 512 x 512 pixels, each of its own: noise over a gradient."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 512, dtype=np.uint8)
    return [Image.fromarray(ramp[:, None, None] + rng.integers(0, 55, (512, 512, 3), dtype=np.uint8)) for _ in range(count)]


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()
