"""The list of faults fits the code: each is one place, and what it becomes is Python still."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.tools.faults.faults import FAULTS, Fault

pytestmark = pytest.mark.tools


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}-{fault.what}")
def test_fault_can_be_put_into_the_code(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / fault.file
    path.parent.mkdir(parents=True)
    path.write_text((ROOT / fault.file).read_text())
    fault.put_into(tmp_path)
    assert ast.dump(ast.parse(path.read_text())) != ast.dump(ast.parse((ROOT / fault.file).read_text()))
