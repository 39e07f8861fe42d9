"""The page's modules in Node.js, without a page: each `*.test.mjs` here is run by `node --test`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.programs import program, run

TESTS = sorted(Path(__file__).parent.glob("*.test.mjs"))


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, where Node.js takes them for modules, as browsers do."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "package.json").write_text('{"type": "module"}')
    return Path(shutil.copytree(ROOT / "app" / "static", folder / "static"))


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name.partition(".")[0])
def test_modules(file: Path, static: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "STATIC": str(static), "PYTHON": sys.executable}
    said = run(program("node", "apt-get install nodejs"), "--test", "--test-reporter=spec", str(file), env=environment)
    assert "fail 0" in said
    assert "tests 0" not in said
