"""The EmbeddingModel of Qwen3-VL-Embedding: the last token's hidden state, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, Qwen3VLModel

from models import devices
from models.base import ImageLimits, PreparedInput
from models.base_model import SHORT_TOKENS, USUAL_TOKENS, BaseModel, draw_tokens
from models.checkpoints.pretrained import load_pretrained
from models.qwen3_vl.forward import PackedForward
from models.qwen3_vl.patches import VisionSpec, extract_patches, mrope_positions, plan_image
from models.qwen3_vl.reference import ReferenceForward
from models.qwen3_vl.refusals import check_attention, check_modules, check_patches
from models.qwen3_vl.vision_tower import check_pixels
from models.registry import Family

# The forward pass by the name that BACKEND has for it.
BACKENDS: dict[str, type[PackedForward | ReferenceForward]] = {"packed": PackedForward, "reference": ReferenceForward}
# Tokens of the default instruction and the template before it, which all inputs of a warm-up begin with.
_PREFIX_TOKENS = 14


class Qwen3VLEmbedding(BaseModel):
    """A Qwen3VLModel on a device. Pixels are normalised there, so the settings of the image processor are read too."""

    def __init__(
        self, path: Path, family: Family, *, device: str, dtype: str, backend: str, compile: str, allow_pickle: bool
    ) -> None:
        """Loads the weights in folder `path`; arguments are those of models.registry. Raises ModelLoadError."""
        super().__init__(device, compile)
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        image_processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        self._spec = VisionSpec.from_processor(image_processor)
        check_modules(path)
        check_patches(self._spec, config)
        check_pixels(self._spec, image_processor)
        check_attention(config)
        chosen = devices.choose_dtype(dtype, devices.checkpoint_dtype(config), self._device)
        model = load_pretrained(Qwen3VLModel, path, chosen, allow_pickle).to(self._device).eval()
        self._image_token_id: int = config.image_token_id
        self._vocabulary: int = config.text_config.vocab_size
        self.forward = BACKENDS[backend](model, self._spec)

    def _usual_input(self) -> PreparedInput:
        return self._draw(USUAL_TOKENS)

    def _warm_up_batch(self) -> Sequence[PreparedInput]:
        return [self._draw(SHORT_TOKENS, (64, 64)), self._draw(USUAL_TOKENS)]

    def _samples(self) -> Sequence[Sequence[PreparedInput]]:
        short, usual = self._draw(SHORT_TOKENS), self._draw(USUAL_TOKENS)
        image, large = self._draw(SHORT_TOKENS, (64, 64)), self._draw(SHORT_TOKENS, (512, 512))
        images = self._draw(SHORT_TOKENS, (96, 64), (64, 160))
        return [[short], [usual] * 63 + [short], [image], [large] * 4 + [images, short]]

    def _draw(self, text_tokens: int, *sizes: tuple[int, int]) -> PreparedInput:
        """Draws an input of random tokens, and of gray images of the `sizes` (width, height) behind its prefix."""
        grids = [plan_image(size, ImageLimits(), self._spec) for size in sizes]
        text = draw_tokens(text_tokens, self._vocabulary)
        # A text has no image's token.
        text[text == self._image_token_id] = (self._image_token_id + 1) % self._vocabulary
        image_tokens = [np.full(grid.num_tokens, self._image_token_id) for grid in grids]
        ids = np.concatenate([text[:_PREFIX_TOKENS], *image_tokens, text[_PREFIX_TOKENS:]])
        return PreparedInput(
            token_ids=ids,
            images=tuple(extract_patches(Image.new("RGB", grid.size, "gray"), grid, self._spec) for grid in grids),
            positions=mrope_positions(ids, self._image_token_id, self._spec.merge_size, grids) if grids else None,
            prefix_tokens=_PREFIX_TOKENS,
        )
