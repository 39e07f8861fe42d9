"""Refuses checkpoints that ask for something which the official code does not do, or which is not done here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.base import ModelLoadError
from models.checkpoints.json_files import read_object
from models.checkpoints.modules_json import FILE, LAST_TOKEN, pooling_modes, read_modules
from models.qwen3_vl.patches import VisionSpec


def check_modules(path: Path) -> None:
    """Raises ModelLoadError if the folder has a modules.json, for sentence-transformers, that asks for anything but the last
    token's state, normalised."""
    for row in read_modules(path) or []:
        if row.kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelLoadError(f"{path / FILE} has a {row.kind}, which is not applied to a model of this family")
        if row.kind == "Pooling" and (modes := {*pooling_modes(read_object(path / row.folder / "config.json"))}) != {LAST_TOKEN}:
            asked = ", ".join(sorted(modes))
            raise ModelLoadError(f"{path / FILE} asks for {asked} pooling; of this family the last token is taken")


def check_patches(spec: VisionSpec, config: Any) -> None:
    """Raises ModelLoadError if the image processor and config.json cut images in different ways, or in one that the official code
    does not know."""
    vision = config.vision_config
    pairs = [
        ("patch_size", spec.patch_size, vision.patch_size),
        ("merge_size", spec.merge_size, vision.spatial_merge_size),
        ("temporal_patch_size", spec.temporal_patch_size, vision.temporal_patch_size),
    ]
    for name, ours, theirs in pairs:
        _check_equal(name, ours, theirs)
    if vision.spatial_merge_size != 2:
        # qwen_vl_utils' constant: sides of an image are multiples of two patches, whatever the checkpoint says.
        raise ModelLoadError(f"config.json's spatial_merge_size is {vision.spatial_merge_size}; the official code knows 2 alone")


def check_image_token(token_id: int, config: Any) -> None:
    """Raises ModelLoadError if the processor and config.json have different placeholders for images."""
    _check_equal("image_token_id", token_id, config.image_token_id)


def _check_equal(name: str, processors: int, configs: int) -> None:
    if processors != configs:
        raise ModelLoadError(f"the processor's {name} is {processors}, but config.json says {configs}")


def check_attention(config: Any) -> None:
    """Raises ModelLoadError if config.json asks for attention, or an order of deepstack features, that is not computed here."""
    if getattr(config.text_config, "is_causal", True) is not True:
        raise ModelLoadError("config.json says that a token sees those after it (is_causal), which is not done here")
    layers = config.vision_config.deepstack_visual_indexes
    if len(set(layers)) < len(layers):
        raise ModelLoadError("config.json's deepstack_visual_indexes name a layer twice")
