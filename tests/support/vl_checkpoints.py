"""Copies of the conformance checkpoint, changed in one place: in its JSON files, its template, or its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.paths import CHECKPOINT

# Changes a checkpoint in its folder.
Edit = Callable[[Path], object]


def copied(tmp_path: Path) -> Path:
    """Copies the checkpoint to a folder in `tmp_path`."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def edit_json(file: Path, edit: Callable[[Any], object]) -> None:
    """Rewrites a JSON file; `edit` changes its content in place."""
    content = json.loads(file.read_bytes())
    edit(content)
    file.write_text(json.dumps(content))


def edited_config(tmp_path: Path, edit: Callable[[Any], object]) -> Path:
    """Copies the checkpoint, with its config.json edited."""
    path = copied(tmp_path)
    edit_json(path / "config.json", edit)
    return path


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites the weights in folder `path`; `edit` changes them in place."""
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def config(**changes: Any) -> Edit:
    """Sets keys of config.json."""
    return lambda path: edit_json(path / "config.json", lambda content: content.update(changes))


def config_part(part: str, **changes: Any) -> Edit:
    """Sets keys of one part of config.json, such as "text_config"."""
    return lambda path: edit_json(path / "config.json", lambda content: content[part].update(changes))


def image_processor(**changes: Any) -> Edit:
    """Sets keys of the image processor."""
    return lambda path: edit_json(path / "processor_config.json", lambda content: content["image_processor"].update(changes))
