"""A checkpoint's two halves in one object, for tests and tools that prepare and embed in one place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.base import Description, EmbeddingInput, LoadedModel, ModelInfo, PreparedImage, PreparedInput, Refusal
from models.registry import load_checkpoint


class WholeModel:
    """A Preparer and an EmbeddingModel of one checkpoint; every method is that of the half that has it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.preparer: Any = loaded.preparer
        self.model: Any = loaded.model

    @property
    def info(self) -> ModelInfo:
        info: ModelInfo = self.preparer.info
        return info

    def reduced_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        found: tuple[int, int] | None = self.preparer.reduced_size(size)
        return found

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        found: PreparedImage = self.preparer.prepare_image(image, original_size)
        return found

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        found: PreparedInput = self.preparer.prepare(item)
        return found

    def prepare_all(self, items: Sequence[EmbeddingInput]) -> list[PreparedInput | Refusal]:
        found: list[PreparedInput | Refusal] = self.preparer.prepare_all(items)
        return found

    def describe(self, item: EmbeddingInput) -> Description:
        found: Description = self.preparer.describe(item)
        return found

    def embed(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self.model.embed(batch)
        return found

    def warm_up(self) -> float:
        found: float = self.model.warm_up()
        return found

    def memory_bytes(self) -> int:
        found: int = self.model.memory_bytes()
        return found

    def load_both(self) -> LoadedModel:
        """Returns the halves as an engine wants them, so that a test may serve a model that is loaded already."""
        return LoadedModel(self.preparer, self.model)


def load_model(path: Path, **options: Any) -> WholeModel:
    """Loads both halves of the checkpoint in folder `path`, by default on the CPU in float32, its images within 512 pixels;
    `options` are those of models.registry."""
    defaults = {"device": "cpu", "dtype": "float32", "max_image_width": 512, "max_image_height": 512, "allow_pickle": False}
    return WholeModel(load_checkpoint(path, **{**defaults, **options}))
