"""The official embedder's procedure, said again by stock transformers and qwen_vl_utils alone.

It shares no code with models/, so that what holds for both is no accident. One input at a time, in float32 unless told
otherwise, on the CPU, and without its length limit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor, Qwen3VLModel
from transformers.utils import logging

DEFAULT_INSTRUCTION = "Represent the user's input."
PIXEL_BOUNDS = {"min_pixels": 4 * 32 * 32, "max_pixels": 1800 * 32 * 32}

Part = str | Image.Image
Rows = npt.NDArray[np.float32]


class Oracle:
    """A checkpoint as its publishers run it."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True)
        self.model: Any = Qwen3VLModel.from_pretrained(path, dtype=dtype, local_files_only=True).eval()

    def conversation(self, parts: Sequence[Part], instruction: str | None = None) -> list[dict[str, Any]]:
        instruction = (instruction or "").strip()
        if instruction and unicodedata.category(instruction[-1])[0] != "P":
            instruction += "."
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part, **PIXEL_BOUNDS}
            for part in parts
        ]
        return [
            {"role": "system", "content": [{"type": "text", "text": instruction or DEFAULT_INSTRUCTION}]},
            {"role": "user", "content": content},
        ]

    def rendered(self, parts: Sequence[Part], instruction: str | None = None) -> str:
        conversation = self.conversation(parts, instruction)
        prompt: str = self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return prompt

    def inputs(self, parts: Sequence[Part], instruction: str | None = None) -> Any:
        """What the model's forward takes, as a batch of one."""
        conversation = self.conversation(parts, instruction)
        patch_size = self.processor.image_processor.patch_size
        images, _ = process_vision_info(conversation, image_patch_size=patch_size)
        return self.processor(text=[self.rendered(parts, instruction)], images=images, do_resize=False, return_tensors="pt")

    def ids(self, parts: Sequence[Part], instruction: str | None = None) -> list[int]:
        ids: list[int] = self.inputs(parts, instruction)["input_ids"][0].tolist()
        return ids

    @torch.inference_mode()
    def vector(self, parts: Sequence[Part], instruction: str | None = None) -> Rows:
        """The unit vector of one input, float32 of shape (width,)."""
        inputs = self.inputs(parts, instruction)
        assert "mm_token_type_ids" in inputs, "without them the stock model counts images as text"
        hidden = self.model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(dim=1) - 1
        row: Rows = torch.nn.functional.normalize(hidden[0, last[0]], dim=-1).numpy()
        return row


def cosines(left: Rows, right: Rows) -> npt.NDArray[np.float64]:
    """The cosine of every row of `left` with the same row of `right`."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
