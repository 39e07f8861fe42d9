"""Reads the JSON files of a checkpoint; a fault is one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.base import ModelLoadError


def read_json(file: Path) -> Any:
    """Returns what a file holds. Raises ModelLoadError."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} cannot be read ({type(error).__name__})") from None


def read_object(file: Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds. Raises ModelLoadError."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise ModelLoadError(f"{file} holds no JSON object")
    return found
