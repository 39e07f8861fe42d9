"""The reference forward of Qwen3-VL: transformers' own modules, vision tower included, over sequences padded on the right in
groups of similar length. Slower than the packed forward and simpler: tests hold the packed one to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedImage, PreparedInput
from models.grouping import group_by_tokens
from models.qwen3_vl.patches import VisionSpec
from models.qwen3_vl.vision_tower import PixelNormalizer
from models.vectors import normalize

# Sequences of a group, as the official embedder batches them.
GROUP_SIZE = 32
# Padded tokens of a group of several sequences, which bound its memory.
GROUP_TOKENS = 16_384


class ReferenceForward:
    """Computes vectors by a Qwen3VLModel, as transformers loads it."""

    def __init__(self, model: Any, spec: VisionSpec) -> None:
        self._model = model
        self._normalize = PixelNormalizer(spec, model.device)
        self._image_token_id = model.config.image_token_id

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Returns unit vectors, float32 (len(batch), width): row i is of batch[i]'s last token."""
        lengths = [item.num_tokens for item in batch]
        order = sorted(range(len(batch)), key=lengths.__getitem__)
        rows: torch.Tensor | None = None
        for group in group_by_tokens(order, lengths, max_size=GROUP_SIZE, max_tokens=GROUP_TOKENS, padded=True):
            hidden = self._forward([batch[index] for index in group])
            if rows is None:
                rows = hidden.new_empty(len(batch), hidden.shape[1])
            rows[torch.tensor(group, device=rows.device)] = hidden
        assert rows is not None, "an empty batch"
        vectors: npt.NDArray[np.float32] = normalize(rows.float()).cpu().numpy()
        return vectors

    def _forward(self, group: Sequence[PreparedInput]) -> torch.Tensor:
        """Returns the last hidden state of each input's last token: (len(group), width)."""
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
            features = self._embed_images([image for item in group for image in item.images])
            embeds[image_mask] = features.pooler_output.to(embeds.dtype)
            visual = {"visual_pos_masks": image_mask, "deepstack_visual_embeds": features.deepstack_features}
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

    def _embed_images(self, images: Sequence[PreparedImage]) -> Any:
        """Returns the vision model's output for all images of a group."""
        pixels = torch.from_numpy(np.concatenate([image.patches for image in images])).to(self._model.device)
        grids = torch.tensor([(1, *image.grid.grid) for image in images], device=pixels.device)
        return self._model.visual(self._normalize(pixels), grid_thw=grids, return_dict=True)
