"""A checkpoint's two halves behind one name, for tests that prepare and embed in one breath."""

from __future__ import annotations

from typing import Any

from models.base import LoadedModel
from models.registry import load_model as load_halves


class WholeModel:
    """Has what the preparer has, and what the model has."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.preparer = loaded.preparer
        self.model = loaded.model

    def load_both(self) -> LoadedModel:
        return LoadedModel(self.preparer, self.model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.preparer, name) if hasattr(self.preparer, name) else getattr(self.model, name)


def load_model(*arguments: Any, **options: Any) -> Any:
    """Loads a checkpoint as models.registry does, as a WholeModel."""
    return WholeModel(load_halves(*arguments, **options))
