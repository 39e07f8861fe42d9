"""Inputs for a model of texts and images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from models.base import EmbeddingInput


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mixed() -> list[EmbeddingInput]:
    """Inputs of every kind, short and long, more than one group of them."""
    words = ["the", "river", "runs", "through", "the", "old", "town", "and", "then", "out", "to", "the", "sea"]
    texts = [EmbeddingInput((" ".join(words[i % 7 :] * (1 + i % 5)) + str(i),)) for i in range(28)]
    images = [EmbeddingInput((noise(40 + 30 * i, 200 - 20 * i),)) for i in range(5)]
    fused = [EmbeddingInput((noise(64, 32 + 32 * i), f"picture {i}"), instruction=f"Find {i}") for i in range(4)]
    pairs = [EmbeddingInput((noise(64, 96), "and", noise(96 + 32 * i, 64))) for i in range(3)]
    return texts + images + fused + pairs
