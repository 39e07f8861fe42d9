"""modules.json and the pooling modes that a folder names, in today's form and in the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.base import ModelLoadError
from models.checkpoints.modules_json import POOLING_MODES, ModuleRow, pooling_modes, read_modules
from tests.support.text_checkpoints import write_json


def test_read_modules_of_a_folder_without_any(tmp_path: Path) -> None:
    assert read_modules(tmp_path) is None


def test_read_modules_in_their_order(tmp_path: Path) -> None:
    kinds = ["sentence_transformers.models.Transformer", "own.code.Pooling"]
    write_json(
        tmp_path / "modules.json", [{"idx": i, "name": str(i), "path": f"{i}_x", "type": kind} for i, kind in enumerate(kinds)]
    )
    rows = read_modules(tmp_path)
    assert rows == [ModuleRow(kinds[0], "0_x", "0"), ModuleRow(kinds[1], "1_x", "1")]
    assert [row.kind for row in rows] == ["Transformer", "Pooling"]


@pytest.mark.parametrize("content", [{"a": 1}, [1], [{"type": "x"}], [{"path": "x"}], "x"])
def test_read_modules_of_another_form_is_refused(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / "modules.json", content)
    with pytest.raises(ModelLoadError, match="is not a list of modules"):
        read_modules(tmp_path)


def test_read_modules_of_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_modules(tmp_path)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({}, ("mean",)),
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["max", "cls"]}, ("max", "cls")),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, ("lasttoken",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, ("cls",)),
        ({"word_embedding_dimension": 3}, ("mean",)),
    ],
)
def test_pooling_modes_by_name_or_by_flag(config: dict[str, Any], modes: tuple[str, ...]) -> None:
    assert pooling_modes(config) == modes


@pytest.mark.live
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling_modes_are_the_librarys(mode: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    config = Pooling(8, pooling_mode=mode).get_config_dict()
    assert pooling_modes(config) == (mode,)
