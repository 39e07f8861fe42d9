"""The checkpoints of these tests, loaded once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoints.demo import OTHER, write_demo_checkpoint
from tests.support.paths import CHECKPOINT
from tests.support.whole_model import WholeModel, load_model


@pytest.fixture(scope="package")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3_vl") / "other"
    write_demo_checkpoint(path, seed=3, shape=OTHER)
    return path


@pytest.fixture(scope="package")
def other(other_path: Path) -> WholeModel:
    return load_model(other_path)


@pytest.fixture(scope="package")
def mini() -> WholeModel:
    return load_model(CHECKPOINT)


@pytest.fixture(scope="package", params=["mini", "other"])
def model(request: pytest.FixtureRequest) -> WholeModel:
    found: WholeModel = request.getfixturevalue(request.param)
    return found
