"""The Preparer of Qwen3-VL-Embedding: chat prompt, token ids and image patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from models import devices
from models.base import (
    Description,
    EmbeddingInput,
    ImageGrid,
    ImageLimits,
    InputTooLong,
    ModelInfo,
    PreparedImage,
    PreparedInput,
    Refusal,
)
from models.base_preparer import BasePreparer
from models.checkpoints.fingerprint import fingerprint
from models.checkpoints.weights import stored_tensors
from models.qwen3_vl.patches import VisionSpec, extract_patches, largest_image, mrope_positions, plan_image
from models.qwen3_vl.prompt import ChatPrompt, ChatTokenizer, FittedChat, tidy_instruction
from models.qwen3_vl.refusals import check_image_token, check_patches
from models.registry import Family

# The prompt of an input, and the grids of its images.
ChatPlan = tuple[ChatPrompt, tuple[ImageGrid, ...]]


class Qwen3VLPreparer(BasePreparer[ChatPlan, FittedChat]):
    """A Preparer of texts and images."""

    def __init__(self, path: Path, family: Family, *, device: str, dtype: str, limits: ImageLimits, allow_pickle: bool) -> None:
        """Reads the checkpoint in folder `path`; arguments are those of models.registry. Raises ModelLoadError."""
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        self._limits = limits
        self._spec = VisionSpec.from_processor(processor.image_processor)
        check_patches(self._spec, config)
        self._tokenizer = ChatTokenizer(processor)
        check_image_token(self._tokenizer.image_token_id, config)
        chosen = str(devices.choose_dtype(dtype, devices.checkpoint_dtype(config), torch.device(device)))
        settings = {
            "dtype": chosen,
            "image_limits": (limits.max_width, limits.max_height),
            "transparent_is_white": self._spec.whitens,
        }
        self.info = ModelInfo(
            model_type=config.model_type,
            width=config.text_config.hidden_size,
            max_tokens=config.text_config.max_position_embeddings,
            device=device,
            dtype=chosen.removeprefix("torch."),
            fingerprint=fingerprint(path, stored_tensors(path, allow_pickle), settings),
            supports_images=True,
            cuda_available=torch.cuda.is_available(),
            largest_image=largest_image(limits, self._spec),
            image_token_bytes=self._spec.factor**2 * 3,
        )

    def reduced_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Returns the size that the limits make of an image, if they make it smaller than the official size. Raises
        InvalidInput."""
        grid = plan_image(size, self._limits, self._spec)
        return grid.size if grid.official_size else None

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        """Resizes an image of mode RGB, and cuts it into patches. Raises InvalidInput."""
        return extract_patches(image, plan_image(original_size or image.size, self._limits, self._spec), self._spec)

    def describe(self, item: EmbeddingInput) -> Description:
        """Describes what `prepare` would make of an input, without its pixels. Raises InvalidInput, but not for its length."""
        prompt, grids = self._plan(item)
        image_tokens = sum(prompt.image_tokens)
        try:
            fitted = self._tokenizer.fit(prompt, self._limit(item), item.truncate)
        except InputTooLong as error:
            countable = not self._tokenizer.surely_over(prompt, self.info.max_tokens)
            text_tokens = len(self._tokenizer.encode(prompt)) - image_tokens if countable else None
            return Description(prompt.render(), text_tokens, image_tokens, grids, truncated=False, refusal=str(error))
        text_tokens = len(fitted.ids) - image_tokens
        return Description(fitted.prompt.render(), text_tokens, image_tokens, grids, truncated=fitted.truncated, refusal=None)

    def _plan(self, item: EmbeddingInput) -> ChatPlan:
        """Counts every image's tokens by its size alone: an input that is refused costs no resizing."""
        instruction = item.instruction if item.verbatim and item.instruction is not None else tidy_instruction(item.instruction)
        grids = {
            index: part.grid if isinstance(part, PreparedImage) else plan_image(part.size, self._limits, self._spec)
            for index, part in enumerate(item.parts)
            if not isinstance(part, str)
        }
        parts = [part if isinstance(part, str) else grids[index].num_tokens for index, part in enumerate(item.parts)]
        return self._tokenizer.prompt(instruction, parts), tuple(grids.values())

    def _fit(self, plans: Sequence[ChatPlan], limits: Sequence[int], truncate: Sequence[bool]) -> list[FittedChat | Refusal]:
        return self._tokenizer.fit_all([prompt for prompt, _ in plans], limits, truncate)

    def _assemble(self, item: EmbeddingInput, plan: ChatPlan, fitted: FittedChat) -> PreparedInput:
        _, grids = plan
        token_ids = np.array(fitted.ids, dtype=np.int64)
        images = [part for part in item.parts if not isinstance(part, str)]
        return PreparedInput(
            token_ids=token_ids,
            images=tuple(
                image if isinstance(image, PreparedImage) else extract_patches(image, grid, self._spec)
                for image, grid in zip(images, grids, strict=True)
            ),
            positions=mrope_positions(token_ids, self._tokenizer.image_token_id, self._spec.merge_size, grids) if grids else None,
            truncated=fitted.truncated,
            prefix_tokens=self._tokenizer.prefix_length(fitted.prompt, fitted.ids),
        )
