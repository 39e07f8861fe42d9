"""The physical limit: what a forward pass must compute, counted from a checkpoint's config.json.

A multiplication and an addition are two operations. Counted are matrix products and attention; what moves no large matrix
(norms, activations, rotations) is left out, as is the embedding, which is a look-up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Dense bfloat16 matrix products as an H100 or H200 reaches them; its data sheet's 989 is beyond its power limit.
NOMINAL_TFLOPS = {"H100": 790.0, "H200": 790.0}


def nominal_tflops(device_name: str) -> float | None:
    """By the name that torch gives the device; None where none is stated here."""
    return next((tflops for name, tflops in NOMINAL_TFLOPS.items() if name in device_name), None)


@dataclass(frozen=True, slots=True)
class TextTower:
    """Sizes of the text model, in values."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_weights(self) -> int:
        """Of a layer: the matrices that make keys and values."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def other_weights(self) -> int:
        """Of a layer: queries, output and MLP."""
        return 2 * self.hidden * self.heads * self.head_dim + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Of all layers' matrices: the embedding is not among them."""
        return self.layers * (self.kv_weights + self.other_weights)

    @property
    def flop_per_token(self) -> int:
        """Without attention."""
        return 2 * self.parameters

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Keys and values of all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * bytes_per_value

    def flop(self, tokens: int, prefix: int = 0, trimmed: bool = False) -> int:
        """Operations of one sequence, attention causal.

        The first `prefix` tokens' keys and values are there already; `trimmed` computes queries, output and MLP of the last layer
        for the last token alone.
        """
        new = tokens - prefix
        pairs = tokens * (tokens + 1) // 2 - prefix * (prefix + 1) // 2
        # For each query and key a product of head_dim for the score and one for the value.
        per_pair = 4 * self.heads * self.head_dim
        layer = 2 * new * (self.kv_weights + self.other_weights) + per_pair * pairs
        if not trimmed:
            return self.layers * layer
        return (self.layers - 1) * layer + 2 * new * self.kv_weights + 2 * self.other_weights + per_pair * tokens


@dataclass(frozen=True, slots=True)
class VisionTower:
    """Sizes of the vision model, in values; `deepstack` is the number of its layers whose features go to the text model."""

    depth: int
    hidden: int
    intermediate: int
    channels: int
    patch: int
    temporal_patch: int
    merge: int
    out: int
    deepstack: int

    def flop(self, height: int, width: int) -> int:
        """Operations for an image, in pixels of its resized sides: every patch attends to every other."""
        patches = (height // self.patch) * (width // self.patch)
        embedding = 2 * patches * self.hidden * self.channels * self.temporal_patch * self.patch**2
        weights = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        layers = self.depth * (2 * patches * weights + 4 * self.hidden * patches**2)
        merged = self.hidden * self.merge**2
        mergers = (1 + self.deepstack) * 2 * (patches // self.merge**2) * (merged**2 + merged * self.out)
        return embedding + layers + mergers


@dataclass(frozen=True, slots=True)
class Towers:
    """Both towers of a Qwen3-VL checkpoint."""

    text: TextTower
    vision: VisionTower

    @classmethod
    def read(cls, path: Path) -> Towers:
        """From the config.json in folder `path`."""
        return cls.of(json.loads((path / "config.json").read_bytes()))

    @classmethod
    def of(cls, config: dict[str, Any]) -> Towers:
        """From the content of a config.json."""
        text, vision = config["text_config"], config["vision_config"]
        return cls(
            TextTower(
                layers=text["num_hidden_layers"],
                hidden=text["hidden_size"],
                intermediate=text["intermediate_size"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            ),
            VisionTower(
                depth=vision["depth"],
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                channels=vision["in_channels"],
                patch=vision["patch_size"],
                temporal_patch=vision["temporal_patch_size"],
                merge=vision["spatial_merge_size"],
                out=vision["out_hidden_size"],
                deepstack=len(vision["deepstack_visual_indexes"]),
            ),
        )

    def flop(self, tokens: int, image_side: int = 0, prefix: int = 0, trimmed: bool = False) -> int:
        """Operations of one input of `tokens` tokens, those of its one square image among them; 0 pixels are no image."""
        return self.text.flop(tokens, prefix, trimmed) + (self.vision.flop(image_side, image_side) if image_side else 0)
