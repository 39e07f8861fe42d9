"""What a checkpoint asks for that the official code does not do, or that is not done here: refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from models.base import ImageGrid, ModelLoadError
from models.qwen3_vl.patches import VisionSpec, extract_patches
from models.qwen3_vl.prompt import PromptTokenizer
from models.qwen3_vl.vision_tower import PixelNormalizer

_POOLING = "pooling_mode"
_LAST_TOKEN = "lasttoken"


def check_modules(path: Path) -> None:
    """A folder that sentence-transformers can read too may have a modules.json: nothing but the last token's state, normalised.
    Raises ModelLoadError."""
    file = path / "modules.json"
    for row in json.loads(file.read_bytes()) if file.exists() else []:
        kind = str(row["type"]).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelLoadError(f"{file} has a {kind}, which is not applied to a model of this family")
        if kind == "Pooling" and (modes := _pooling_modes(path / str(row["path"]))) - {_LAST_TOKEN}:
            raise ModelLoadError(f"{file} asks for {', '.join(sorted(modes))} pooling; of this family the last token is taken")


def _pooling_modes(folder: Path) -> set[str]:
    """What its config.json names, in the form of today or by flags."""
    config = json.loads((folder / "config.json").read_bytes())
    if (named := config.get(_POOLING)) is not None:
        return {named} if isinstance(named, str) else set(named)
    return {key.removeprefix(f"{_POOLING}_") for key, value in config.items() if key.startswith(f"{_POOLING}_") and value is True}


def check_processor(spec: VisionSpec, tokenizer: PromptTokenizer, config: Any) -> None:
    """The processor's files and config.json must speak of one model. Raises ModelLoadError."""
    vision = config.vision_config
    pairs = [
        ("patch_size", spec.patch_size, vision.patch_size),
        ("merge_size", spec.merge_size, vision.spatial_merge_size),
        ("temporal_patch_size", spec.temporal_patch_size, vision.temporal_patch_size),
        ("image_token_id", tokenizer.image_token_id, config.image_token_id),
    ]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise ModelLoadError(f"the processor's {name} is {ours}, but config.json says {theirs}")


def check_pixels(spec: VisionSpec, processor: Any) -> None:
    """The checkpoint's image processor must make of a picture what is made of it here. Raises ModelLoadError."""
    size = (3 * spec.factor, 2 * spec.factor)
    picture = Image.frombytes("RGB", size, bytes(index * 37 % 251 for index in range(size[0] * size[1] * 3)))
    patches = extract_patches(picture, ImageGrid(size, size, (2 * spec.merge_size, 3 * spec.merge_size), 6), spec).patches
    theirs = processor(images=[picture], do_resize=False, return_tensors="pt")["pixel_values"]
    ours = PixelNormalizer(spec, torch.device("cpu"))(torch.from_numpy(patches)) if len(spec.mean) == len(spec.std) == 3 else None
    if ours is None or ours.shape != theirs.shape or not torch.allclose(ours, theirs.float(), rtol=1e-3, atol=1e-3):
        raise ModelLoadError(
            "the checkpoint's image processor makes other values of pixels than to rescale them and to normalise each channel "
            "(do_rescale, do_normalize, image_mean, image_std)"
        )


def check_config(config: Any) -> None:
    """What config.json may ask of transformers' modules and is not done here. Raises ModelLoadError."""
    vision = config.vision_config
    if vision.spatial_merge_size != 2:
        # qwen_vl_utils' constant: sides of an image are multiples of two patches, whatever the checkpoint says.
        raise ModelLoadError(f"config.json's spatial_merge_size is {vision.spatial_merge_size}; the official code knows 2 alone")
    if getattr(config.text_config, "is_causal", True) is not True:
        raise ModelLoadError("config.json says that a token sees those after it (is_causal), which is not done here")
    if len(set(vision.deepstack_visual_indexes)) < len(vision.deepstack_visual_indexes):
        raise ModelLoadError("config.json's deepstack_visual_indexes name a layer twice")
