"""The Qwen3-VL-Embedding family: any checkpoint whose config.json says `model_type: qwen3_vl`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, Qwen3VLModel

from models import devices, rates
from models.base import (
    Description,
    EmbeddingInput,
    ImageGrid,
    ImageLimits,
    InputTooLong,
    InvalidInput,
    ModelInfo,
    PreparedImage,
    PreparedInput,
    Refusal,
)
from models.checkpoints.fingerprint import fingerprint
from models.checkpoints.pretrained import load_pretrained
from models.qwen3_vl.forward import PackedForward
from models.qwen3_vl.patches import VisionSpec, extract_patches, largest_image, mrope_positions, plan_image
from models.qwen3_vl.prompt import Fitted, Prompt, PromptTokenizer, tidy_instruction
from models.qwen3_vl.reference import ReferenceForward
from models.qwen3_vl.refusals import check_config, check_modules, check_pixels, check_processor

# How the forward pass is run; `reference` is transformers' own, padded: the oracle of the other.
BACKENDS: dict[str, type[PackedForward | ReferenceForward]] = {"packed": PackedForward, "reference": ReferenceForward}


class Qwen3VLEmbedding:
    """An EmbeddingModel: the last token's hidden state, normalised."""

    def __init__(
        self, path: Path, *, device: str, dtype: str, backend: str, compile: str, limits: ImageLimits, allow_pickle: bool
    ) -> None:
        """Load a checkpoint. `device` is a torch device, `dtype` "auto" or a torch dtype's name, `backend` a key of BACKENDS,
        `compile` as load_model has it.

        Raises ModelLoadError.
        """
        self._device = torch.device(device)
        if self._device.type == "cuda":
            # For this thread, which is the one that embeds: streams and graphs are the current device's.
            torch.cuda.set_device(self._device.index or 0)
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        self._limits = limits
        self._spec = VisionSpec.from_processor(processor.image_processor)
        self._tokenizer = PromptTokenizer(processor)
        check_modules(path)
        check_processor(self._spec, self._tokenizer, config)
        check_pixels(self._spec, processor.image_processor)
        check_config(config)
        chosen = devices.choose_dtype(dtype, devices.checkpoint_dtype(config), self._device)
        model = load_pretrained(Qwen3VLModel, path, chosen, allow_pickle).to(self._device).eval()
        self._max_tokens: int = config.text_config.max_position_embeddings
        settings = {
            "dtype": str(chosen),
            "image_limits": (limits.max_width, limits.max_height),
            "transparent_is_white": self._spec.whitens,
        }
        digest = fingerprint(path, model.state_dict(), settings=settings)
        self._forward = BACKENDS[backend](model, self._spec)
        self._compile = compile
        self.info = ModelInfo(
            model_type=config.model_type,
            width=config.text_config.hidden_size,
            max_tokens=self._max_tokens,
            device=str(self._device),
            dtype=str(chosen).removeprefix("torch."),
            fingerprint=digest,
            supports_images=True,
            cuda_available=torch.cuda.is_available(),
            largest_image=largest_image(limits, self._spec),
            image_token_bytes=self._spec.factor**2 * 3,
        )

    def reduced_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """What the limits make of an image of `size`, where that is less than the official size. Raises InvalidInput."""
        grid = plan_image(size, self._limits, self._spec)
        return grid.size if grid.official_size else None

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        """Resize an image of mode RGB, and cut it into patches. Raises InvalidInput."""
        return extract_patches(image, plan_image(original_size or image.size, self._limits, self._spec), self._spec)

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        """Tokenise, and cut images into patches. Raises InvalidInput."""
        prompt, grids = self._plan(item)
        return self._prepared(item, prompt, grids, self._tokenizer.fit(prompt, self._limit(item), item.truncate))

    def prepare_all(self, items: Sequence[EmbeddingInput]) -> list[PreparedInput | Refusal]:
        """Each as `prepare` has it, or its error; their texts are tokenised in one go."""
        results: dict[int, PreparedInput | Refusal] = {}
        plans: dict[int, tuple[Prompt, tuple[ImageGrid, ...]]] = {}
        for index, item in enumerate(items):
            try:
                plans[index] = self._plan(item)
            except InvalidInput as error:
                results[index] = Refusal(str(error))
        fitted = self._tokenizer.fit_all(
            [prompt for prompt, _ in plans.values()],
            [self._limit(items[index]) for index in plans],
            [items[index].truncate for index in plans],
        )
        for (index, (prompt, grids)), found in zip(plans.items(), fitted, strict=True):
            results[index] = (
                Refusal(str(found)) if isinstance(found, InputTooLong) else self._prepared(items[index], prompt, grids, found)
            )
        return [results[index] for index in range(len(items))]

    def _prepared(self, item: EmbeddingInput, prompt: Prompt, grids: tuple[ImageGrid, ...], found: Fitted) -> PreparedInput:
        fitted, ids = found
        token_ids = np.array(ids, dtype=np.int64)
        images = [part for part in item.parts if not isinstance(part, str)]
        return PreparedInput(
            token_ids=token_ids,
            images=tuple(
                image if isinstance(image, PreparedImage) else extract_patches(image, grid, self._spec)
                for image, grid in zip(images, grids, strict=True)
            ),
            positions=mrope_positions(token_ids, self._tokenizer.image_token_id, self._spec.merge_size, grids) if grids else None,
            truncated=fitted is not prompt,
            prefix_tokens=self._tokenizer.prefix_length(fitted, ids),
        )

    def describe(self, item: EmbeddingInput) -> Description:
        """What `prepare` would make of an input, without its pixels. Raises InvalidInput, but not for its length."""
        prompt, grids = self._plan(item)
        image_tokens = sum(prompt.image_tokens)
        try:
            fitted, ids = self._tokenizer.fit(prompt, self._limit(item), item.truncate)
        except InputTooLong as error:
            countable = not self._tokenizer.surely_over(prompt, self._max_tokens)
            text_tokens = len(self._tokenizer.encode(prompt)) - image_tokens if countable else None
            return Description(prompt.render(), text_tokens, image_tokens, grids, truncated=False, refusal=str(error))
        return Description(
            fitted.render(), len(ids) - image_tokens, image_tokens, grids, truncated=fitted is not prompt, refusal=None
        )

    def embed(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Unit vectors, float32 of shape (len(batch), width). Raises OutOfDeviceMemory, DeviceLost."""
        return devices.run(self._forward, batch)

    def warm_up(self) -> float:
        """Run texts of growing number and an image, compiled where that pays; tokens per second of the largest batch of texts."""
        text = self.prepare(EmbeddingInput(("warm-up " * 24,)))
        image = self.prepare(EmbeddingInput((Image.new("RGB", (64, 64)), "warm-up")))
        images = self.prepare(EmbeddingInput((Image.new("RGB", (96, 64)), Image.new("RGB", (64, 160)))))
        if isinstance(self._forward, PackedForward) and self._compile != "off" and self._device.type == "cuda":
            word = self.prepare(EmbeddingInput(("warm-up",)))
            large = self.prepare(EmbeddingInput((Image.new("RGB", (512, 512), "gray"),)))
            # What varies is compiled for the size that it has first: the usual one, of a full batch.
            samples = [[word], [text] * 63 + [word], [image], [large] * 4 + [images, word]]
            self._forward.optimize(samples, graphs=self._compile == "auto")
        self.embed([image, text])
        return rates.measure(self.embed, text)

    @property
    def device(self) -> str:
        """The torch device."""
        return self.info.device

    def memory_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0

    def _limit(self, item: EmbeddingInput) -> int:
        return self._max_tokens if item.max_tokens is None else min(item.max_tokens, self._max_tokens)

    def _plan(self, item: EmbeddingInput) -> tuple[Prompt, tuple[ImageGrid, ...]]:
        """The prompt with every image's tokens counted from its size alone: what is refused costs no resizing."""
        instruction = item.instruction if item.verbatim and item.instruction is not None else tidy_instruction(item.instruction)
        grids = {
            index: part.grid if isinstance(part, PreparedImage) else plan_image(part.size, self._limits, self._spec)
            for index, part in enumerate(item.parts)
            if not isinstance(part, str)
        }
        parts = [part if isinstance(part, str) else grids[index].num_tokens for index, part in enumerate(item.parts)]
        return self._tokenizer.prompt(instruction, parts), tuple(grids.values())
