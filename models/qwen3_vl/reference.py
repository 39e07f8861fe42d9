"""The forward pass by transformers' own modules, vision tower included: sequences padded on the right, in groups of like length.

Slower than the packed forward and simpler: the oracle that it is held to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedImage, PreparedInput
from models.qwen3_vl.patches import VisionSpec
from models.qwen3_vl.vision_tower import PixelNormalizer
from models.vectors import normalize

# As the official embedder batches. A group holds no more than this many, and no more padded tokens unless it is one sequence.
GROUP_SIZE = 32
GROUP_TOKENS = 16_384


class ReferenceForward:
    """Vectors by a Qwen3VLModel as transformers loads it."""

    def __init__(self, model: Any, spec: VisionSpec) -> None:
        self._model = model
        self._normalize = PixelNormalizer(spec, model.device)
        self._image_token_id = model.config.image_token_id

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Unit vectors, float32 of shape (len(batch), width): row i is of batch[i]'s last token."""
        order = sorted(range(len(batch)), key=lambda index: batch[index].num_tokens)
        rows: torch.Tensor | None = None
        for group in _groups(order, batch):
            hidden = self._forward([batch[index] for index in group])
            if rows is None:
                rows = hidden.new_empty(len(batch), hidden.shape[1])
            rows[torch.tensor(group, device=rows.device)] = hidden
        assert rows is not None, "an empty batch"
        vectors: npt.NDArray[np.float32] = normalize(rows.float()).cpu().numpy()
        return vectors

    def _forward(self, group: Sequence[PreparedInput]) -> torch.Tensor:
        lengths = np.array([item.num_tokens for item in group])
        ids = np.zeros((len(group), lengths.max()), dtype=np.int64)
        positions = np.zeros((3, *ids.shape), dtype=np.int64)
        for row, item in enumerate(group):
            ids[row, : item.num_tokens] = item.token_ids
            positions[:, row, : item.num_tokens] = np.arange(item.num_tokens) if item.positions is None else item.positions
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        is_image = (ids == self._image_token_id) & mask

        language_model, device = self._model.language_model, self._model.device
        embeds = language_model.embed_tokens(torch.from_numpy(ids).to(device))
        visual: dict[str, Any] = {}
        if is_image.any():
            image_mask = torch.from_numpy(is_image).to(device)
            seen = self._see([image for item in group for image in item.images])
            embeds[image_mask] = seen.pooler_output.to(embeds.dtype)
            visual = {"visual_pos_masks": image_mask, "deepstack_visual_embeds": seen.deepstack_features}
        output = language_model(
            inputs_embeds=embeds,
            attention_mask=torch.from_numpy(mask).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            use_cache=False,
            **visual,
        )
        last = torch.from_numpy(lengths - 1).to(device)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[torch.arange(len(group), device=device), last]

    def _see(self, images: Sequence[PreparedImage]) -> Any:
        """The vision model's output for all images of a group."""
        pixels = torch.from_numpy(np.concatenate([image.patches for image in images])).to(self._model.device)
        grids = torch.tensor([(1, *image.grid.grid) for image in images], device=pixels.device)
        return self._model.visual(self._normalize(pixels), grid_thw=grids, return_dict=True)


def _groups(order: Sequence[int], batch: Sequence[PreparedInput]) -> Iterator[list[int]]:
    """Cut indices, sorted by length, into groups that are padded together."""
    group: list[int] = []
    for index in order:
        if group and (len(group) == GROUP_SIZE or (len(group) + 1) * batch[index].num_tokens > GROUP_TOKENS):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
